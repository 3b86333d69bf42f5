"""Which files can be conditioning images, as far as their headers tell. No torch.

Planning and the workers both ask here, so a picture that is refused is refused in the same words by both, and before a
GPU is used. A header tells the format, the kind of pixels and the size. Whether all of the data is there shows only
when it is decoded, which takes a hundred times as long.
"""

from __future__ import annotations

import io
import warnings
import zlib

from PIL import Image, UnidentifiedImageError

from ltx_ray.storage.file_kinds import named_kind

#: Formats that are opened, by Pillow's names. None of them needs another program, as EPS does.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_SHOWN_FORMATS = "AVIF, BMP, GIF, JPEG, JPEG 2000, PNG, PPM, TIFF and WebP"
#: Kinds of files that are among these formats.
_READABLE = (
    "a PNG picture", "a JPEG picture", "an AVIF picture", "a GIF picture", "a TIFF picture",
    "a WebP picture", "a JPEG 2000 picture",
)  # fmt: skip
#: Pillow's modes whose conversion to RGB keeps what the picture shows.
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
#: A picture of more pixels is refused. Pillow takes it for a decompression bomb; it would take gigabytes.
MAX_PIXELS = 89_478_485
#: Pixels of a side that an H.264 encoder takes.
MAX_ENCODED_SIDE = 16_384
#: Numbers of TIFF's tags, and the value with which 0 is black.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _BLACK_IS_ZERO = 258, 262, 1
_SAMPLE_FORMAT, _UNSIGNED = 339, 1
_PNG_BEGINNING = b"\x89PNG\r\n\x1a\n"


class InvalidImage(ValueError):
    """The bytes cannot be used as a conditioning image."""


def open_picture(data: bytes) -> Image.Image:
    """The picture in `data`, of which the header is read and the first frame is current. Raises InvalidImage."""
    if _is_damaged_png(data):
        raise InvalidImage("a PNG picture whose data is damaged: its checksum is wrong")
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The size is checked below, and broken EXIF is no reason to worry.
            image = Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        kind = named_kind(data)
        if kind in _READABLE:
            raise InvalidImage(f"{kind} whose header is damaged, or which this Pillow does not read") from None
        but = f" but {kind}" if kind else ""
        raise InvalidImage(f"not a known image format{but}; read are {_SHOWN_FORMATS}") from None
    except Image.DecompressionBombError:
        raise InvalidImage(f"over the limit of {MAX_PIXELS} pixels") from None
    except MemoryError:
        raise
    except Exception as error:  # Parsers of foreign bytes raise whatever their code happens to raise.
        raise InvalidImage(str(error) or type(error).__name__) from None
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise InvalidImage(f"{width} x {height} pixels; legal: 1 to {MAX_PIXELS}")
    if image.mode not in _MODES and not is_deep_grey(image):
        raise InvalidImage(f"pixels of mode {image.mode} have no defined RGB; legal: 8 bits a channel, or 16 of grey")
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    if set(tags.get(_SAMPLE_FORMAT, ())) - {_UNSIGNED}:
        raise InvalidImage("pixels with a sign have no defined RGB; legal: 8 bits a channel, or 16 of grey")
    if image.mode == "P" and image.palette is None:
        raise InvalidImage("a picture of colours by number without its palette; legal: one with its palette")
    return image


def _is_damaged_png(data: bytes) -> bool:
    """Whether pixels of a PNG have changed since it was written. Pillow does not look, and damage may come out black.

    What was cut off is found when it is decoded.
    """
    if not data.startswith(_PNG_BEGINNING):
        return False
    view, start = memoryview(data), len(_PNG_BEGINNING)
    while start + 12 <= len(data):
        end = start + 8 + int.from_bytes(view[start : start + 4], "big")
        if data[start + 4 : start + 8] == b"IDAT" and end + 4 <= len(data):
            if zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
                return True
        start = end + 4
    return False


def is_deep_grey(image: Image.Image) -> bool:
    """Whether the picture is grey in 16 bits, of which 65535 is white. Pillow's own conversion makes it white."""
    if image.mode == "I":
        # So PPM is opened, and PNG before Pillow 11. In a TIFF these are 32 bits, or have a sign.
        return image.format in ("PNG", "PPM")
    if not image.mode.startswith("I;16"):
        return False
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else None
    return tags is None or (
        tuple(tags.get(_BITS_PER_SAMPLE, ())) == (16,) and tags.get(_PHOTOMETRIC, _BLACK_IS_ZERO) == _BLACK_IS_ZERO
    )


def check_encodable(size: tuple[int, int], crf: int) -> None:
    """Raise InvalidImage when a picture of `size` (width, height) is too large for the H.264 frame that `crf` wants."""
    width, height = size
    if crf and min(size) >= 2 and max(size) // 2 * 2 > MAX_ENCODED_SIDE:
        raise InvalidImage(f"{width} x {height} pixels; legal: sides of at most {MAX_ENCODED_SIDE}, or crf 0")
