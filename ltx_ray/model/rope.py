"""Positions of tokens in time and space, and the rotary tables made of them.

A token covers an interval [start, end) on every axis, in seconds (time) or pixels (height, width), whose middle counts.
The two halves of a head's channels are the pairs that rotate (split layout). Rotary embeddings: arXiv:2104.09864.
Source: docs/ltx-2.3.md#positions-and-rope; `ltx_core/model/transformer/rope.py`, `ltx_core/components/patchifiers.py`
and `ltx_core/tools.py` of the reference v1.2.0.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

from ltx_ray.shapes import SPACE_FACTOR, TIME_FACTOR, ClipShape

#: Seconds of a mel frame, as a quotient: hop in samples over samples a second.
_MEL_HOP, _MEL_SAMPLE_RATE = 160, 16000
#: Mel frames of an audio latent.
_MEL_FRAMES_PER_LATENT = 4


@dataclass(frozen=True)
class RopeTable:
    """cos and sin, each (B, heads, T, head_dim / 2), in the latents' dtype."""

    cos: torch.Tensor
    sin: torch.Tensor


def video_positions(shape: ClipShape, device: torch.device | str = "cpu") -> torch.Tensor:
    """Intervals of a video latent's tokens in packed order (f h w): (1, 3, F*H*W, 2) float32, seconds and pixels.

    The causal encoder makes the first latent frame of one pixel frame and every other of eight, so all later ones
    start seven frames earlier.
    """
    sizes = (shape.latent_frames, shape.latent_height, shape.latent_width)
    starts = torch.stack(torch.meshgrid(*(torch.arange(n, device=device) for n in sizes), indexing="ij"))
    intervals = torch.stack((starts, starts + 1), dim=-1).flatten(1, 3)
    scale = torch.tensor((TIME_FACTOR, SPACE_FACTOR, SPACE_FACTOR), device=device).view(3, 1, 1)
    pixels = intervals * scale
    pixels[0] = (pixels[0] + 1 - TIME_FACTOR).clamp(min=0)
    positions = pixels.float()
    positions[0] = positions[0] / shape.frame_rate
    return positions[None]


def audio_positions(length: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Intervals of the tokens of an audio latent of `length`: (1, 1, T, 2) float32, in seconds."""

    def seconds(first: int) -> torch.Tensor:
        latents = torch.arange(first, first + length, dtype=torch.float32, device=device)
        mel_frames = (latents * _MEL_FRAMES_PER_LATENT + 1 - _MEL_FRAMES_PER_LATENT).clip(min=0)
        return mel_frames * _MEL_HOP / _MEL_SAMPLE_RATE

    return torch.stack((seconds(0), seconds(1)), dim=-1)[None, None]


@functools.lru_cache(maxsize=16)
def _frequencies(theta: float, axes: int, dim: int, float64: bool) -> torch.Tensor:
    """theta^(i / (n - 1)) * pi / 2 for i from 0 to n - 1, n = dim / (2 axes): (n,) float32.

    `float64` is the precision in which they are computed before they are rounded.
    """
    count = dim // (2 * axes)
    if float64:
        exponents64 = np.linspace(0.0, np.log(theta) / np.log(theta), count, dtype=np.float64)
        return torch.from_numpy(np.power(theta, exponents64) * math.pi / 2).float()
    exponents = torch.linspace(0.0, math.log(theta, theta), count, dtype=torch.float32)
    return theta**exponents * math.pi / 2


def rope_table(
    positions: torch.Tensor,
    *,
    dim: int,
    heads: int,
    max_pos: tuple[int, ...],
    theta: float,
    float64: bool,
    dtype: torch.dtype,
    head_slice: slice = slice(None),
) -> RopeTable:
    """Rotary table for `positions` (B, axes, T, 2) over `dim` channels in `heads` heads.

    `max_pos` is the limit of every axis in the unit of the positions. Pairs of channels that the axes do not fill come
    first and do not rotate. `head_slice` keeps the heads of one rank.
    """
    frequencies = _frequencies(theta, positions.shape[1], dim, float64).to(positions.device)
    middles = (positions[..., 0] + positions[..., 1]) / 2.0
    fractions = torch.stack([axis / limit for axis, limit in zip(middles.unbind(1), max_pos, strict=True)], dim=-1)
    angles = (frequencies * (fractions.unsqueeze(-1) * 2 - 1)).transpose(-1, -2).flatten(2)
    cos, sin = angles.cos(), angles.sin()
    unrotated = dim // 2 - angles.shape[-1]
    if unrotated:
        cos = torch.cat((torch.ones_like(cos[..., :unrotated]), cos), dim=-1)
        sin = torch.cat((torch.zeros_like(sin[..., :unrotated]), sin), dim=-1)

    def by_head(table: torch.Tensor) -> torch.Tensor:
        return table.unflatten(-1, (heads, -1)).transpose(1, 2)[:, head_slice].to(dtype).contiguous()

    return RopeTable(by_head(cos), by_head(sin))


def rotate(x: torch.Tensor, table: RopeTable) -> torch.Tensor:
    """Rotate the pairs (a, b) of `x` (B, heads, T, head_dim) to (a cos - b sin, b cos + a sin)."""
    first, second = x.unflatten(-1, (2, -1)).unbind(-2)
    # The first product is rounded to the dtype before the second is added, as by the reference's in-place addcmul.
    return torch.cat(
        (
            (first * table.cos).addcmul_(-table.sin, second),
            (second * table.cos).addcmul_(table.sin, first),
        ),
        dim=-1,
    )
