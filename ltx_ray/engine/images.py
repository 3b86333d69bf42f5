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
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

#: EXIF orientations that are rotated, in degrees. Mirrored ones are left as they are, as in the reference.
_ROTATIONS = {3: 180, 6: 270, 8: 90}


class InvalidImage(Exception):
    """The bytes cannot be decoded as an image."""


def image_pixels(data: bytes, crf: int, height: int, width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Pixels (1, 3, 1, height, width) float32 in [-1, 1], scaled on `device`. `crf` 0 leaves H.264 out.

    Raises InvalidImage.
    """
    try:
        rgb = decode_rgb(data)
    except UnidentifiedImageError:
        raise InvalidImage("not a known image format") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidImage(str(error)) from None
    if crf and min(rgb.shape[:2]) >= 2:
        rgb = through_h264(rgb, crf)
    # A GPU rounds the interpolation otherwise than a CPU, and the reference interpolates on the device.
    return cover(torch.from_numpy(rgb).to(device).float(), height, width) / 127.5 - 1.0


def decode_rgb(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8 in sRGB, upright."""
    with Image.open(io.BytesIO(data)) as source:
        image: Image.Image = source
        rotation = _ROTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
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


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
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
    pixels = picture.permute(2, 0, 1)[None]
    scale = max(height / picture.shape[0], width / picture.shape[1])
    size = tuple(math.ceil(side * scale) for side in picture.shape[:2])
    pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[:, :, None, top : top + height, left : left + width]
