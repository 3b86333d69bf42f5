"""Weights in e4m3 with a float32 scale for every output feature.

A parameter that is held so has the attribute `row_scale` (N,); its values are `data * row_scale[:, None]`.
"""

from __future__ import annotations

import torch
from torch import nn

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
#: An all-zero row gets this scale instead of none.
SMALLEST_SCALE = 1e-12
#: Float32 values of a weight on its way to fp8 that exist at once.
_CHUNK_BYTES = 64 * 2**20


def row_scale_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """The scales of a parameter that is held in fp8; None for any other."""
    return getattr(parameter, "row_scale", None)


def store(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Write `values` into a parameter; into one in fp8 with a new scale for each of its rows."""
    row_scale = row_scale_of(parameter)
    if row_scale is None:
        parameter.data.copy_(values)
        return
    step = max(1, _CHUNK_BYTES // (4 * values.shape[1]))
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        wide = values[rows].float()
        scale = (wide.abs().amax(dim=1) / FP8_MAX).clamp_(min=SMALLEST_SCALE)
        row_scale[rows] = scale
        parameter.data[rows] = wide.div_(scale[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(FP8)


def loaded(parameter: nn.Parameter) -> torch.Tensor:
    """The values of a parameter; of one in fp8 in float32, as its product sees them."""
    row_scale = row_scale_of(parameter)
    return parameter.data if row_scale is None else parameter.data.float() * row_scale[:, None]
