"""What the fused path computes around the matrix products and the attention of a block, in plain PyTorch.

Their Triton twins for CUDA in `kernels.py` make one pass over the data each. All compute in float32 and round once, at
the end. R is the number of rows (tokens of all batch entries), D a width, L the number of noise levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from ltx_ray.model.packed_linear import PackedLinear
from ltx_ray.model.rope import RopeTable
from ltx_ray.parallel.fp8 import FP8, FP8_MAX, MIN_SCALE
from ltx_ray.parallel.head_exchange import HeadPlaces

#: Rows to which an fp8 product is padded with zeros: cuBLAS 13.0 has no kernel for under 32 rows of 16,384 features on
#: an H100, and works on 64 or more at a time anyway.
MIN_FP8_ROWS = 64

Norm = Literal["rms", "layer"]


@dataclass(frozen=True)
class QuantizedRows:
    """Rows in e4m3: values (R, D) times scale (R, 1) float32."""

    values: torch.Tensor
    scale: torch.Tensor


#: Input (R, D) of a linear layer.
Activations = torch.Tensor | QuantizedRows


def some_rows(x: Activations, rows: slice) -> Activations:
    """The `rows` of x."""
    return x[rows] if isinstance(x, torch.Tensor) else QuantizedRows(x.values[rows], x.scale[rows])


@dataclass(frozen=True)
class TokenLevels:
    """The noise level of each of a stream's T tokens: `index` (T,) int32 in [0, L), the same for every batch entry."""

    index: torch.Tensor

    def rows_of(self, table: torch.Tensor, rows: int) -> torch.Tensor:
        """The row of `table` (L, D) for each of R `rows`: (R, D), or (1, D) when there is one level."""
        return table[self.index.long()].repeat(rows // len(self.index), 1) if len(table) > 1 else table


@dataclass(frozen=True)
class Modulation:
    """shift and scale, each (L, D) or (1, D). `quantize`: the result is wanted in fp8."""

    shift: torch.Tensor
    scale: torch.Tensor
    quantize: bool = False


@dataclass(frozen=True)
class Residual:
    """What is still to be added to a stream: value (R, D) times gate (L, D) or (1, D)."""

    value: torch.Tensor
    gate: torch.Tensor


def add_norm_modulate(
    x: torch.Tensor,
    residual: Residual | None,
    modulations: Sequence[Modulation],
    levels: TokenLevels | None,
    norm: Norm | None,
    eps: float,
) -> list[Activations]:
    """norm(x + residual) * (1 + scale) + shift for every modulation. The residual is added to x (R, D) in place.

    The norm has no weights. `levels` None: there is one noise level.
    """

    def rows(table: torch.Tensor) -> torch.Tensor:
        return (table if levels is None else levels.rows_of(table, len(x))).float()

    if residual is not None:
        x.copy_(x.float() + residual.value.float() * rows(residual.gate))
    x32 = x.float()
    if norm == "rms":
        x32 = F.rms_norm(x32, x32.shape[-1:], eps=eps)
    elif norm == "layer":
        x32 = F.layer_norm(x32, x32.shape[-1:], eps=eps)
    return [_rounded(x32 * (1 + rows(m.scale)) + rows(m.shift), x.dtype, m.quantize) for m in modulations]


def head_means(parts: Sequence[torch.Tensor], channels: int) -> torch.Tensor:
    """What each x (R, D) adds to the mean square over all `channels`, those of other ranks too: (parts, R) float32."""
    return torch.stack([x.float().square().sum(dim=1) / channels for x in parts])


def norm_heads_(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
    heads: int,
    eps: float,
    table: RopeTable | None,
    means: torch.Tensor | None = None,
    places: HeadPlaces | None = None,
) -> None:
    """RMS norm over all heads of each (x (R, D), weight (D,)), then the rotation by `table` (T, D / 2), in place.

    `means` (parts, R) float32: the mean squares over the heads of all ranks; None where x has all heads. `places`:
    where the results go instead, as the first parts of what is exchanged.
    """
    for number, (x, weight) in enumerate(parts):
        if means is None:
            x32 = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
        else:
            x32 = x.float() * torch.rsqrt(means[number] + eps)[:, None] * weight.float()
        if table is not None:
            first, second = x32.unflatten(-1, (heads, 2, -1)).unbind(-2)
            repeats = len(x) // len(table.cos)
            cos, sin = (t.float().repeat(repeats, 1).unflatten(-1, (heads, -1)) for t in (table.cos, table.sin))
            rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2)
            x32 = rotated.flatten(1)
        if places is None:
            x.copy_(x32)
        else:
            places.write(number, x32.to(x.dtype))


def place_heads(x: torch.Tensor, part: int, places: HeadPlaces) -> None:
    """Write x (R, D) as a part of what is exchanged."""
    places.write(part, x)


def apply_gates(heads_out: torch.Tensor, logits: torch.Tensor, quantize: bool) -> Activations:
    """heads_out (R, ..., D), all heads of a row, times twice the sigmoid of logits (R, heads): (R, heads * D)."""
    gated = heads_out.flatten(1, -2).float() * (2 * torch.sigmoid(logits.float()))[..., None]
    return _rounded(gated.flatten(1), heads_out.dtype, quantize)


def gelu(x: torch.Tensor, quantize: bool) -> Activations:
    """GELU of x (R, D), approximated by tanh."""
    return _rounded(F.gelu(x.float(), approximate="tanh"), x.dtype, quantize)


def linear_gelu(x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
    """x (R, K) through an unquantized layer and GELU: (R, N)."""
    hidden = gelu(linear(x, layer), False)
    assert isinstance(hidden, torch.Tensor)
    return hidden


def linear(x: Activations, layer: PackedLinear, out: torch.Tensor | None = None) -> torch.Tensor:
    """x (R, K) through a layer: (R, N) in the bias's dtype, written to `out` if given.

    `x` is quantized if and only if the layer is.
    """
    if isinstance(x, torch.Tensor):
        assert layer.row_scale is None
        if out is None:
            return F.linear(x, layer.weight, layer.bias)
        return torch.addmm(layer.bias, x, layer.weight.t(), out=out)
    assert layer.row_scale is not None
    if x.values.is_cuda and len(x.values) >= MIN_FP8_ROWS:
        given = {} if out is None else {"out": out}
        return torch._scaled_mm(
            x.values, layer.weight.t(), x.scale, layer.row_scale[None], layer.bias,
            out_dtype=layer.bias.dtype, use_fast_accum=True, **given,
        )  # fmt: skip
    if x.values.is_cuda:
        rows = len(x.values)
        padding = (0, 0, 0, MIN_FP8_ROWS - rows)
        padded = QuantizedRows(F.pad(x.values.view(torch.uint8), padding).view(FP8), F.pad(x.scale, padding))
        found = linear(padded, layer)[:rows]
    else:
        out32 = (x.values.float() @ layer.weight.float().t()) * x.scale * layer.row_scale[None]
        found = (out32 + layer.bias.float()).to(layer.bias.dtype)
    return found if out is None else out.copy_(found)


def _rounded(x32: torch.Tensor, dtype: torch.dtype, quantize: bool) -> Activations:
    if not quantize:
        return x32.to(dtype)
    scale = (x32.abs().amax(dim=-1, keepdim=True) / FP8_MAX).clamp(min=MIN_SCALE)
    return QuantizedRows((x32 / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale)
