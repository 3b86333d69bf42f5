"""Decoded frames: tiled decoding, conversion to YUV, and measures of what the pictures show.

Source: docs/ltx-2.3.md#upsampling-and-decoding; `ltx_core/model/video_vae/conv_video_decoder.py` (`tiled_decode`,
`decode_video`) and `ltx_core/color/yuv.py` of the reference v1.2.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ltx_ray.engine.motion import BLOCK, CutCheck, MotionCheck
from ltx_ray.engine.tiling import Interval, Tiling, side_intervals, sums_to_one, time_intervals
from ltx_ray.records import PictureMeasures
from ltx_ray.shapes import SPACE_FACTOR, TIME_FACTOR

#: BT.709, rows Y, Cb, Cr over R, G, B.
_BT709 = ((0.2126, 0.7152, 0.0722), (-0.1146, -0.3854, 0.5), (0.5, -0.4542, -0.0458))
#: A frame is black when this share of its pixels has at most this luma (limited range, where black is 16), and of its
#: chroma samples at most this distance from grey. The rest is room for a logo.
_BLACK_SHARE, _BLACK_LUMA, _BLACK_CHROMA = 0.99, 20, 8
#: Frames that a card measures at once. More would need more memory than the conversion to YUV does. A CPU measures one
#: at a time, which stays in its caches.
_MEASURED_FRAMES = 8


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


class PictureCheck:
    """Measures a clip's frames as they pass, on their device. The same frames give the same numbers on any device."""

    def __init__(self) -> None:
        self._luma = 0.0
        self._pixels = 0
        self._black_frames = 0
        self._sharpness: list[float] = []
        self._motion, self._cuts = MotionCheck(), CutCheck()

    def update(self, frames: torch.Tensor) -> None:
        """Take in the next frames: I420 (f, 3h/2, w) uint8. Their device is waited for once they are all measured."""
        height, width = frames.shape[1] * 2 // 3, frames.shape[2]
        size = 1 if frames.device.type == "cpu" else _MEASURED_FRAMES
        batches = [_measure(batch, height) for batch in frames.split(size)]
        sums = torch.cat([batch[0] for batch in batches], dim=1).cpu().numpy()
        blocks = torch.cat([batch[1] for batch in batches]).cpu().numpy()
        luma, dark, grey, laplacian, laplacian_squares = sums
        pixels, chroma = height * width, frames[0, height:].numel()
        self._luma += float(luma.sum())
        self._pixels += pixels * len(luma)
        self._black_frames += int(((dark >= _BLACK_SHARE * pixels) & (grey >= _BLACK_SHARE * chroma)).sum())
        if inner := max(height - 2, 0) * max(width - 2, 0):
            self._sharpness += (laplacian_squares / inner - np.square(laplacian / inner)).tolist()
        for picture in blocks:
            self._motion.add(picture)
            self._cuts.add(picture)

    def measures(self) -> PictureMeasures:
        """What is known of the frames so far."""
        frames = self._motion.frames
        if not frames:
            return PictureMeasures()
        return PictureMeasures(
            mean_luma=self._luma / self._pixels,
            black_share=self._black_frames / frames,
            motion=float(np.median(self._motion.moved)) if frames > 1 else None,
            still_share=self._motion.longest / frames if frames > 1 else None,
            sharpness=float(np.median(self._sharpness)) if self._sharpness else None,
            cuts=self._cuts.count(),
        )

    def flags(self) -> tuple[str, ...]:
        """What applies of "black" and "frozen" to the frames so far."""
        return self.measures().flags()


def _measure(frames: torch.Tensor, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over each frame, float64 (5, f), and the mean luma of its blocks, float32 (f, rows, columns).

    The sums are: luma, pixels that are dark, chroma samples that are grey, the luma's Laplacian, and its square. All
    are of whole numbers, and so are 64 times the means, so that no order of summation changes them.
    """
    luma, chroma = frames[:, :height], frames[:, height:]
    x = luma.float()
    blocks = F.avg_pool2d(x.unsqueeze(1), BLOCK, ceil_mode=True).squeeze(1)
    laplacian = x[:, 1:-1, 1:-1] * -4
    for neighbour in (x[:, :-2, 1:-1], x[:, 2:, 1:-1], x[:, 1:-1, :-2], x[:, 1:-1, 2:]):
        laplacian += neighbour
    grey = (chroma >= 128 - _BLACK_CHROMA) & (chroma <= 128 + _BLACK_CHROMA)
    counts = [torch.count_nonzero(counted, dim=(1, 2)).double() for counted in (luma <= _BLACK_LUMA, grey)]
    sums = [_sum(x), *counts, _sum(laplacian), _sum(laplacian.square_())]
    return torch.stack(sums), blocks


def _sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over each picture of (f, h, w), float64. Rows come first, which is the quickest on a CPU."""
    return values.sum(2, dtype=torch.float64).sum(1)
