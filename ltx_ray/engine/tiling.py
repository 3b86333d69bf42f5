"""How the video decoder's work is cut into overlapping tiles and blended, in plain numbers.

Source: `tiling.py`, `video_vae.py` and `helpers.py` of the reference v1.2.0 (the automatic layout of
the convolutional decoder): 768 px on the long side with 64 overlapping, the short side in proportion,
80 frames with 24 overlapping.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ltx_ray.shapes import SPACE_FACTOR, TIME_FACTOR

LONG_SIDE, SIDE_OVERLAP = 768, 64
FRAMES, FRAMES_OVERLAP = 80, 24


@dataclass(frozen=True)
class Interval:
    """One tile along one axis: latent range, pixel range, and the weight of each pixel in it."""

    latent: slice
    pixel: slice
    weights: torch.Tensor


@dataclass(frozen=True)
class Span:
    """A latent range with the lengths over which it fades into its neighbours."""

    start: int
    end: int
    left: int
    right: int


def split(length: int, size: int, overlap: int) -> list[Span]:
    """Cut `length` into ranges of `size` that overlap by `overlap`; the last may be shorter."""
    if length <= size:
        return [Span(0, length, 0, 0)]
    stride = size - overlap
    count = (length + size - 2 * overlap - 1) // stride
    return [
        Span(
            start=i * stride,
            end=i * stride + size if i < count - 1 else length,
            left=overlap if i else 0,
            right=overlap if i < count - 1 else 0,
        )
        for i in range(count)
    ]


def split_causal(length: int, size: int, overlap: int) -> list[Span]:
    """`split` in time: later tiles start one latent frame early, since their first frame covers one pixel frame."""
    first, *rest = split(length, size, overlap)
    return [first, *(Span(s.start - 1, s.end, s.left + 1, s.right) for s in rest)]


def ramp(length: int, left: int, right: int, from_zero: bool) -> torch.Tensor:
    """Weights (length,) that rise over `left` and fall over `right`. `from_zero`: the first weight is 0."""
    weights = torch.ones(length)
    if left:
        left = min(left, length)
        rise = torch.linspace(0.0, 1.0, left + 1 if from_zero else left + 2)[:-1]
        weights[:left] *= rise if from_zero else rise[1:]
    if right:
        right = min(right, length)
        weights[-right:] *= torch.linspace(1.0, 0.0, right + 2)[1:-1]
    return weights.clamp_(0, 1)


def time_intervals(latent_frames: int) -> list[Interval]:
    """Tiles along time."""
    size, overlap = FRAMES // TIME_FACTOR, FRAMES_OVERLAP // TIME_FACTOR
    spans = split_causal(latent_frames, max(2, overlap + 1, size), overlap)
    intervals = []
    for s in spans:
        pixel = slice(s.start * TIME_FACTOR, 1 + (s.end - 1) * TIME_FACTOR)
        left = 1 + (s.left - 1) * TIME_FACTOR if s.left else 0
        weights = ramp(pixel.stop - pixel.start, left, s.right * TIME_FACTOR, from_zero=True)
        intervals.append(Interval(slice(s.start, s.end), pixel, weights))
    return intervals


def side_intervals(latent_side: int, latent_long_side: int) -> list[Interval]:
    """Tiles along height or width; `latent_long_side` is the longer of the two."""
    overlap = SIDE_OVERLAP // SPACE_FACTOR
    size = round(LONG_SIDE // SPACE_FACTOR * latent_side / latent_long_side)
    size = max(2, overlap + 1, size)
    intervals = []
    for s in split(latent_side, size, overlap):
        pixel = slice(s.start * SPACE_FACTOR, s.end * SPACE_FACTOR)
        left, right = s.left * SPACE_FACTOR, s.right * SPACE_FACTOR
        weights = ramp(pixel.stop - pixel.start, left, right, from_zero=False)
        intervals.append(Interval(slice(s.start, s.end), pixel, weights))
    return intervals


def sums_to_one(intervals: list[Interval], length: int) -> bool:
    """Whether the tiles' weights add up to 1 at every pixel, so that no divisor is needed."""
    total = torch.zeros(length)
    for interval in intervals:
        total[interval.pixel] += interval.weights
    return torch.allclose(total, torch.ones(length), atol=1e-5, rtol=0.0)
