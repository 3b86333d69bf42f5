"""A conditioning image, from its bytes to the pixels that the video encoder takes.

Orientation and colour profile are applied and alpha is dropped. One H.264 frame is encoded and decoded at the row's
crf, before the resize, so the result depends on the libx264 build. The picture is then scaled to cover the clip and cut
at its centre. Source: docs/ltx-2.3.md#images; `decode.py`, `resize.py` and `range_map.py` in
`ltx_pipelines/utils/media_io/` of the reference v1.2.0.
"""

from __future__ import annotations

import io
import math

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageCms

from ltx_ray.storage.pictures import InvalidImage, check_encodable, is_deep_grey, open_picture

#: EXIF orientations that are rotated, in degrees. Mirrored ones are left as they are, as in the reference.
_ROTATIONS = {3: 180, 6: 270, 8: 90}
#: A picture that covers the clip with more pixels than this, and with more than so many times the clip's, is cut before
#: it is scaled. A picture of 1000 x 1 pixels would take 14 GB to cover a clip of 1920 x 1088.
_WHOLE_PIXELS, _WHOLE_RATIO = 2**24, 8
#: The brightest value of 16 bits of grey that would look almost black, because the upper four bits are empty.
_DARKEST_PEAK = 4095


def image_pixels(data: bytes, crf: int, height: int, width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Pixels (1, 3, 1, height, width) float32 in [-1, 1], scaled on `device`. `crf` 0 leaves H.264 out.

    Raises InvalidImage.
    """
    try:
        rgb = decode_rgb(data)
        check_encodable((rgb.shape[1], rgb.shape[0]), crf)
        if crf and min(rgb.shape[:2]) >= 2:
            rgb = through_h264(rgb, crf)
    except (InvalidImage, MemoryError):
        raise
    except Exception as error:  # Decoders of foreign bytes raise whatever their code happens to raise.
        raise InvalidImage(str(error) or type(error).__name__) from None
    # A GPU rounds the interpolation otherwise than a CPU, and the reference interpolates on the device.
    return cover(torch.from_numpy(rgb).to(device).float(), height, width) / 127.5 - 1.0


def decode_rgb(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8 in sRGB, upright."""
    with open_picture(data) as source:
        image: Image.Image = source
        is_deep_colour = any(";16" in str(tile.args) for tile in getattr(source, "tile", ()))
        # Pillow turns a TIFF upright while it loads it, and then says that there is nothing left to turn.
        image.load()
        rotation = _rotation(image)
        if is_deep_grey(image):
            image = _in_8_bits(image)
        elif is_deep_colour:
            _check_bright(image)
        if rotation:
            image = image.rotate(rotation, expand=True)
        profile = image.info.get("icc_profile")
        if image.mode == "RGBA":
            image = image.convert("RGB")
        elif image.mode == "LA":
            image = image.convert("L")
        if profile:
            image = _to_srgb(image, profile)
        return np.array(image.convert("RGB"), dtype=np.uint8)


def _rotation(image: Image.Image) -> int | None:
    """Degrees by which EXIF says that the picture is to be rotated; None when it does not, or cannot be read."""
    try:
        return _ROTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:  # Broken EXIF costs the orientation, not the row. Its parser raises whatever it happens to raise.
        return None


def _in_8_bits(image: Image.Image) -> Image.Image:
    """16 bits of grey, of which 65535 is white, as 8 bits."""
    values = np.asarray(image)
    peak = int(values.max())
    if 0 < peak <= _DARKEST_PEAK:
        # So 8 to 12 bits look that were stored in 16 without being scaled, such as depths.
        raise InvalidImage(f"16 bits of grey of which the brightest is {peak} of 65535; legal: 8 bits, or all of 16")
    grey = Image.fromarray((values // 257).astype(np.uint8))
    grey.info = image.info
    return grey


def _check_bright(image: Image.Image) -> None:
    """Refuse colours of 16 bits, of which Pillow has kept the upper 8, as those of grey are refused."""
    channels = image.getextrema()[: len(image.mode.removesuffix("A"))]
    peak = max(int(high) for _, high in channels)  # type: ignore[misc]
    if 0 < peak <= _DARKEST_PEAK // 256:
        limit = (peak + 1) * 256
        raise InvalidImage(
            f"16 bits a channel of which the brightest is below {limit} of 65535; legal: 8 bits, or all of 16"
        )


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image.convert("RGB")  # A broken profile costs the colours, not the row.
    assert converted is not None  # It is None only for conversions in place.
    return converted


def through_h264(rgb: np.ndarray, crf: int) -> np.ndarray:
    """The picture (H, W, 3) uint8 after one H.264 frame at `crf`. An odd row or column is lost."""
    height, width = (side // 2 * 2 for side in rgb.shape[:2])
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1, options={"crf": str(crf), "preset": "veryfast"})
        stream.width, stream.height = width, height
        picture = np.ascontiguousarray(rgb[:height, :width])
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer, "r") as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def cover(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(H, W, 3) float -> (1, 3, 1, height, width): scaled until it covers (bilinear), cut at the centre."""
    scale = max(height / picture.shape[0], width / picture.shape[1])
    size = tuple(math.ceil(side * scale) for side in picture.shape[:2])
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    if math.prod(size) > max(_WHOLE_PIXELS, _WHOLE_RATIO * height * width):
        return _cover_cut(picture, size, (top, left), (height, width))
    pixels = picture.permute(2, 0, 1)[None]
    pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    return pixels[:, :, None, top : top + height, left : left + width]


def _cover_cut(
    picture: torch.Tensor, size: tuple[int, ...], start: tuple[int, int], cut: tuple[int, int]
) -> torch.Tensor:
    """What `cover` gives, without the whole picture of `size` from which it takes `cut` at `start`.

    It differs from `F.interpolate` in the last bits.
    """
    for dim in (1, 0):  # Columns first: of a long picture, few are seen.
        length = picture.shape[dim]
        at = torch.arange(start[dim], start[dim] + cut[dim], device=picture.device, dtype=torch.float32)
        at = ((at + 0.5) * (length / size[dim]) - 0.5).clamp_(0, length - 1)
        low = at.long()
        first, second = (picture.index_select(dim, n) for n in (low, (low + 1).clamp_(max=length - 1)))
        weight = (at - low).view(-1, 1) if dim else (at - low).view(-1, 1, 1)
        picture = torch.lerp(first, second, weight)
    return picture.permute(2, 0, 1)[None, :, None]
