"""Decoded frames: tile by tile out of the video VAE, to YUV, and what a look at them tells.

Source: `conv_video_decoder.py` (`tiled_decode`, `decode_video`) and `yuv.py` of the reference v1.2.0.
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
#: Luma codes (limited range: black is 16): a clip whose every frame stays this dark is flagged.
_BLACK_MEAN, _BLACK_PEAK = 18.0, 40
#: Mean change between neighbouring frames, in luma codes, below which a clip stands still.
_FROZEN_CHANGE = 0.02


def decode_tiled(
    decode: Callable[[torch.Tensor], torch.Tensor], latent: torch.Tensor, tiling: Tiling
) -> Iterator[torch.Tensor]:
    """Frames of `latent` (1, C, F, H, W) as chunks (1, 3, f, h, w) in [-1, 1], in order.

    `decode` turns a tile of the latent into its pixels. Only one group of tiles is held at a time, so
    memory does not grow with the length of the clip.
    """
    _, _, frames, height, width = latent.shape
    times = time_intervals(frames, tiling)
    rows, columns = (side_intervals(side, max(height, width), tiling) for side in (height, width))
    pixel_size = (height * SPACE_FACTOR, width * SPACE_FACTOR)
    even = (
        sums_to_one(times, (frames - 1) * TIME_FACTOR + 1)
        and sums_to_one(rows, pixel_size[0])
        and sums_to_one(columns, pixel_size[1])
    )
    held: torch.Tensor | None = None
    held_weights: torch.Tensor | None = None
    held_at = slice(0, 0)
    for time in times:
        chunk, weights = _decode_group(decode, latent, time, rows, columns, pixel_size, even)
        if held is not None:
            overlap = held_at.stop - time.pixel.start
            if overlap > 0:
                held[:, :, -overlap:] += chunk[:, :, :overlap]
                chunk[:, :, :overlap] = held[:, :, -overlap:]
                if weights is not None:
                    held_weights[:, :, -overlap:] += weights[:, :, :overlap]
                    weights[:, :, :overlap] = held_weights[:, :, -overlap:]
            finished = time.pixel.start - held_at.start
            yield _divided(held, held_weights)[:, :, :finished]
        held, held_weights, held_at = chunk, weights, time.pixel
    yield _divided(held, held_weights)


def _decode_group(
    decode: Callable[[torch.Tensor], torch.Tensor],
    latent: torch.Tensor,
    time: Interval,
    rows: list[Interval],
    columns: list[Interval],
    pixel_size: tuple[int, int],
    even: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All tiles of one stretch of time, weighted and added up, and the sum of their weights if it is not 1."""
    length = time.pixel.stop - time.pixel.start
    chunk = torch.zeros((1, 3, length, *pixel_size), device=latent.device, dtype=latent.dtype)
    total = None if even else torch.zeros_like(chunk)
    for row in rows:
        for column in columns:
            tile = decode(latent[:, :, time.latent, row.latent, column.latent])[:, :, :length]
            region = (slice(None), slice(None), slice(0, tile.shape[2]), row.pixel, column.pixel)
            # float32 weights lift a bf16 tile; only the sum is rounded
            weighting = (
                time.weights[: tile.shape[2]].view(-1, 1, 1).to(chunk.device),
                row.weights.view(1, -1, 1).to(chunk.device),
                column.weights.view(1, 1, -1).to(chunk.device),
            )
            single = (len(rows) == 1, len(columns) == 1)
            chunk[region] += _weighted(tile, weighting, single)
            if total is not None:
                total[region] += _weighted(torch.ones_like(tile, dtype=torch.float32), weighting, single)
    return chunk, total


def _weighted(tile: torch.Tensor, weighting: tuple[torch.Tensor, ...], single: tuple[bool, bool]) -> torch.Tensor:
    time, row, column = weighting
    out = tile * time
    out = out if single[0] else out * row
    return out if single[1] else out * column


def _divided(chunk: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return chunk if weights is None else chunk / weights.clamp(min=1e-8)


def to_yuv420(chunk: torch.Tensor) -> torch.Tensor:
    """(1, 3, f, h, w) in [-1, 1] -> planar I420 bytes (f, 3h/2, w): BT.709, limited range, truncated.

    In the chunk's own dtype, with no 8-bit RGB in between.
    """
    rgb = chunk[0].movedim(0, 1).add(1.0).mul_(0.5).clamp_(0.0, 1.0)
    matrix = torch.tensor(_BT709, dtype=torch.float32).to(rgb.device, rgb.dtype)
    yuv = (rgb.movedim(1, -1) @ matrix.T).movedim(-1, 1)
    luma = yuv[:, 0] * 219 + 16
    chroma = F.avg_pool2d(yuv[:, 1:].contiguous(), kernel_size=2, stride=2) * 224 + 128
    # both chroma planes lie behind the luma, row after row of the full width
    packed = torch.cat((luma, chroma.reshape(chroma.shape[0], -1, luma.shape[-1])), dim=1)
    return packed.clamp_(0, 255).to(torch.uint8)


@dataclass
class PictureCheck:
    """Looks at frames as they pass and says what is suspicious about the clip."""

    _brightest_mean: float = 0.0
    _brightest: int = 0
    _change: float = 0.0
    _frames: int = 0
    _previous: torch.Tensor | None = None

    def see(self, frames: torch.Tensor) -> None:
        """`frames`: I420 bytes (f, 3h/2, w), looked at where they are."""
        luma = frames[:, : frames.shape[1] * 2 // 3]
        pixels = luma[0].numel()
        sums, changes = [], []
        for picture in luma:
            sums.append(picture.sum(dtype=torch.int64))
            if self._previous is not None:
                changes.append((picture.short() - self._previous.short()).abs_().sum(dtype=torch.int64))
            self._previous = picture
        self._previous = luma[-1].clone()  # and not the whole chunk with it
        self._brightest_mean = max(self._brightest_mean, *(torch.stack(sums) / pixels).tolist())
        self._brightest = max(self._brightest, int(luma.max()))
        if changes:
            self._change = max(self._change, *(torch.stack(changes) / pixels).tolist())
        self._frames += len(luma)

    def flags(self) -> tuple[str, ...]:
        """ "black" and/or "frozen"."""
        found = []
        if self._brightest_mean < _BLACK_MEAN and self._brightest < _BLACK_PEAK:
            found.append("black")
        if self._frames > 1 and self._change < _FROZEN_CHANGE:
            found.append("frozen")
        return tuple(found)
