"""The steps between the video decoder's convolutions: norm, activation, padding and sums in one pass over the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class ConvSum:
    """What a convolution left to be added up: y + bias + x, then its channels spread over time, height and width.

    y (B, C s, F, H, W), where s is the product of `factors`; bias (C s,); x (B, C, F, H, W), only where s is 1. As
    a whole it stands for (B, C, F', H', W'), each axis its factor longer, less the factor - 1 first frames. A channel
    of y is c * s + (t * height's factor + h) * width's factor + w; `width_first`: with h and w the other way round.
    """

    y: torch.Tensor
    bias: torch.Tensor | None = None
    x: torch.Tensor | None = None
    factors: tuple[int, int, int] = (1, 1, 1)
    width_first: bool = False


@dataclass(frozen=True)
class SumOutputs:
    """What is to become of a sum whose tensors lie in `layout`.

    keep: the layout in which it is wanted itself, rounded. pads: wanted for a convolution, the first and the last
    frame repeated so often before and after it. eps: in that also RMS norm over the channels, then SiLU.
    """

    layout: torch.memory_format
    keep: torch.memory_format | None = None
    pads: tuple[int, int] | None = None
    eps: float | None = None


FinishSum = Callable[[ConvSum, SumOutputs], tuple[torch.Tensor | None, torch.Tensor | None]]


def finish_sum(total: ConvSum, wanted: SumOutputs) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(the sum, what the convolution takes), None for what is not wanted. The kernel may write the sum into y."""
    wide = total.y.float()
    if total.bias is not None:
        wide = wide + total.bias.float().view(1, -1, 1, 1, 1)
    if total.x is not None:
        wide = wide + total.x.float()
    s_t, s_h, s_w = total.factors
    if total.width_first:
        wide = wide.unflatten(1, (-1, s_t, s_w, s_h)).transpose(3, 4)
    else:
        wide = wide.unflatten(1, (-1, s_t, s_h, s_w))
    wide = wide.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, s_t - 1 :]
    kept = wide.to(total.y.dtype).contiguous(memory_format=wanted.keep) if wanted.keep else None
    if wanted.pads is None:
        return kept, None
    if wanted.eps is not None:
        wide = F.silu(wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + wanted.eps))
    lead, tail = wanted.pads
    first, last = wide[:, :, :1].expand(-1, -1, lead, -1, -1), wide[:, :, -1:].expand(-1, -1, tail, -1, -1)
    padded = torch.cat((first, wide, last), dim=2)
    return kept, padded.to(total.y.dtype).contiguous(memory_format=wanted.layout)
