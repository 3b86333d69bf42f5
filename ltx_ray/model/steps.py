"""What lies between the products and the attention of a block, each as one step: plain PyTorch, on any device.

On CUDA the Triton twins in `kernels.py` do the same, each in one pass over its data. All compute in float32 and
round once at the end. R is a count of rows (tokens of all batch entries), D a width, L a count of noise levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ltx_ray.model.packing import PackedLinear
from ltx_ray.model.rope import RopeTable
from ltx_ray.parallel.fp8 import FP8, FP8_MAX, SMALLEST_SCALE

#: Fewer rows go through an fp8 product with rows of zeros: cuBLAS 13.0 has no kernel for under 32 rows of 16,384
#: features on an H100, and works on 64 or more at a time anyway.
FP8_ROWS = 64


@dataclass(frozen=True)
class Quantized:
    """Rows in e4m3: values (R, D) times scale (R, 1) float32."""

    values: torch.Tensor
    scale: torch.Tensor


Rows = torch.Tensor | Quantized


@dataclass(frozen=True)
class Levels:
    """Which of L modulations each of a stream's tokens takes: (T,) int32, the same for every batch entry."""

    of_token: torch.Tensor

    def pick(self, table: torch.Tensor, rows: int) -> torch.Tensor:
        """(L, D) -> (R, D)."""
        return table[self.of_token.long()].repeat(rows // len(self.of_token), 1) if len(table) > 1 else table


@dataclass(frozen=True)
class Modulation:
    """shift and scale, each (L, D) or (1, D); `quantize` says in which form the product wants its rows."""

    shift: torch.Tensor
    scale: torch.Tensor
    quantize: bool = False


@dataclass(frozen=True)
class Residual:
    """What is yet to be added to a stream: value (R, D) times gate (L, D) or (1, D)."""

    value: torch.Tensor
    gate: torch.Tensor


def modulated(
    x: torch.Tensor,
    residual: Residual | None,
    modulations: Sequence[Modulation],
    levels: Levels | None,
    norm: str | None,
    eps: float,
) -> list[Rows]:
    """norm(x + residual) * (1 + scale) + shift for every modulation; x (R, D) takes the residual in place.

    `norm` is "rms", "layer" or None.
    """

    def rows(table: torch.Tensor) -> torch.Tensor:
        return (table if levels is None else levels.pick(table, len(x))).float()

    if residual is not None:
        x.copy_(x.float() + residual.value.float() * rows(residual.gate))
    wide = x.float()
    if norm == "rms":
        wide = F.rms_norm(wide, wide.shape[-1:], eps=eps)
    elif norm == "layer":
        wide = F.layer_norm(wide, wide.shape[-1:], eps=eps)
    return [_rounded(wide * (1 + rows(m.scale)) + rows(m.shift), x.dtype, m.quantize) for m in modulations]


def norm_heads_(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]], heads: int, eps: float, table: RopeTable | None
) -> None:
    """RMS norm over all heads of each (x (R, D), weight (D,)), then the rotation of `table` (T, D / 2), in place."""
    for x, weight in parts:
        wide = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
        if table is not None:
            first, second = wide.unflatten(-1, (heads, 2, -1)).unbind(-2)
            repeats = len(x) // len(table.cos)
            cos, sin = (t.float().repeat(repeats, 1).unflatten(-1, (heads, -1)) for t in (table.cos, table.sin))
            turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2)
            wide = turned.flatten(1)
        x.copy_(wide)


def gated(values: torch.Tensor, logits: torch.Tensor, quantize: bool) -> Rows:
    """values (R, heads, D) times twice the sigmoid of logits (R, heads), as (R, heads * D)."""
    wide = values.float() * (2 * torch.sigmoid(logits.float()))[..., None]
    return _rounded(wide.flatten(1), values.dtype, quantize)


def gelu(x: torch.Tensor, quantize: bool) -> Rows:
    """Tanh-approximated GELU of x (R, D)."""
    return _rounded(F.gelu(x.float(), approximate="tanh"), x.dtype, quantize)


def gelu_product(x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
    """GELU of x (R, K) through an unquantized product: (R, N)."""
    return gelu(product(x, layer), False)


def product(x: Rows, layer: PackedLinear) -> torch.Tensor:
    """x (R, K) through a product: (R, N) in the bias's dtype."""
    if isinstance(x, torch.Tensor):
        assert not layer.quantized
        return F.linear(x, layer.weight, layer.bias)
    if x.values.is_cuda:
        rows = len(x.values)
        if rows < FP8_ROWS:
            more = (0, 0, 0, FP8_ROWS - rows)
            x = Quantized(F.pad(x.values.view(torch.uint8), more).view(FP8), F.pad(x.scale, more))
        return torch._scaled_mm(
            x.values, layer.weight.t(), x.scale, layer.row_scale[None], layer.bias,
            out_dtype=layer.bias.dtype, use_fast_accum=True,
        )[:rows]  # fmt: skip
    wide = (x.values.float() @ layer.weight.float().t()) * x.scale * layer.row_scale[None]
    return (wide + layer.bias.float()).to(layer.bias.dtype)


def _rounded(wide: torch.Tensor, dtype: torch.dtype, quantize: bool) -> Rows:
    if not quantize:
        return wide.to(dtype)
    scale = (wide.abs().amax(dim=-1, keepdim=True) / FP8_MAX).clamp(min=SMALLEST_SCALE)
    return Quantized((wide / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale)
