"""Weights in e4m3 with one float32 scale for each output feature.

A parameter held in fp8 has the attribute `row_scale` (N,). Its values are `data * row_scale[:, None]`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
#: Scale of a row that is all zeros, so that nothing is divided by zero.
MIN_SCALE = 1e-12
#: Float32 values of a weight on its way to fp8 that exist at once.
_CHUNK_BYTES = 64 * 2**20


def row_scale_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """Scales (N,) of a parameter held in fp8, None for any other."""
    return getattr(parameter, "row_scale", None)


def write_values(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Write `values`, of the parameter's shape, into it. A parameter in fp8 gets a new scale for each row."""
    row_scale = row_scale_of(parameter)
    if row_scale is None:
        parameter.data.copy_(values)
        return
    for rows in _row_chunks(values):
        x32 = values[rows].float()
        scale = (x32.abs().amax(dim=1) / FP8_MAX).clamp_(min=MIN_SCALE)
        row_scale[rows] = scale
        parameter.data[rows] = x32.div_(scale[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(FP8)


def write_exactly(parameter: nn.Parameter, values: torch.Tensor, scale: float) -> None:
    """Write the prequantized `values` (e4m3 or e5m2) times `scale` into a parameter in fp8.

    The scale of a row is `scale` times a power of two, so values of e4m3 are held exactly, and those of e5m2 wherever
    the range of a row fits into e4m3.
    """
    row_scale = row_scale_of(parameter)
    assert row_scale is not None
    for rows in _row_chunks(values):
        x32 = values[rows].float()
        # The least power of two that brings the row's largest value to at most FP8_MAX.
        mantissa, exponent = torch.frexp(x32.abs().amax(dim=1) / FP8_MAX)
        exponent -= (mantissa == 0.5).int()
        row_scale[rows] = _power_of_two(exponent) * scale
        parameter.data[rows] = (x32 * _power_of_two(-exponent)[:, None]).to(FP8)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent of int32 as float32, exact on every device, which `torch.pow` need not be."""
    return ((exponent.clamp(-126, 127) + 127) << 23).view(torch.float32)


def _row_chunks(values: torch.Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK_BYTES // (4 * values.shape[1]))
    return (slice(start, start + step) for start in range(0, len(values), step))


def read_values(parameter: nn.Parameter) -> torch.Tensor:
    """Values of a parameter in its dtype, or in float32 when it is held in fp8."""
    row_scale = row_scale_of(parameter)
    return parameter.data if row_scale is None else parameter.data.float() * row_scale[:, None]
