"""Clips that look like something: a textured scene, and what is done to it from frame to frame. I420, as decoded."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F

HEIGHT, WIDTH, FRAMES = 352, 640, 49


def scene(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """A textured picture (height, width) of luma in codes: soft shapes, finer ones, and fine texture."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.zeros(1, 1, height, width)
    for cells, strength in ((4, 40.0), (16, 15.0), (64, 8.0)):
        noise = torch.randn(1, 1, cells, cells, generator=generator)
        picture += strength * F.interpolate(noise, (height, width), mode="bicubic")
    picture += 4 * torch.randn(picture.shape, generator=generator)
    return (picture[0, 0] + 110).clamp(16, 235)


def i420(pictures: Iterable[torch.Tensor], chroma: tuple[int, int] = (128, 128)) -> torch.Tensor:
    """Frames (f, 3h/2, w) uint8 of pictures (h, w) in codes, of one colour."""
    luma = torch.stack([picture.clamp(0, 255).to(torch.uint8) for picture in pictures])
    planes = [luma]
    for value in chroma:
        planes.append(luma.new_full((len(luma), luma.shape[1] // 4, luma.shape[2]), value))
    return torch.cat(planes, dim=1)


def with_square(picture: torch.Tensor, row: int, column: int, side: int = 10, luma: float = 200.0) -> torch.Tensor:
    picture = picture.clone()
    picture[row : row + side, column : column + side] = luma
    return picture
