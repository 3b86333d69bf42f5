"""`decode_steps.finish_sum` as a Triton kernel: all channels of some pixels at a time.

A program takes pixels of one frame of y. They fit in its registers with all their channels, so the norm needs no
second read, and what repeats the first or last frame is written along with it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ltx_ray.engine.decode_steps import ConvSum, SumOutputs

#: Numbers that a program holds at least, which also gives each thread its own: the sum may go where y was.
_TILE = 4096


@triton.jit
def _place(batch, frame, pixel, channel, frames, area, CHANNELS: tl.constexpr, LAST: tl.constexpr):
    """The offset in a tensor of (B, CHANNELS, frames, area), where channels lie last or not."""
    if LAST:
        return ((batch * frames + frame) * area + pixel) * CHANNELS + channel
    return ((batch * CHANNELS + channel) * frames + frame) * area + pixel


@triton.jit(do_not_specialize=["frames", "height", "width"])
def _finish_sum_kernel(
    y, bias, x, kept, padded, frames, height, width, eps,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr, S_T: tl.constexpr, S_H: tl.constexpr,
    S_W: tl.constexpr, WIDTH_FIRST: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, KEEP: tl.constexpr,
    PAD: tl.constexpr, LEAD: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr, LAST: tl.constexpr,
    KEEP_LAST: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = S_T * S_H * S_W
    frame = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    area = tl.multiple_of(height * width, ALIGN)
    # a row of the tile is a pixel of the sum: one of the S that lie in a pixel of y
    row = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    pixel = row // S
    sub = row % S
    channel = tl.arange(0, BLOCK_C)[None, :]
    inside = (pixel < area)[:, None] & (channel < CHANNELS)
    part = channel * S + sub[:, None]
    wide = tl.load(y + _place(batch, frame, pixel[:, None], part, frames, area, CHANNELS * S, LAST), mask=inside,
                   other=0.0).to(tl.float32)  # fmt: skip
    if BIAS:
        wide += tl.load(bias + part, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        wide += tl.load(x + _place(batch, frame, pixel[:, None], part, frames, area, CHANNELS, LAST), mask=inside,
                        other=0.0).to(tl.float32)  # fmt: skip

    if S == 1:
        out_frames, out_area = frames, area
        out_frame, out_pixel = tl.zeros_like(pixel) + frame, pixel
    else:
        out_frames, out_area = frames * S_T - (S_T - 1), area * (S_H * S_W)
        out_frame = frame * S_T + sub // (S_H * S_W) - (S_T - 1)
        if WIDTH_FIRST:
            h, w = sub % S_H, sub // S_H % S_W
        else:
            h, w = sub // S_W % S_H, sub % S_W
        out_pixel = (pixel // width * S_H + h) * (width * S_W) + pixel % width * S_W + w
        inside = inside & (out_frame >= 0)[:, None]
    out_frame, out_pixel = out_frame[:, None], out_pixel[:, None]

    if KEEP:
        at = _place(batch, out_frame, out_pixel, channel, out_frames, out_area, CHANNELS, KEEP_LAST)
        tl.store(kept + at, wide.to(kept.dtype.element_ty), mask=inside)
    if PAD:
        if NORM:
            wide *= tl.rsqrt(tl.sum(wide * wide, axis=1) / CHANNELS + eps)[:, None]
            wide *= tl.sigmoid(wide)
        value = wide.to(padded.dtype.element_ty)
        pad_frames = out_frames + (LEAD + TAIL)
        at = _place(batch, out_frame + LEAD, out_pixel, channel, pad_frames, out_area, CHANNELS, LAST)
        tl.store(padded + at, value, mask=inside)
        step = out_area * CHANNELS if LAST else out_area
        if frame == 0:
            for n in tl.static_range(LEAD):
                tl.store(padded + at - (n + 1) * step, value, mask=inside & (out_frame == 0))
        if frame == frames - 1:
            for n in tl.static_range(TAIL):
                tl.store(padded + at + (n + 1) * step, value, mask=inside & (out_frame == out_frames - 1))


def finish_sum(total: ConvSum, wanted: SumOutputs) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """As `decode_steps.finish_sum`. The sum takes y's place in memory where its channels are not spread."""
    y, x, spread = total.y, total.x, math.prod(total.factors)
    batch, channels, frames, height, width = y.shape
    channels //= spread
    last = wanted.layout == torch.channels_last_3d
    for tensor in (y, y if x is None else x):
        assert tensor.is_contiguous(memory_format=wanted.layout), (tensor.shape, tensor.stride())
    assert x is None or (x.shape == y.shape and spread == 1), (x.shape, y.shape)

    s_t, s_h, s_w = total.factors
    size = (batch, channels, frames * s_t - (s_t - 1), height * s_h, width * s_w)
    kept = padded = None
    if wanted.keep is not None:
        in_place = spread == 1 and wanted.keep == wanted.layout
        kept = y if in_place else torch.empty(size, dtype=y.dtype, device=y.device, memory_format=wanted.keep)
    lead, tail = wanted.pads or (0, 0)
    if wanted.pads is not None:
        size = (*size[:2], size[2] + lead + tail, *size[3:])
        padded = torch.empty(size, dtype=y.dtype, device=y.device, memory_format=wanted.layout)

    block_c = triton.next_power_of_2(channels)
    # rows that are whole sectors, where pixels lie side by side
    least = 1 if last else 16
    block_q = max(_TILE // block_c, least, triton.next_power_of_2(spread))
    _finish_sum_kernel[(triton.cdiv(height * width * spread, block_q), frames, batch)](
        y, y if total.bias is None else total.bias, y if x is None else x,
        y if kept is None else kept, y if padded is None else padded,
        frames, height, width, 0.0 if wanted.eps is None else wanted.eps,
        CHANNELS=channels, BLOCK_C=block_c, BLOCK_Q=block_q, S_T=s_t, S_H=s_h, S_W=s_w,
        WIDTH_FIRST=total.width_first, BIAS=total.bias is not None, RESIDUAL=x is not None, KEEP=kept is not None,
        PAD=padded is not None, LEAD=lead, TAIL=tail, NORM=wanted.eps is not None, LAST=last,
        KEEP_LAST=wanted.keep == torch.channels_last_3d,
        ALIGN=16 if not last and height * width % 16 == 0 else 1, num_warps=8 if block_c * block_q > _TILE else 4,
    )  # fmt: skip
    return kept, padded
