"""How the video decoder's work is cut into overlapping tiles and blended.

Source: docs/ltx-2.3.md#upsampling-and-decoding; `ltx_core/tiling.py`, `ltx_core/model/video_vae/video_vae.py` and
`ltx_pipelines/utils/helpers.py` of the reference v1.2.0, whose automatic tiles for the convolutional decoder are the
first of LADDER. The others are ours, for when memory does not suffice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ltx_ray.shapes import SPACE_FACTOR, TIME_FACTOR


@dataclass(frozen=True)
class Tiling:
    """Sizes of tiles and of their overlaps, in pixels and frames.

    `long_side` is that of the clip's longer side. The other side is in proportion.
    """

    long_side: int
    side_overlap: int
    frames: int
    frames_overlap: int


#: From the reference's tiles to smaller ones. Shorter tiles come first, because fewer whole frames then exist at once.
#: Beyond the last rung, those frames take more memory than the tiles.
LADDER = (
    Tiling(768, 64, 80, 24),
    Tiling(768, 64, 40, 16),
    Tiling(768, 64, 24, 8),
    Tiling(512, 64, 24, 8),
    Tiling(384, 64, 24, 8),
)


@dataclass(frozen=True)
class Interval:
    """One tile along one axis: latent range, pixel range, and the weight of each pixel in it."""

    latent: slice
    pixel: slice
    weights: torch.Tensor


@dataclass(frozen=True)
class Span:
    """A range of latents, and the lengths over which it fades into the neighbours on its left and right."""

    start: int
    end: int
    left: int
    right: int


def split(length: int, size: int, overlap: int) -> list[Span]:
    """Cut `length` into ranges of `size` that overlap by `overlap`. The last one may be shorter."""
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
    """`split` along time. Later tiles start one latent frame early, because their first one decodes to one frame."""
    first, *rest = split(length, size, overlap)
    return [first, *(Span(s.start - 1, s.end, s.left + 1, s.right) for s in rest)]


def ramp(length: int, left: int, right: int, from_zero: bool) -> torch.Tensor:
    """Weights (length,) that rise over `left` and fall over `right` pixels. `from_zero`: the first weight is 0."""
    weights = torch.ones(length)
    if left:
        left = min(left, length)
        rise = torch.linspace(0.0, 1.0, left + 1 if from_zero else left + 2)[:-1]
        weights[:left] *= rise if from_zero else rise[1:]
    if right:
        right = min(right, length)
        weights[-right:] *= torch.linspace(1.0, 0.0, right + 2)[1:-1]
    return weights.clamp_(0, 1)


def time_intervals(latent_frames: int, tiling: Tiling) -> list[Interval]:
    """Tiles along the time of a latent of `latent_frames`."""
    size, overlap = tiling.frames // TIME_FACTOR, tiling.frames_overlap // TIME_FACTOR
    spans = split_causal(latent_frames, max(2, overlap + 1, size), overlap)
    intervals = []
    for s in spans:
        pixel = slice(s.start * TIME_FACTOR, 1 + (s.end - 1) * TIME_FACTOR)
        left = 1 + (s.left - 1) * TIME_FACTOR if s.left else 0
        weights = ramp(pixel.stop - pixel.start, left, s.right * TIME_FACTOR, from_zero=True)
        intervals.append(Interval(slice(s.start, s.end), pixel, weights))
    return intervals


def side_intervals(latent_side: int, latent_long_side: int, tiling: Tiling) -> list[Interval]:
    """Tiles along height or width; `latent_long_side` is the longer of the two."""
    overlap = tiling.side_overlap // SPACE_FACTOR
    size = round(tiling.long_side // SPACE_FACTOR * latent_side / latent_long_side)
    size = max(2, overlap + 1, size)
    intervals = []
    for s in split(latent_side, size, overlap):
        pixel = slice(s.start * SPACE_FACTOR, s.end * SPACE_FACTOR)
        left, right = s.left * SPACE_FACTOR, s.right * SPACE_FACTOR
        weights = ramp(pixel.stop - pixel.start, left, right, from_zero=False)
        intervals.append(Interval(slice(s.start, s.end), pixel, weights))
    return intervals


def sums_to_one(intervals: list[Interval], length: int) -> bool:
    """Whether the tiles' weights add up to 1 at every one of `length` pixels, so that no division is needed."""
    total = torch.zeros(length)
    for interval in intervals:
        total[interval.pixel] += interval.weights
    return torch.allclose(total, torch.ones(length), atol=1e-5, rtol=0.0)


def distinct_rungs(latent_size: Sequence[int]) -> list[int]:
    """The rungs of LADDER that cut a latent (F, H, W) in another way than the rung before, and the first one."""
    frames, height, width = latent_size

    def cut(tiling: Tiling) -> list[list[slice]]:
        sides = (side_intervals(side, max(height, width), tiling) for side in (height, width))
        return [[i.latent for i in intervals] for intervals in (time_intervals(frames, tiling), *sides)]

    cuts = [cut(tiling) for tiling in LADDER]
    return [rung for rung in range(len(LADDER)) if rung == 0 or cuts[rung] != cuts[rung - 1]]
