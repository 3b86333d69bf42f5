"""Decoded frames: tiled decoding, conversion to YUV, and checks of what the pictures show.

Source: docs/ltx-2.3.md#upsampling-and-decoding; `ltx_core/model/video_vae/conv_video_decoder.py` (`tiled_decode`,
`decode_video`) and `ltx_core/color/yuv.py` of the reference v1.2.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ltx_ray.engine.tiling import Interval, Tiling, side_intervals, sums_to_one, time_intervals
from ltx_ray.shapes import SPACE_FACTOR, TIME_FACTOR

#: BT.709, rows Y, Cb, Cr over R, G, B.
_BT709 = ((0.2126, 0.7152, 0.0722), (-0.1146, -0.3854, 0.5), (0.5, -0.4542, -0.0458))
#: Luma codes (limited range, where black is 16) below which a clip is flagged as black: of its brightest frame on
#: average, and of its brightest pixel.
_BLACK_MEAN, _BLACK_PEAK = 18.0, 40
#: Mean change between neighbouring frames, in luma codes, below which a clip is flagged as frozen.
_FROZEN_CHANGE = 0.02


def decode_tiled(
    decode: Callable[[torch.Tensor], torch.Tensor], latent: torch.Tensor, tiling: Tiling
) -> Iterator[torch.Tensor]:
    """Frames of `latent` (1, C, F, H, W) as chunks (1, 3, f, h, w) in [-1, 1], in order.

    `decode` returns the pixels of a tile of the latent. The tiles of one interval of time exist at once, so memory does
    not grow with the length of the clip.
    """
    _, _, frames, height, width = latent.shape
    times = time_intervals(frames, tiling)
    rows, columns = (side_intervals(side, max(height, width), tiling) for side in (height, width))
    pixel_size = (height * SPACE_FACTOR, width * SPACE_FACTOR)
    normalised = (
        sums_to_one(times, (frames - 1) * TIME_FACTOR + 1)
        and sums_to_one(rows, pixel_size[0])
        and sums_to_one(columns, pixel_size[1])
    )
    last: _WeightedChunk | None = None
    for time in times:
        chunk = _decode_interval(decode, latent, time, rows, columns, pixel_size, normalised)
        if last is not None:
            last.blend_into(chunk)
            yield last.pixels()[:, :, : chunk.interval.start - last.interval.start]
        last = chunk
    assert last is not None
    yield last.pixels()


@dataclass
class _WeightedChunk:
    """Frames (1, 3, f, h, w) of one interval of time, times their weights, and the weights where not all are 1."""

    interval: slice
    total: torch.Tensor
    weights: torch.Tensor | None

    def blend_into(self, following: _WeightedChunk) -> None:
        """Add up what both have of the frames that overlap, in both."""
        overlap = self.interval.stop - following.interval.start
        if overlap <= 0:
            return
        self.total[:, :, -overlap:] += following.total[:, :, :overlap]
        following.total[:, :, :overlap] = self.total[:, :, -overlap:]
        if self.weights is not None and following.weights is not None:
            self.weights[:, :, -overlap:] += following.weights[:, :, :overlap]
            following.weights[:, :, :overlap] = self.weights[:, :, -overlap:]

    def pixels(self) -> torch.Tensor:
        return self.total if self.weights is None else self.total / self.weights.clamp(min=1e-8)


def _decode_interval(
    decode: Callable[[torch.Tensor], torch.Tensor],
    latent: torch.Tensor,
    time: Interval,
    rows: list[Interval],
    columns: list[Interval],
    pixel_size: tuple[int, int],
    normalised: bool,
) -> _WeightedChunk:
    """All tiles of one interval of time, weighted and added up. `normalised`: the weights add up to 1 everywhere."""
    length = time.pixel.stop - time.pixel.start
    total = torch.zeros((1, 3, length, *pixel_size), device=latent.device, dtype=latent.dtype)
    weights = None if normalised else torch.zeros_like(total)
    for row in rows:
        for column in columns:
            tile = decode(latent[:, :, time.latent, row.latent, column.latent])[:, :, :length]
            region = (slice(None), slice(None), slice(0, tile.shape[2]), row.pixel, column.pixel)
            # Float32 weights promote a bfloat16 tile, so that only the sum is rounded.
            axis_weights = (
                time.weights[: tile.shape[2]].view(-1, 1, 1).to(total.device),
                row.weights.view(1, -1, 1).to(total.device),
                column.weights.view(1, 1, -1).to(total.device),
            )
            single = (len(rows) == 1, len(columns) == 1)
            total[region] += _weighted(tile, axis_weights, single)
            if weights is not None:
                weights[region] += _weighted(torch.ones_like(tile, dtype=torch.float32), axis_weights, single)
    return _WeightedChunk(time.pixel, total, weights)


def _weighted(tile: torch.Tensor, axis_weights: tuple[torch.Tensor, ...], single: tuple[bool, bool]) -> torch.Tensor:
    """The tile times its weights along time, height and width. `single`: one tile covers the height, the width."""
    time, row, column = axis_weights
    out = tile * time
    out = out if single[0] else out * row
    return out if single[1] else out * column


def to_yuv420(chunk: torch.Tensor) -> torch.Tensor:
    """(1, 3, f, h, w) in [-1, 1] -> planar I420 (f, 3h/2, w) uint8: BT.709, limited range, truncated.

    Computed in the chunk's dtype, with no 8-bit RGB in between.
    """
    rgb = chunk[0].movedim(0, 1).add(1.0).mul_(0.5).clamp_(0.0, 1.0)
    matrix = torch.tensor(_BT709, dtype=torch.float32).to(rgb.device, rgb.dtype)
    yuv = (rgb.movedim(1, -1) @ matrix.T).movedim(-1, 1)
    luma = yuv[:, 0] * 219 + 16
    chroma = F.avg_pool2d(yuv[:, 1:].contiguous(), kernel_size=2, stride=2) * 224 + 128
    # Both chroma planes follow the luma plane, in rows of its width.
    packed = torch.cat((luma, chroma.reshape(chroma.shape[0], -1, luma.shape[-1])), dim=1)
    return packed.clamp_(0, 255).to(torch.uint8)


@dataclass
class PictureCheck:
    """Flags clips that are black or frozen, from their frames as they pass."""

    _peak_mean: float = 0.0
    _peak: int = 0
    _largest_change: float = 0.0
    _frames: int = 0
    _last: torch.Tensor | None = None

    def update(self, frames: torch.Tensor) -> None:
        """Take in the next frames: I420 (f, 3h/2, w) uint8. The arithmetic stays on their device."""
        luma = frames[:, : frames.shape[1] * 2 // 3]
        pixels = luma[0].numel()
        sums, changes = [], []
        for picture in luma:
            sums.append(picture.sum(dtype=torch.int64))
            if self._last is not None:
                changes.append((picture.short() - self._last.short()).abs_().sum(dtype=torch.int64))
            self._last = picture
        self._last = luma[-1].clone()  # A view would keep the whole chunk alive.
        self._peak_mean = max(self._peak_mean, *(torch.stack(sums) / pixels).tolist())
        self._peak = max(self._peak, int(luma.max()))
        if changes:
            self._largest_change = max(self._largest_change, *(torch.stack(changes) / pixels).tolist())
        self._frames += len(luma)

    def flags(self) -> tuple[str, ...]:
        """What applies of "black" and "frozen"."""
        found = []
        if self._peak_mean < _BLACK_MEAN and self._peak < _BLACK_PEAK:
            found.append("black")
        if self._frames > 1 and self._largest_change < _FROZEN_CHANGE:
            found.append("frozen")
        return tuple(found)
