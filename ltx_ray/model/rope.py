"""Where tokens sit in time and space, and the rotary tables that say so to attention.

Positions are seconds (time) and pixels (height, width), each token an interval [start, end) of which
the middle counts. Split layout: the two halves of a head's channels are the pair that turns.
Source: `rope.py`, `patchifiers.py` and `tools.py` of the reference v1.2.0; positions stay float32.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

from ltx_ray.shapes import SPACE_FACTOR, TIME_FACTOR, ClipShape

_AUDIO_HOP_SECONDS = (160, 16000)
_AUDIO_FACTOR = 4


@dataclass(frozen=True)
class RopeTable:
    """cos and sin, each (B, heads, T, head_dim / 2), in the latents' dtype."""

    cos: torch.Tensor
    sin: torch.Tensor


def video_positions(shape: ClipShape, device: torch.device | str = "cpu") -> torch.Tensor:
    """Token intervals of a video latent, packed order (f h w): (1, 3, F*H*W, 2) float32.

    The causal encoder gives the first latent frame one pixel frame and every other eight, so all
    later ones are shifted by seven frames.
    """
    axes = (shape.latent_frames, shape.latent_height, shape.latent_width)
    starts = torch.stack(torch.meshgrid(*(torch.arange(n, device=device) for n in axes), indexing="ij"))
    bounds = torch.stack((starts, starts + 1), dim=-1).flatten(1, 3)
    scale = torch.tensor((TIME_FACTOR, SPACE_FACTOR, SPACE_FACTOR), device=device).view(3, 1, 1)
    pixels = bounds * scale
    pixels[0] = (pixels[0] + 1 - TIME_FACTOR).clamp(min=0)
    positions = pixels.float()
    positions[0] = positions[0] / shape.frame_rate
    return positions[None]


def audio_positions(length: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Token intervals of an audio latent of `length`, in seconds: (1, 1, T, 2) float32."""

    def seconds(first: int) -> torch.Tensor:
        latents = torch.arange(first, first + length, dtype=torch.float32, device=device)
        mel_frames = (latents * _AUDIO_FACTOR + 1 - _AUDIO_FACTOR).clip(min=0)
        return mel_frames * _AUDIO_HOP_SECONDS[0] / _AUDIO_HOP_SECONDS[1]

    return torch.stack((seconds(0), seconds(1)), dim=-1)[None, None]


@functools.lru_cache(maxsize=16)
def _frequencies(theta: float, axes: int, dim: int, float64: bool) -> torch.Tensor:
    """pi/2 * theta^i for i evenly from 0 to 1, `dim / (2 * axes)` of them, float32."""
    count = dim // (2 * axes)
    if float64:
        exponents = np.linspace(0.0, np.log(theta) / np.log(theta), count, dtype=np.float64)
        return torch.from_numpy(np.power(theta, exponents) * math.pi / 2).float()
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

    Channels that the axes do not fill evenly come first and do not turn. `head_slice` keeps the
    heads of one rank.
    """
    frequencies = _frequencies(theta, positions.shape[1], dim, float64).to(positions.device)
    middles = (positions[..., 0] + positions[..., 1]) / 2.0
    fractions = torch.stack([middles[:, i] / limit for i, limit in enumerate(max_pos)], dim=-1)
    angles = (frequencies * (fractions.unsqueeze(-1) * 2 - 1)).transpose(-1, -2).flatten(2)
    cos, sin = angles.cos(), angles.sin()
    still = dim // 2 - angles.shape[-1]
    if still:
        cos = torch.cat((torch.ones_like(cos[..., :still]), cos), dim=-1)
        sin = torch.cat((torch.zeros_like(sin[..., :still]), sin), dim=-1)

    def by_head(table: torch.Tensor) -> torch.Tensor:
        return table.unflatten(-1, (heads, -1)).transpose(1, 2)[:, head_slice].to(dtype).contiguous()

    return RopeTable(by_head(cos), by_head(sin))


def rotate(x: torch.Tensor, table: RopeTable) -> torch.Tensor:
    """Turn `x` (B, heads, T, head_dim) by the table: (a, b) -> (a cos - b sin, b cos + a sin)."""
    first, second = x.unflatten(-1, (2, -1)).unbind(-2)
    # products are rounded to the dtype before the sum, as the reference's in-place addcmul has it
    return torch.cat(
        (
            (first * table.cos).addcmul_(-table.sin, second),
            (second * table.cos).addcmul_(table.sin, first),
        ),
        dim=-1,
    )
