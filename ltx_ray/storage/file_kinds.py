"""What a file is, by its first bytes, when it is not what it should be: messages then say more than what it is not."""

from __future__ import annotations

#: Bytes from the beginning of a file that `named_kind` looks at.
HEAD_BYTES = 512

#: Beginnings of files, in the order in which they are tried.
_BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer, in whose place `git lfs pull` puts the file",
    b"PK\x03\x04": "a zip archive, which PyTorch's .pt and .ckpt files are too",
    **dict.fromkeys((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), "a pickle, which PyTorch's older files are"),
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip archive",
    b"%PDF": "a PDF document",
    b"%!PS": "a PostScript document",
    b"\xc5\xd0\xd3\xc6": "a PostScript document",
    b"8BPS": "a Photoshop document",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"II*\0": "a TIFF picture",
    b"MM\0*": "a TIFF picture",
    b"II+\0": "a TIFF picture",
    b"MM\0+": "a TIFF picture",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 picture",
    b"\xff\x4f\xff\x51": "a JPEG 2000 picture",
    b"\xff\x0a": "a JPEG XL picture",
    b"\0\0\0\x0cJXL ": "a JPEG XL picture",
    b"\x76\x2f\x31\x01": "an OpenEXR picture",
    b"\0\0\x01\0": "an icon",
    b"\0\x05\x16\x07": "what macOS keeps beside a file",
    b"\x1a\x45\xdf\xa3": "a video",
}
#: What text begins with, in lower case and after blanks.
_TEXTS = {"<!doctype html": "a web page", "<html": "a web page", "<svg": "an SVG drawing"}
#: Brands of ISO media files, whose first box begins with its size.
_BRANDS = {
    b"heic": "a HEIC picture", b"heix": "a HEIC picture", b"mif1": "a HEIF picture", b"msf1": "a HEIF picture",
    b"avif": "an AVIF picture", b"avis": "an AVIF picture",
}  # fmt: skip


def named_kind(head: bytes) -> str | None:
    """What the file that begins with `head` is; None for a kind that is not known here."""
    if not head:
        return "an empty file"
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "a WebP picture"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "a video")
    text = head[:HEAD_BYTES].decode("utf-8-sig", "replace").lstrip().lower()
    for tag, kind in _TEXTS.items():
        if text.startswith(tag) or (text.startswith(("<?xml", "<!--")) and tag in text):
            return kind
    return "an XML document" if text.startswith("<?xml") else None
