"""The functions of `steps.py` as Triton kernels, each of which makes one pass over the data.

A program takes one row with all of its channels. The row fits in registers, so norms need no second read. Every program
reads the modulations again, but they stay in the caches, because a stage has a handful of noise levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ltx_ray.model.packed_linear import PackedLinear
from ltx_ray.model.rope import RopeTable
from ltx_ray.model.steps import Activations, Modulation, Norm, QuantizedRows, Residual, TokenLevels
from ltx_ray.parallel.fp8 import FP8, FP8_MAX, MIN_SCALE
from ltx_ray.parallel.head_exchange import HeadPlaces

#: Norms as the kernels' NORM.
_NORMS: dict[Norm | None, int] = {None: 0, "rms": 1, "layer": 2}


@triton.jit
def _store_row(out, row_scale, row, columns, in_row, width, x32, QUANTIZE: tl.constexpr, MAX: tl.constexpr,
               LEAST_SCALE: tl.constexpr):  # fmt: skip
    if QUANTIZE:
        peak = tl.max(tl.where(in_row, tl.abs(x32), 0.0), axis=0)
        scale = tl.maximum(peak / MAX, LEAST_SCALE)
        tl.store(row_scale + row, scale)
        x32 = tl.minimum(tl.maximum(x32 / scale, -MAX), MAX)
    tl.store(out + row * width + columns, x32.to(out.dtype.element_ty), mask=in_row)


@triton.jit
def _add_norm_modulate_kernel(
    x, value, gate, level_index, tokens, shift_0, scale_0, out_0, row_scale_0, shift_1, scale_1, out_1, row_scale_1,
    gate_stride, stride_0, stride_1, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, INDEXED: tl.constexpr, NORM: tl.constexpr,
    OUTS: tl.constexpr, QUANTIZE_0: tl.constexpr, QUANTIZE_1: tl.constexpr, MAX: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    in_row = columns < WIDTH
    level = tl.load(level_index + row % tokens).to(tl.int64) if INDEXED else tl.zeros((), tl.int64)
    at = row * WIDTH + columns
    x32 = tl.load(x + at, mask=in_row, other=0.0).to(tl.float32)
    if RESIDUAL:
        added = tl.load(value + at, mask=in_row, other=0.0, eviction_policy="evict_first").to(tl.float32)
        x32 += added * tl.load(gate + level * gate_stride + columns, mask=in_row, other=0.0).to(tl.float32)
        rounded = x32.to(x.dtype.element_ty)
        tl.store(x + at, rounded, mask=in_row)
        x32 = rounded.to(tl.float32)
    if NORM == 2:
        x32 = tl.where(in_row, x32 - tl.sum(x32, axis=0) / WIDTH, 0.0)
    if NORM > 0:
        x32 *= tl.rsqrt(tl.sum(x32 * x32, axis=0) / WIDTH + eps)
    if OUTS > 0:
        scale = tl.load(scale_0 + level * stride_0 + columns, mask=in_row, other=0.0).to(tl.float32)
        shift = tl.load(shift_0 + level * stride_0 + columns, mask=in_row, other=0.0).to(tl.float32)
        _store_row(out_0, row_scale_0, row, columns, in_row, WIDTH, x32 * (1 + scale) + shift, QUANTIZE_0, MAX,
                   LEAST_SCALE)  # fmt: skip
    if OUTS > 1:
        scale = tl.load(scale_1 + level * stride_1 + columns, mask=in_row, other=0.0).to(tl.float32)
        shift = tl.load(shift_1 + level * stride_1 + columns, mask=in_row, other=0.0).to(tl.float32)
        _store_row(out_1, row_scale_1, row, columns, in_row, WIDTH, x32 * (1 + scale) + shift, QUANTIZE_1, MAX,
                   LEAST_SCALE)  # fmt: skip


def add_norm_modulate(
    x: torch.Tensor,
    residual: Residual | None,
    modulations: Sequence[Modulation],
    levels: TokenLevels | None,
    norm: Norm | None,
    eps: float,
) -> list[Activations]:
    """Do as `steps.add_norm_modulate`, for at most two modulations."""
    rows, width = x.shape
    assert x.is_contiguous() and len(modulations) <= 2, (x.shape, x.stride(), len(modulations))
    if residual is not None:
        assert residual.value.shape == x.shape and residual.value.is_contiguous(), (residual.value.shape, x.shape)
    tables = [table for m in modulations for table in (m.shift, m.scale)] + ([residual.gate] if residual else [])
    assert all(table.shape[1] == width for table in tables), ([table.shape for table in tables], width)
    # A table of several levels needs to know which of them a row has.
    assert levels is not None or all(len(table) == 1 for table in tables), [table.shape for table in tables]
    assert levels is None or rows % len(levels.index) == 0, (rows, len(levels.index))
    outs = [_empty_rows(rows, width, x, m.quantize) for m in modulations]
    first, second = ([*zip(modulations, outs, strict=True), (None, None), (None, None)])[:2]
    _add_norm_modulate_kernel[(rows,)](
        x, x if residual is None else residual.value, x if residual is None else residual.gate,
        x if levels is None else levels.index, 1 if levels is None else len(levels.index),
        *_pointers(*first, x), *_pointers(*second, x),
        0 if residual is None else _level_stride(residual.gate), _stride_of(first[0]), _stride_of(second[0]), eps,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), RESIDUAL=residual is not None, INDEXED=levels is not None,
        NORM=_NORMS[norm], OUTS=len(modulations), QUANTIZE_0=_quantizes(first[0]), QUANTIZE_1=_quantizes(second[0]),
        MAX=FP8_MAX, LEAST_SCALE=MIN_SCALE, num_warps=8,
    )  # fmt: skip
    return outs


def _pointers(m: Modulation | None, out: Activations | None, unused: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if m is None:
        return unused, unused, unused, unused
    assert out is not None
    if isinstance(out, QuantizedRows):
        return m.shift, m.scale, out.values, out.scale
    return m.shift, m.scale, out, unused


def _quantizes(m: Modulation | None) -> bool:
    return m is not None and m.quantize


def _stride_of(m: Modulation | None) -> int:
    if m is None:
        return 0
    assert _level_stride(m.shift) == _level_stride(m.scale)
    return _level_stride(m.shift)


def _level_stride(table: torch.Tensor) -> int:
    assert table.stride(-1) == 1, table.stride()
    return table.stride(0) if len(table) > 1 else 0


def _empty_rows(rows: int, width: int, like: torch.Tensor, quantize: bool) -> Activations:
    if not quantize:
        return torch.empty((rows, width), dtype=like.dtype, device=like.device)
    values = torch.empty((rows, width), dtype=FP8, device=like.device)
    return QuantizedRows(values, torch.empty((rows, 1), dtype=torch.float32, device=like.device))


@triton.jit
def _place(before, own, after, strides, row, channel, in_row, values, RANK: tl.constexpr, RANKS: tl.constexpr,
           GROUPS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Store channels of a row in the places of the ranks whose heads they are (HeadPlaces), each of WIDTH channels."""
    tokens, by_rank, by_group, by_batch, own_by_group, own_by_batch = strides
    rank = (channel // (GROUPS * WIDTH)).to(tl.int64)
    group = (channel // WIDTH % GROUPS).to(tl.int64)
    at = row % tokens * WIDTH + channel % WIDTH
    others_at = group * by_group + row // tokens * by_batch + at
    values = values.to(own.dtype.element_ty)
    if RANK > 0:
        tl.store(before + rank * by_rank + others_at, values, mask=in_row & (rank < RANK))
    own_at = group * own_by_group + row // tokens * own_by_batch + at
    tl.store(own + own_at, values, mask=in_row & (rank == RANK))
    if RANK < RANKS - 1:
        tl.store(after + (rank - RANK - 1) * by_rank + others_at, values, mask=in_row & (rank > RANK))


@triton.jit
def _place_heads_kernel(
    x, stride, before, own, after, tokens, by_rank, by_group, by_batch, own_by_group, own_by_batch,
    ROW: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    in_row = columns < ROW
    values = tl.load(x + row * stride + columns, mask=in_row, other=0.0)
    strides = (tokens, by_rank, by_group, by_batch, own_by_group, own_by_batch)
    _place(before, own, after, strides, row, columns, in_row, values, RANK, RANKS, GROUPS, WIDTH)


def place_heads(x: torch.Tensor, part: int, places: HeadPlaces) -> None:
    """Do as `steps.place_heads`."""
    rows, width = x.shape
    assert x.stride(1) == 1, x.stride()
    to = _places(places, part, rows, width)
    _place_heads_kernel[(rows,)](
        x, x.stride(0), *to.pointers, *to.strides, ROW=width, BLOCK=triton.next_power_of_2(width),
        RANK=to.rank, RANKS=to.ranks, GROUPS=to.groups, WIDTH=width // (to.ranks * to.groups), num_warps=4,
    )  # fmt: skip


class _Places(NamedTuple):
    """A part's HeadPlaces, as kernels take them: before, own, after; strides of tokens, ranks, groups and batches."""

    pointers: tuple[torch.Tensor, ...]
    strides: tuple[int, ...]
    rank: int
    ranks: int
    groups: int


def _no_places(unused: torch.Tensor) -> _Places:
    return _Places((unused,) * 3, (1,) + (0,) * 5, rank=0, ranks=0, groups=1)


def _places(places: HeadPlaces, part: int, rows: int, width: int) -> _Places:
    """Where rows (rows, width) go."""
    groups, _, batch, tokens, of_rank = places.own.shape
    assert batch * tokens == rows and places.size * groups * of_rank == width, (places.own.shape, rows, width)
    others = [of_ranks[:, :, part] for of_ranks in (places.before, places.after)]
    own = places.own[:, part]
    assert own.stride()[2:] == (of_rank, 1) and all(x.stride()[3:] == (of_rank, 1) for x in others), own.stride()
    # A kernel does not touch what belongs to no rank.
    before, after = (of_ranks if len(of_ranks) else own for of_ranks in others)
    by_rank, by_group, by_batch = (others[0] if len(others[0]) else others[1]).stride()[:3]
    strides = (tokens, by_rank, by_group, by_batch, own.stride(0), own.stride(1))
    return _Places((before, own, after), strides, places.rank, places.size, groups)


@triton.jit
def _norm_one(x, weight, stride, mean, before, own, after, strides, row, first, second, in_row, cos, sin, eps,
              WIDTH: tl.constexpr, ROPE: tl.constexpr, MEANS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
              GROUPS: tl.constexpr):  # fmt: skip
    a = tl.load(x + row * stride + first, mask=in_row, other=0.0).to(tl.float32)
    b = tl.load(x + row * stride + second, mask=in_row, other=0.0).to(tl.float32)
    if MEANS:
        inverse = tl.rsqrt(tl.load(mean + row) + eps)
    else:
        inverse = tl.rsqrt((tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)) / WIDTH + eps)
    a *= inverse * tl.load(weight + first, mask=in_row, other=0.0).to(tl.float32)
    b *= inverse * tl.load(weight + second, mask=in_row, other=0.0).to(tl.float32)
    if ROPE:
        rotated = a * cos - b * sin
        b = b * cos + a * sin
        a = rotated
    if RANKS > 0:
        OF_RANK: tl.constexpr = WIDTH // (RANKS * GROUPS)
        _place(before, own, after, strides, row, first, in_row, a, RANK, RANKS, GROUPS, OF_RANK)
        _place(before, own, after, strides, row, second, in_row, b, RANK, RANKS, GROUPS, OF_RANK)
    else:
        tl.store(x + row * stride + first, a.to(x.dtype.element_ty), mask=in_row)
        tl.store(x + row * stride + second, b.to(x.dtype.element_ty), mask=in_row)


@triton.jit
def _norm_heads_kernel(
    x_0, weight_0, stride_0, mean_0, x_1, weight_1, stride_1, mean_1, cos, sin, tokens, eps,
    before_0, own_0, after_0, before_1, own_1, after_1,
    places_tokens, by_rank, by_group, by_batch, own_by_group, own_by_batch,
    WIDTH: tl.constexpr, HALF_HEAD: tl.constexpr, BLOCK: tl.constexpr, PAIR: tl.constexpr, ROPE: tl.constexpr,
    MEANS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    # A pair of channels that rotate together: one in the first half of a head, its partner in the second.
    pair = tl.arange(0, BLOCK)
    in_row = pair < WIDTH // 2
    first = pair // HALF_HEAD * (2 * HALF_HEAD) + pair % HALF_HEAD
    second = first + HALF_HEAD
    c = tl.zeros((BLOCK,), tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    if ROPE:
        at = row % tokens * (WIDTH // 2) + pair
        c = tl.load(cos + at, mask=in_row, other=0.0).to(tl.float32)
        s = tl.load(sin + at, mask=in_row, other=0.0).to(tl.float32)
    strides = (places_tokens, by_rank, by_group, by_batch, own_by_group, own_by_batch)
    _norm_one(x_0, weight_0, stride_0, mean_0, before_0, own_0, after_0, strides, row, first, second, in_row, c, s, eps,
              WIDTH, ROPE, MEANS, RANK, RANKS, GROUPS)  # fmt: skip
    if PAIR:
        _norm_one(x_1, weight_1, stride_1, mean_1, before_1, own_1, after_1, strides, row, first, second, in_row, c, s,
                  eps, WIDTH, ROPE, MEANS, RANK, RANKS, GROUPS)  # fmt: skip


@triton.jit
def _head_means_kernel(x_0, stride_0, x_1, stride_1, means, channels, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                       PAIR: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    in_row = columns < WIDTH
    a = tl.load(x_0 + row * stride_0 + columns, mask=in_row, other=0.0).to(tl.float32)
    tl.store(means + row, tl.sum(a * a, axis=0) / channels)
    if PAIR:
        b = tl.load(x_1 + row * stride_1 + columns, mask=in_row, other=0.0).to(tl.float32)
        tl.store(means + tl.num_programs(0) + row, tl.sum(b * b, axis=0) / channels)


def head_means(parts: Sequence[torch.Tensor], channels: int) -> torch.Tensor:
    """Do as `steps.head_means`, for one tensor or for two of the same shape."""
    x, other = parts[0], parts[-1]
    rows, width = x.shape
    assert len(parts) <= 2 and other.shape == x.shape and x.stride(1) == other.stride(1) == 1, (x.shape, other.shape)
    means = torch.empty((len(parts), rows), dtype=torch.float32, device=x.device)
    _head_means_kernel[(rows,)](
        x, x.stride(0), other, other.stride(0), means, channels,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), PAIR=len(parts) == 2, num_warps=4,
    )  # fmt: skip
    return means


def norm_heads_(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
    heads: int,
    eps: float,
    table: RopeTable | None,
    means: torch.Tensor | None = None,
    places: HeadPlaces | None = None,
) -> None:
    """Do as `steps.norm_heads_`, for one tensor or for two of the same shape."""
    (x, weight), (other, other_weight) = parts[0], parts[-1]
    rows, width = x.shape
    assert len(parts) <= 2 and other.shape == x.shape and x.stride(1) == other.stride(1) == 1, (x.shape, other.shape)
    assert weight.shape == other_weight.shape == (width,), (weight.shape, other_weight.shape, width)
    assert width % (2 * heads) == 0, (width, heads)
    if table is not None:
        assert table.cos.shape == table.sin.shape == (len(table.cos), width // 2), (table.cos.shape, width)
        assert table.cos.is_contiguous() and table.sin.is_contiguous(), (table.cos.stride(), table.sin.stride())
        assert rows % len(table.cos) == 0, (rows, len(table.cos))
    if means is not None:
        assert means.shape == (len(parts), rows) and means.stride(1) == 1, (means.shape, means.stride(), rows)
    half = width // heads // 2
    first, last = (_places(places, part, rows, width) if places else _no_places(x) for part in (0, len(parts) - 1))
    _norm_heads_kernel[(rows,)](
        x, weight, x.stride(0), x if means is None else means[0],
        other, other_weight, other.stride(0), x if means is None else means[-1],
        x if table is None else table.cos, x if table is None else table.sin, 1 if table is None else len(table.cos),
        eps, *first.pointers, *last.pointers, *first.strides,
        WIDTH=width, HALF_HEAD=half, BLOCK=triton.next_power_of_2(width // 2), PAIR=len(parts) == 2,
        ROPE=table is not None, MEANS=means is not None, RANK=first.rank, RANKS=first.ranks, GROUPS=first.groups,
        num_warps=4,
    )  # fmt: skip


@triton.jit
def _apply_gates_kernel(
    values, logits, out, row_scale, value_stride, logit_stride, rank_stride, group_stride,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, QUANTIZE: tl.constexpr, MAX: tl.constexpr,
    LEAST_SCALE: tl.constexpr, GROUPS: tl.constexpr, IN_GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    in_row = columns < WIDTH
    if GROUPS > 0:
        rank = (columns // (GROUPS * IN_GROUP)).to(tl.int64)
        group = (columns // IN_GROUP % GROUPS).to(tl.int64)
        at = rank * rank_stride + group * group_stride + columns % IN_GROUP
    else:
        at = columns
    x32 = tl.load(values + row * value_stride + at, mask=in_row, other=0.0).to(tl.float32)
    logit = tl.load(logits + row * logit_stride + columns // HEAD, mask=in_row, other=0.0).to(tl.float32)
    _store_row(out, row_scale, row, columns, in_row, WIDTH, x32 * (2 * tl.sigmoid(logit)), QUANTIZE, MAX, LEAST_SCALE)


def apply_gates(heads_out: torch.Tensor, logits: torch.Tensor, quantize: bool) -> Activations:
    """Do as `steps.apply_gates`.

    Heads (R, heads, D) are contiguous in every row, and those of several ranks (R, ranks, groups, heads, D) in every
    group.
    """
    rows, *_, in_group, head_dim = heads_out.shape
    of_ranks = heads_out.dim() == 5
    heads = math.prod(heads_out.shape[1:-1])
    assert logits.shape == (rows, heads), (logits.shape, heads_out.shape)
    assert heads_out.stride()[-2:] == (head_dim, 1) and logits.stride(1) == 1, (heads_out.stride(), logits.stride())
    out = _empty_rows(rows, heads * head_dim, heads_out, quantize)
    target, row_scale = (out.values, out.scale) if isinstance(out, QuantizedRows) else (out, out)
    _apply_gates_kernel[(rows,)](
        heads_out, logits, target, row_scale, heads_out.stride(0), logits.stride(0),
        heads_out.stride(1) if of_ranks else 0, heads_out.stride(2) if of_ranks else 0,
        WIDTH=heads * head_dim, HEAD=head_dim, BLOCK=triton.next_power_of_2(heads * head_dim), QUANTIZE=quantize,
        MAX=FP8_MAX, LEAST_SCALE=MIN_SCALE, GROUPS=heads_out.shape[2] if of_ranks else 0,
        IN_GROUP=in_group * head_dim, num_warps=1 if heads * head_dim <= 1024 else 4,
    )  # fmt: skip
    return out


@triton.jit
def _gelu_kernel(
    x, out, row_scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr, QUANTIZE: tl.constexpr, MAX: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    in_row = columns < WIDTH
    x32 = tl.load(x + row * WIDTH + columns, mask=in_row, other=0.0, eviction_policy="evict_first").to(tl.float32)
    # 0.5 (1 + tanh(z)) is the sigmoid of 2z.
    x32 *= tl.sigmoid(2 * 0.7978845608028654 * (x32 + 0.044715 * x32 * x32 * x32))
    _store_row(out, row_scale, row, columns, in_row, WIDTH, x32, QUANTIZE, MAX, LEAST_SCALE)


def gelu(x: torch.Tensor, quantize: bool) -> Activations:
    """Do as `steps.gelu`."""
    rows, width = x.shape
    assert x.is_contiguous(), x.stride()
    out = _empty_rows(rows, width, x, quantize)
    target, row_scale = (out.values, out.scale) if isinstance(out, QuantizedRows) else (out, out)
    block = triton.next_power_of_2(width)
    _gelu_kernel[(rows,)](
        x, target, row_scale, WIDTH=width, BLOCK=block, QUANTIZE=quantize, MAX=FP8_MAX, LEAST_SCALE=MIN_SCALE,
        # Measured best or within 3 % of it at 2,048 to 16,384 columns: 64 columns a thread.
        num_warps=max(2, min(16, block // 2048)),
    )  # fmt: skip
    return out


def linear_gelu(x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
    """Do as `steps.linear_gelu`. The product's epilogue applies GELU, which saves a pass over the hidden rows."""
    return torch._addmm_activation(layer.bias, x, layer.weight.t(), use_gelu=True)
