"""Tensor-parallel layers: every parameter knows which slice of the file's tensor is its own.

Column-parallel layers hold rows of the weight (output features), row-parallel layers hold columns
(input features) and sum their partial products over the gang. With one rank nothing is sliced and
nothing is communicated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class TPGroup:
    """The ranks that share a model, and which of them this is. `group` None is the default group."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add `tensor` up over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def min_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The least of each element over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self.group)
        return tensor

    def broadcast_(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Overwrite `tensor` with that of rank `source` of the group."""
        if self.size > 1:
            dist.broadcast(tensor, group=self.group, group_src=source)
        return tensor

    def slice(self, length: int) -> slice:
        """This rank's part of an axis of `length`, which the ranks divide evenly."""
        assert length % self.size == 0, f"{length} is not divisible over {self.size} ranks"
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


def _parameter(shape: tuple[int, ...], shard_dim: int | None) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(shape), requires_grad=False)
    parameter.shard_dim = shard_dim
    return parameter


def replicated(*shape: int) -> nn.Parameter:
    """A parameter that every rank holds whole."""
    return _parameter(shape, None)


class Linear(nn.Module):
    """A linear layer that every rank holds whole: (..., in) -> (..., out)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = replicated(out_features, in_features)
        self.bias = replicated(out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class ColumnLinear(nn.Module):
    """Linear whose outputs are divided over the ranks: (..., in) -> (..., out / tp)."""

    def __init__(self, in_features: int, out_features: int, tp: TPGroup):
        super().__init__()
        self.weight = _parameter((out_features // tp.size, in_features), 0)
        self.bias = _parameter((out_features // tp.size,), 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class RowLinear(nn.Module):
    """Linear whose inputs are divided over the ranks: (..., in / tp) -> (..., out), summed over them."""

    def __init__(self, in_features: int, out_features: int, tp: TPGroup):
        super().__init__()
        self.tp = tp
        self.weight = _parameter((out_features, in_features // tp.size), 1)
        self.bias = replicated(out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return F.linear(x, self.weight, self.bias)
        # the bias belongs to the whole sum, so it is added once, after it
        return self.tp.sum_(F.linear(x, self.weight)).add_(self.bias)


class HeadsRMSNorm(nn.Module):
    """Affine RMS norm over all heads together, of which this rank holds some: (..., dim / tp)."""

    def __init__(self, dim: int, eps: float, tp: TPGroup):
        super().__init__()
        self.dim, self.eps, self.tp = dim, eps, tp
        self.weight = _parameter((dim // tp.size,), 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return F.rms_norm(x, (self.dim,), self.weight, self.eps)
        wide = x.float()
        squares = self.tp.sum_(wide.square().sum(-1, keepdim=True))
        normed = wide * torch.rsqrt(squares / self.dim + self.eps)
        return (normed * self.weight.float()).to(x.dtype)
