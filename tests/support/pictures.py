"""Small pictures as bytes of image files."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def encoded(array: np.ndarray, format_: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format_, **options)
    return buffer.getvalue()


def gradient(height: int = 40, width: int = 60) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack((x * 255 // width, y * 255 // height, (x + y) % 256), axis=-1).astype(np.uint8)
