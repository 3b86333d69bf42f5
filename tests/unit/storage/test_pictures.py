"""What is done with each kind of picture that people have: it is used, or its row is refused by the picture's name."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngImageFile

import ltx_ray.engine.images as engine_images
from ltx_ray.dataset.existing import ExistingRows
from ltx_ray.engine.images import InvalidImage, cover, decode_rgb, image_pixels
from ltx_ray.manifest.rules import IllegalRow, RowRules
from ltx_ray.planning.plan import Plan
from ltx_ray.storage import images
from ltx_ray.storage.file_kinds import named_kind
from ltx_ray.storage.pictures import FORMATS, MAX_PIXELS, open_picture
from tests.support.pictures import gradient
from tests.support.samples import SMALL, write_jsonl

RGB = Image.fromarray(gradient())
GREY = Image.fromarray(gradient()[..., 0])


def file_of(image: Image.Image, format_: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def grey16(values: np.ndarray, format_: str, dtype: str = "<u2") -> bytes:
    return file_of(Image.fromarray(values.astype(dtype)), format_)


RAMP = np.tile(np.linspace(0, 65535, 160), (20, 1))
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
MOVING = {"save_all": True, "append_images": [RGB.rotate(90)]}
ORDINARY = {
    "png": file_of(RGB, "PNG"), "webp": file_of(RGB, "WEBP", lossless=True), "bmp": file_of(RGB, "BMP"),
    "tiff": file_of(RGB, "TIFF"), "ppm": file_of(RGB, "PPM"), "jpeg 2000": file_of(RGB, "JPEG2000"),
    "rgba": file_of(RGB.convert("RGBA"), "PNG"), "moving webp": file_of(RGB, "WEBP", lossless=True, **MOVING),
    "apng": file_of(RGB, "PNG", **MOVING), "pages": file_of(RGB, "TIFF", **MOVING),
    "profile": file_of(RGB, "PNG", icc_profile=b"no profile"), "tag": file_of(RGB, "TIFF", tiffinfo={34675: "text"}),
}  # fmt: skip
CLOSE = {
    "jpeg": file_of(RGB, "JPEG", quality=95), "mpo": file_of(RGB, "MPO", quality=95, **MOVING),
    "cmyk": file_of(RGB.convert("CMYK"), "JPEG", quality=95), "ycbcr": file_of(RGB.convert("YCbCr"), "TIFF"),
    "palette": file_of(RGB.quantize(), "PNG"), "gif": file_of(RGB, "GIF", **MOVING),
    "transparent palette": file_of(RGB.quantize(), "PNG", transparency=bytes([0] * 128 + [255] * 128)),
    "icc": file_of(RGB, "PNG", icc_profile=ICC),
}  # fmt: skip
Image.init()
if "AVIF" in Image.SAVE:
    CLOSE["avif"] = file_of(RGB, "AVIF", quality=95)
    CLOSE["moving avif"] = file_of(RGB, "AVIF", quality=95, **MOVING)


@pytest.mark.parametrize("kind", ORDINARY)
def test_what_loses_nothing_keeps_every_pixel_of_the_first_picture(kind):
    assert (decode_rgb(ORDINARY[kind]) == gradient()).all()


@pytest.mark.parametrize("kind", CLOSE)
def test_what_loses_something_is_close_to_the_first_picture(kind):
    assert np.abs(decode_rgb(CLOSE[kind]).astype(int) - gradient()).mean() < 12


def test_one_bit_and_grey_with_alpha_are_grey():
    assert (decode_rgb(file_of(GREY.convert("LA"), "PNG")) == gradient()[..., :1]).all()
    assert set(np.unique(decode_rgb(file_of(GREY.convert("1"), "PNG")))) == {0, 255}


@pytest.mark.parametrize(
    "data",
    [grey16(RAMP, "PNG"), grey16(RAMP, "TIFF"), grey16(RAMP, "TIFF", ">u2"), grey16(RAMP, "PPM"),
     grey16(RAMP, "JPEG2000")],
    ids=["PNG", "TIFF", "TIFF, big-endian", "PGM", "JPEG 2000"],
)  # fmt: skip
def test_16_bits_of_grey_are_scaled_to_8(data):
    expected = (RAMP.astype(np.uint16) // 257).astype(np.uint8)
    assert (decode_rgb(data) == expected[..., None]).all()


def test_16_bits_of_grey_are_rotated_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_of(Image.fromarray(RAMP.astype(np.uint16)), "PNG", exif=exif)
    assert decode_rgb(data).shape == (160, 20, 3)


@pytest.mark.parametrize("peak, used", [(255, False), (4095, False), (4096, True), (0, True)])
def test_16_bits_of_grey_that_would_look_black_are_refused(peak, used):
    data = grey16(RAMP * (peak / 65535), "PNG")
    if used:
        assert decode_rgb(data).max() == peak // 257
    else:
        with pytest.raises(InvalidImage, match=f"16 bits of grey of which the brightest is {peak} of 65535"):
            image_pixels(data, 33, 64, 64)


def tiff(bits: int, photometric: int) -> bytes:
    """A TIFF of 16 or 12 bits of grey, with the tags of that kind."""
    data = bytearray(grey16(RAMP, "TIFF"))
    for tag, value in ((258, bits), (262, photometric)):
        place = data.index(tag.to_bytes(2, "little") + b"\x03\x00\x01\x00\x00\x00")
        data[place + 8 : place + 10] = value.to_bytes(2, "little")
    return bytes(data)


@pytest.mark.parametrize("orientation, angle", [(1, 0), (3, 180), (6, 90), (8, 270)])
@pytest.mark.parametrize("format_", ["PNG", "TIFF"])
def test_exif_rotations_are_applied_once(format_, orientation, angle):
    """Pillow turns a TIFF by itself."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (decode_rgb(file_of(RGB.rotate(angle, expand=True), format_, exif=exif)) == gradient()).all()


def png(colour: int, rows: np.ndarray) -> bytes:
    """A PNG of `rows` (height, width, channels) of PNG's colour type, without a palette."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 8 * rows.itemsize, colour, 0, 0, 0),
        b"IDAT": zlib.compress(b"".join(b"\0" + row.astype(rows.dtype.newbyteorder(">")).tobytes() for row in rows)),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )


@pytest.mark.parametrize("colour, channels", [(2, 3), (4, 2), (6, 4)], ids=["RGB", "grey and alpha", "RGBA"])
def test_16_bits_of_colour_that_would_look_black_are_refused(colour, channels):
    values = np.full((8, 8, channels), 65535, np.uint16)
    colours = slice(None, 3 if channels > 2 else 1)
    values[..., colours] = 4095
    with pytest.raises(InvalidImage, match="16 bits a channel of which the brightest is below 4096 of 65535"):
        image_pixels(png(colour, values), 33, 64, 64)
    for peak, shown in ((0, 0), (4096, 16), (65535, 255)):
        values[..., colours] = peak
        assert decode_rgb(png(colour, values)).max() == shown


def test_a_palette_picture_without_its_palette_is_not_black():
    with pytest.raises(InvalidImage, match="without its palette"):
        open_picture(png(3, np.full((8, 8, 1), 7, np.uint8)))


def test_damaged_pixels_of_a_png_are_not_black():
    data = bytearray(ORDINARY["png"])
    at = data.index(b"IDAT") + 20
    data[at] ^= 0xFF
    with pytest.raises(InvalidImage, match=r"^a PNG picture whose data is damaged: its checksum is wrong$"):
        open_picture(bytes(data))


def test_pixels_with_a_sign_are_refused():
    with pytest.raises(InvalidImage, match="pixels with a sign have no defined RGB"):
        open_picture(file_of(GREY, "TIFF", tiffinfo={339: 2}))


UNDEFINED = {
    "floats": file_of(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"),
    "PFM": file_of(Image.fromarray(RAMP.astype(np.float32)), "PPM"),
    "32 bits": file_of(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    "white is zero": tiff(16, 0),
    "12 bits": tiff(12, 1),
    "CIELAB": file_of(RGB.convert("LAB"), "TIFF"),
}
OTHER_FILES = {
    "empty": (b"", "an empty file"),
    "text": (b"prompt,seed\n", ""),
    "web page": (b"\n<!DOCTYPE html><html><title>404</title>", "a web page"),
    "SVG": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n", "a PostScript document"),
    "PDF": (b"%PDF-1.4\n", "a PDF document"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 100, "a HEIC picture"),
    "video": (b"\0\0\0\x18ftypisom\0\0\0\0", "a video"),
    "PSD": (b"8BPS\0\1" + b"\0" * 100, "a Photoshop document"),
    "JPEG XL": (b"\xff\x0a" + b"\0" * 100, "a JPEG XL picture"),
    "EXR": (b"\x76\x2f\x31\x01" + b"\0" * 100, "an OpenEXR picture"),
    "icon": (b"\0\0\1\0\1\0" + b"\0" * 100, "an icon"),
    "macOS": (b"\0\5\x16\7\0\2\0\0Mac OS X", "what macOS keeps beside a file"),
    "store's error": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n", "a Git LFS pointer"),
}


@pytest.mark.parametrize("kind", UNDEFINED)
def test_pixels_that_do_not_say_what_is_white_are_refused(kind):
    with pytest.raises(InvalidImage, match=r"pixels of mode \S+ have no defined RGB; legal: 8 bits a channel, or 16"):
        image_pixels(UNDEFINED[kind], 33, 64, 64)


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_what_is_no_picture_is_named_for_what_it_is(kind):
    data, name = OTHER_FILES[kind]
    with pytest.raises(
        InvalidImage, match=f"^not a known image format{' but ' if name else ''}{name}.*; read are AVIF"
    ):
        image_pixels(data, 33, 64, 64)


def test_a_damaged_header_is_named_as_that():
    data = ORDINARY["png"]
    with pytest.raises(InvalidImage, match=r"^a PNG picture whose header is damaged"):
        image_pixels(data[:20] + b"?" + data[21:], 33, 64, 64)


@pytest.mark.parametrize("format_", ["EPS", "ICO", "TGA", "PCX", "SGI", "PDF"])
def test_no_other_format_and_no_other_program_is_used(format_, monkeypatch):
    def run(*args, **options):
        raise AssertionError(f"{args} was run")

    for name in ("Popen", "run", "check_call", "check_output", "call"):
        monkeypatch.setattr(subprocess, name, run)
    with pytest.raises(InvalidImage, match="not a known image format"):
        decode_rgb(file_of(RGB, format_))
    assert format_ not in FORMATS


EXIF = Image.Exif()
EXIF[0x0112] = 6
BROKEN_EXIF = (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40, b"garbage")


@pytest.mark.parametrize("exif", BROKEN_EXIF)
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_costs_no_picture(format_, exif):
    data = file_of(RGB, format_, exif=exif, **({"lossless": True} if format_ == "WEBP" else {"quality": 95}))
    assert np.abs(decode_rgb(data).astype(int) - gradient()).mean() < 12


def test_an_exif_parser_that_fails_costs_no_picture(monkeypatch):
    def fail(self):
        raise ZeroDivisionError

    monkeypatch.setattr(PngImageFile, "getexif", fail)
    assert (decode_rgb(ORDINARY["png"]) == gradient()).all()


def test_whatever_a_decoder_raises_is_the_pictures_fault(monkeypatch):
    def fail(self, *args):
        raise IndexError

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(InvalidImage, match="IndexError"):
        image_pixels(ORDINARY["png"], 33, 64, 64)


@pytest.mark.parametrize("kind", ["png", "tiff", "bmp", "ppm", "jpeg 2000", "webp"])
def test_a_picture_that_was_cut_is_refused(kind):
    for part in (0.3, 0.6, 0.8):
        with pytest.raises(InvalidImage):
            image_pixels(ORDINARY[kind][: int(len(ORDINARY[kind]) * part)], 33, 64, 64)


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(9460, 9460), (20000, 20000), (60000, 3)])
def test_sizes_that_no_picture_has_are_refused_by_their_header(size, recwarn):
    with pytest.raises(InvalidImage, match=r"pixels"):
        image_pixels(file_of(Image.new("1", size), "PNG"), 33, 64, 64)
    assert not [w for w in recwarn if issubclass(w.category, Image.DecompressionBombWarning)]


def test_the_largest_picture_is_opened_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.prod(open_picture(file_of(Image.new("1", (9459, 9459)), "PNG")).size) <= MAX_PIXELS


@pytest.mark.parametrize("size", [(17000, 600), (600, 17000)])
def test_a_side_that_h264_does_not_take_is_refused_unless_crf_is_0(size):
    data = file_of(Image.new("RGB", size, (30, 120, 90)), "JPEG")
    with pytest.raises(InvalidImage, match=f"{size[0]} x {size[1]} pixels; legal: sides of at most 16384, or crf 0"):
        image_pixels(data, 33, 64, 64)
    assert image_pixels(data, 0, 64, 64).shape == (1, 3, 1, 64, 64)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (1, 9), (2, 16385), (16384, 2)])
def test_small_and_narrow_pictures_are_used(size):
    pixels = image_pixels(file_of(Image.new("RGB", size, (200, 30, 30)), "PNG"), 33, 64, 64)
    assert pixels.shape == (1, 3, 1, 64, 64) and pixels[:, 0].min() > pixels[:, 1].max()


@pytest.mark.parametrize("size", [(1000, 1), (1, 1000), (8, 4000), (4000, 8), (16384, 2)])
def test_a_long_picture_takes_no_more_memory_than_the_clip(size, monkeypatch):
    sizes = []
    interpolate = torch.nn.functional.interpolate
    monkeypatch.setattr(
        engine_images.F, "interpolate", lambda x, size, **more: sizes.append(size) or interpolate(x, size, **more)
    )
    data = file_of(Image.new("RGB", size, (200, 30, 30)), "PNG")
    assert image_pixels(data, 33, 1088, 1920).shape == (1, 3, 1, 1088, 1920) and sizes == []


@pytest.mark.parametrize("shape", [(200, 40), (7, 300), (1, 50), (50, 1), (33, 31), (1088, 5)])
def test_cutting_first_gives_what_scaling_first_gives(shape, monkeypatch):
    picture = torch.rand(*shape, 3, generator=torch.Generator().manual_seed(0)) * 255
    for height, width in ((64, 64), (320, 256), (64, 192)):
        whole = cover(picture, height, width)
        monkeypatch.setattr(engine_images, "_WHOLE_PIXELS", 0)
        monkeypatch.setattr(engine_images, "_WHOLE_RATIO", 0)
        cut = cover(picture, height, width)
        monkeypatch.undo()
        assert torch.allclose(whole, cut, atol=2e-3, rtol=0) and whole.shape == cut.shape


def test_ordinary_pictures_are_scaled_whole(monkeypatch):
    """Their pixels are those of the reference to the last bit."""
    monkeypatch.setattr(engine_images, "_cover_cut", None)
    for size in ((2000, 200), (9, 160), (60, 40)):
        cover(torch.rand(*size, 3), 320, 320)
    cover(torch.rand(400, 1200, 3), 1088, 1920)


# --- planning ------------------------------------------------------------------------------------


@pytest.fixture
def planned(tmp_path, builder):
    """A function that plans a manifest with the given rows."""

    def make(*rows: dict) -> list:
        manifest = write_jsonl(tmp_path / "m.jsonl", [{"prompt": "a", **SMALL, **row} for row in rows])
        return list(Plan(manifest=manifest, rules=RowRules(), builder=builder, existing=ExistingRows()).open())

    return make


def test_a_picture_that_cannot_be_used_makes_its_row_illegal(planned, tmp_path):
    """With the words that a worker would have had for it."""
    bad = {name: data for name, (data, _) in OTHER_FILES.items()} | UNDEFINED
    bad["bomb"] = file_of(Image.new("1", (9460, 9460)), "PNG")
    for name, data in bad.items():
        (tmp_path / "x.png").write_bytes(data)
        images._inspected.cache_clear()
        (row,) = planned({"id": "a", "images": [{"path": "x.png"}]})
        with pytest.raises(InvalidImage) as caught:
            image_pixels(data, 33, 64, 64)
        assert isinstance(row, IllegalRow), name
        assert row.messages()[0].endswith(f"legal: an image that can be read ({caught.value})"), name


def test_whether_a_long_side_is_legal_depends_on_the_crf_of_the_row(planned, tmp_path):
    (tmp_path / "x.jpg").write_bytes(file_of(Image.new("RGB", (17000, 600)), "JPEG"))
    rows = [{"id": f"r{crf}", "images": [{"path": "x.jpg", "crf": crf}]} for crf in (33, 0)]
    refused, used = planned(*rows)
    assert "17000 x 600 pixels; legal: sides of at most 16384, or crf 0" in refused.messages()[0]
    assert used.status == "todo"


def test_planning_reads_a_bad_picture_once(planned, tmp_path, monkeypatch):
    reads = []
    read = images.read_image
    monkeypatch.setattr(images, "read_image", lambda path: reads.append(path) or read(path))
    (tmp_path / "bad.png").write_bytes(b"")
    rows = planned(*({"id": f"r{n}", "images": [{"path": "bad.png"}]} for n in range(3)))
    assert [type(row) for row in rows] == [IllegalRow] * 3 and len(reads) == 1


def test_kinds_of_files_are_named_by_their_first_bytes():
    assert named_kind(json.dumps({"a": 1}).encode()) is None
    assert named_kind(b"\0\0\0\x1cftypavif") == "an AVIF picture"
    assert named_kind(b"PK\x03\x04data.pkl") == "a zip archive, which PyTorch's .pt and .ckpt files are too"
