"""Draws the frames of clips with torch, on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ltx_ray.miniature.world import COLOURS, SHAPES, Clip

#: Inner radius of a regular pentagram whose outer radius is 1.
_STAR_INNER = (3 - math.sqrt(5)) / 2


def draw_frames(
    clips: Sequence[Clip],
    num_frames: int,
    height: int,
    width: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Frames (B, 3, num_frames, height, width) of the clips, sRGB as float32 in [-1, 1], with antialiased edges."""
    at = torch.arange(num_frames, device=device) / max(num_frames - 1, 1)
    column = torch.arange(width, device=device) + 0.5
    row = torch.arange(height, device=device) + 0.5
    short = min(height, width)

    def vector(values):
        return torch.tensor(list(values), dtype=torch.float32, device=device)[:, None]

    def path(start, end):  # (B, F)
        return vector(start) * (1 - at) + vector(end) * at

    x = path((c.start[0] for c in clips), (c.end[0] for c in clips)) * width
    y = path((c.start[1] for c in clips), (c.end[1] for c in clips)) * height
    radius = path((c.start_size for c in clips), (c.end_size for c in clips)) * short / 2
    dx = column - x[..., None, None]  # (B, F, 1, W)
    dy = row[:, None] - y[..., None, None]  # (B, F, H, 1)

    frames = torch.empty((len(clips), 3, num_frames, height, width), device=device)
    kinds = [SHAPES.index(c.scene.shape) for c in clips]
    for kind, shape in enumerate(SHAPES):
        rows = [i for i, k in enumerate(kinds) if k == kind]
        if not rows:
            continue
        distance = _DISTANCES[shape](dx[rows], dy[rows], radius[rows][..., None, None])
        inside = (0.5 - distance).clamp(0, 1)[:, None]  # (b, 1, F, H, W): covered fraction of each pixel
        ink = _colours([clips[i].scene.colour for i in rows], device)
        ground = _colours([clips[i].scene.ground for i in rows], device)
        frames[rows] = ground + (ink - ground) * inside
    return frames


def _colours(names: Sequence[str], device: torch.device | str) -> torch.Tensor:
    """The named colours as (b, 3, 1, 1, 1) in [-1, 1]."""
    values = torch.tensor([COLOURS[name] for name in names], dtype=torch.float32, device=device)
    return (values / 127.5 - 1)[..., None, None, None]


# Signed distances in pixels, negative inside. `dx`, `dy` are offsets from the centre, `r` is half the box's width.


def _circle(dx: torch.Tensor, dy: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return torch.sqrt(dx**2 + dy**2) - r


def _square(dx: torch.Tensor, dy: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return torch.maximum(dx.abs(), dy.abs()) - r


def _triangle(dx: torch.Tensor, dy: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Equilateral, with a corner on top. The bounding box is centred at (0, 0)."""
    half_height = r * (math.sqrt(3) / 2)
    slope = (math.sqrt(3) * dx.abs() - dy - half_height) / 2
    return torch.maximum(slope, dy - half_height)


def _star(dx: torch.Tensor, dy: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Five points, one of them on top, centred at (0, 0).

    All edges of a star are one line when its plane is folded into the sector between a point and the next notch.
    """
    sector = math.pi / 5
    angle = torch.atan2(dx, -dy).abs()  # 0 at the upper point
    angle = (angle + sector).remainder(2 * sector).sub(sector).abs()
    length = torch.sqrt(dx**2 + dy**2)
    u, v = length * torch.cos(angle), length * torch.sin(angle)
    outer = r / math.sin(2 * sector)  # the box is as wide as the upper side points: 2 outer sin 72°
    notch_u, notch_v = _STAR_INNER * math.cos(sector), _STAR_INNER * math.sin(sector)
    edge = math.hypot(1 - notch_u, notch_v)
    return ((u - outer) * notch_v + v * (1 - notch_u)) / edge


_DISTANCES = {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star}
assert tuple(_DISTANCES) == SHAPES
