"""`decode_steps.finish_sum` as a Triton kernel.

A program takes pixels of one frame of y with all of their channels. They fit in its registers, so the norm needs no
second read. Repetitions of the first and last frame are written along with the frame itself.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ltx_ray.engine.decode_steps import ConvSum, SumOutputs

#: Values that a program holds at least. Every thread then has some of its own, so the sum may be written into y.
_TILE = 4096


@triton.jit
def _offset(batch, frame, pixel, channel, frames, area, CHANNELS: tl.constexpr, LAST: tl.constexpr):
    """The offset in a tensor (B, CHANNELS, frames, area), whose channels are last in memory with LAST."""
    if LAST:
        return ((batch * frames + frame) * area + pixel) * CHANNELS + channel
    return ((batch * CHANNELS + channel) * frames + frame) * area + pixel


@triton.jit(do_not_specialize=["frames", "height", "width"])
def _finish_sum_kernel(
    y, bias, x, sum_out, padded, frames, height, width, eps,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr, S_T: tl.constexpr, S_H: tl.constexpr,
    S_W: tl.constexpr, WIDTH_FIRST: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, WRITE_SUM: tl.constexpr,
    PAD: tl.constexpr, LEAD: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr, LAST: tl.constexpr,
    SUM_LAST: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = S_T * S_H * S_W
    frame = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    area = tl.multiple_of(height * width, ALIGN)
    # A row of the tile is a pixel of the sum, S of which come from one pixel of y.
    row = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    pixel = row // S
    sub = row % S
    channel = tl.arange(0, BLOCK_C)[None, :]
    in_frame = (pixel < area)[:, None] & (channel < CHANNELS)
    part = channel * S + sub[:, None]
    sum32 = tl.load(y + _offset(batch, frame, pixel[:, None], part, frames, area, CHANNELS * S, LAST), mask=in_frame,
                   other=0.0).to(tl.float32)  # fmt: skip
    if BIAS:
        sum32 += tl.load(bias + part, mask=in_frame, other=0.0).to(tl.float32)
    if RESIDUAL:
        sum32 += tl.load(x + _offset(batch, frame, pixel[:, None], part, frames, area, CHANNELS, LAST), mask=in_frame,
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
        in_frame = in_frame & (out_frame >= 0)[:, None]
    out_frame, out_pixel = out_frame[:, None], out_pixel[:, None]

    if WRITE_SUM:
        at = _offset(batch, out_frame, out_pixel, channel, out_frames, out_area, CHANNELS, SUM_LAST)
        tl.store(sum_out + at, sum32.to(sum_out.dtype.element_ty), mask=in_frame)
    if PAD:
        if NORM:
            sum32 *= tl.rsqrt(tl.sum(sum32 * sum32, axis=1) / CHANNELS + eps)[:, None]
            sum32 *= tl.sigmoid(sum32)
        value = sum32.to(padded.dtype.element_ty)
        pad_frames = out_frames + (LEAD + TAIL)
        at = _offset(batch, out_frame + LEAD, out_pixel, channel, pad_frames, out_area, CHANNELS, LAST)
        tl.store(padded + at, value, mask=in_frame)
        step = out_area * CHANNELS if LAST else out_area
        if frame == 0:
            for n in tl.static_range(LEAD):
                tl.store(padded + at - (n + 1) * step, value, mask=in_frame & (out_frame == 0))
        if frame == frames - 1:
            for n in tl.static_range(TAIL):
                tl.store(padded + at + (n + 1) * step, value, mask=in_frame & (out_frame == out_frames - 1))


def finish_sum(total: ConvSum, outputs: SumOutputs) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Do as `decode_steps.finish_sum`. The sum is written into y where no channels are moved."""
    y, x, expansion = total.y, total.x, math.prod(total.factors)
    batch, channels, frames, height, width = y.shape
    channels //= expansion
    last = outputs.layout == torch.channels_last_3d
    for tensor in (y, y if x is None else x):
        assert tensor.is_contiguous(memory_format=outputs.layout), (tensor.shape, tensor.stride())
    assert x is None or (x.shape == y.shape and expansion == 1), (x.shape, y.shape)

    s_t, s_h, s_w = total.factors
    size = (batch, channels, frames * s_t - (s_t - 1), height * s_h, width * s_w)
    sum_out = padded = None
    if outputs.sum_layout is not None:
        in_place = expansion == 1 and outputs.sum_layout == outputs.layout
        sum_out = y if in_place else torch.empty(size, dtype=y.dtype, device=y.device, memory_format=outputs.sum_layout)
    lead, tail = outputs.pads or (0, 0)
    if outputs.pads is not None:
        size = (*size[:2], size[2] + lead + tail, *size[3:])
        padded = torch.empty(size, dtype=y.dtype, device=y.device, memory_format=outputs.layout)

    block_c = triton.next_power_of_2(channels)
    # Where pixels are contiguous, rows are whole sectors of memory.
    min_rows = 1 if last else 16
    block_q = max(_TILE // block_c, min_rows, triton.next_power_of_2(expansion))
    _finish_sum_kernel[(triton.cdiv(height * width * expansion, block_q), frames, batch)](
        y, y if total.bias is None else total.bias, y if x is None else x,
        y if sum_out is None else sum_out, y if padded is None else padded,
        frames, height, width, 0.0 if outputs.eps is None else outputs.eps,
        CHANNELS=channels, BLOCK_C=block_c, BLOCK_Q=block_q, S_T=s_t, S_H=s_h, S_W=s_w,
        WIDTH_FIRST=total.width_first, BIAS=total.bias is not None, RESIDUAL=x is not None,
        WRITE_SUM=sum_out is not None, PAD=padded is not None, LEAD=lead, TAIL=tail, NORM=outputs.eps is not None,
        LAST=last, SUM_LAST=outputs.sum_layout == torch.channels_last_3d,
        ALIGN=16 if not last and height * width % 16 == 0 else 1, num_warps=8 if block_c * block_q > _TILE else 4,
    )  # fmt: skip
    return sum_out, padded
