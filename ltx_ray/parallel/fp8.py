"""Weights in e4m3 with one float32 scale for each output feature.

A parameter held in fp8 has the attribute `row_scale` (N,). Its values are `data * row_scale[:, None]`.
"""

from __future__ import annotations

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
    step = max(1, _CHUNK_BYTES // (4 * values.shape[1]))
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        x32 = values[rows].float()
        scale = (x32.abs().amax(dim=1) / FP8_MAX).clamp_(min=MIN_SCALE)
        row_scale[rows] = scale
        parameter.data[rows] = x32.div_(scale[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(FP8)


def read_values(parameter: nn.Parameter) -> torch.Tensor:
    """Values of a parameter in its dtype, or in float32 when it is held in fp8."""
    row_scale = row_scale_of(parameter)
    return parameter.data if row_scale is None else parameter.data.float() * row_scale[:, None]
