"""What happens between the video decoder's convolutions, in one pass over the data: sums, norm, activation, padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class ConvSum:
    """What a convolution left to be summed: y + bias + x, whose channels are then moved to time, height and width.

    y (B, C s, F, H, W), where s is the product of `factors`; bias (C s,); x (B, C, F, H, W), only where s is 1. The sum
    stands for a tensor (B, C, F', H', W') whose axes are longer by their factors, without the first factor - 1 frames.
    Channel c of it comes from the channels c * s + (t * f_h + h) * f_w + w of y, where f_h and f_w are the factors of
    height and width. With `width_first`, h and w change places there.
    """

    y: torch.Tensor
    bias: torch.Tensor | None = None
    x: torch.Tensor | None = None
    factors: tuple[int, int, int] = (1, 1, 1)
    width_first: bool = False


@dataclass(frozen=True)
class SumOutputs:
    """What is made of a sum whose tensors have the memory format `layout`.

    sum_layout: the memory format in which the sum itself is returned, rounded, or None. pads: how often the first and
    the last frame are repeated before and after the input of the next convolution, None when there is none. eps: that
    input also gets an RMS norm over the channels and SiLU.
    """

    layout: torch.memory_format
    sum_layout: torch.memory_format | None = None
    pads: tuple[int, int] | None = None
    eps: float | None = None


FinishSum = Callable[[ConvSum, SumOutputs], tuple[torch.Tensor | None, torch.Tensor | None]]


def finish_sum(total: ConvSum, outputs: SumOutputs) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(the sum, the input of the next convolution), None for what `outputs` does not ask for.

    Computed in float32 and rounded once. An implementation may write the sum into y.
    """
    sum32 = total.y.float()
    if total.bias is not None:
        sum32 = sum32 + total.bias.float().view(1, -1, 1, 1, 1)
    if total.x is not None:
        sum32 = sum32 + total.x.float()
    s_t, s_h, s_w = total.factors
    if total.width_first:
        sum32 = sum32.unflatten(1, (-1, s_t, s_w, s_h)).transpose(3, 4)
    else:
        sum32 = sum32.unflatten(1, (-1, s_t, s_h, s_w))
    sum32 = sum32.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, s_t - 1 :]
    sum_out = sum32.to(total.y.dtype).contiguous(memory_format=outputs.sum_layout) if outputs.sum_layout else None
    if outputs.pads is None:
        return sum_out, None
    if outputs.eps is not None:
        sum32 = F.silu(sum32 * torch.rsqrt(sum32.square().mean(1, keepdim=True) + outputs.eps))
    before, after = outputs.pads
    first, last = sum32[:, :, :1].expand(-1, -1, before, -1, -1), sum32[:, :, -1:].expand(-1, -1, after, -1, -1)
    padded = torch.cat((first, sum32, last), dim=2)
    return sum_out, padded.to(total.y.dtype).contiguous(memory_format=outputs.layout)
