"""Tensor-parallel layers, each of whose parameters knows which slice of the file's tensor it holds.

Column-parallel layers hold rows of the weight (output features). Row-parallel layers hold columns (input features) and
sum their partial products over the ranks, as in Megatron-LM (arXiv:1909.08053). A single rank holds everything and
communicates nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ltx_ray.parallel.collectives import RankGroup


class ShardParameter(nn.Parameter):
    """A rank's slice of a tensor along `shard_dim`, or all of it when that is None. `row_scale` as in fp8.py."""

    shard_dim: int | None
    row_scale: torch.Tensor | None


def shard_parameter(values: torch.Tensor, shard_dim: int | None) -> ShardParameter:
    """A parameter, without gradients, on the memory of `values`."""
    parameter = ShardParameter(values, requires_grad=False)
    parameter.shard_dim, parameter.row_scale = shard_dim, None
    return parameter


def replicated(*shape: int) -> ShardParameter:
    """A parameter of which every rank holds all."""
    return shard_parameter(torch.empty(shape), None)


class ReplicatedLinear(nn.Module):
    """A linear layer of which every rank holds all: (..., in) -> (..., out)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = replicated(out_features, in_features)
        self.bias = replicated(out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class ColumnParallelLinear(nn.Module):
    """A linear layer whose outputs are divided over the ranks: (..., in) -> (..., out / tp)."""

    def __init__(self, in_features: int, out_features: int, tp: RankGroup):
        super().__init__()
        self.weight = shard_parameter(torch.empty(out_features // tp.size, in_features), 0)
        self.bias = shard_parameter(torch.empty(out_features // tp.size), 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """A linear layer whose inputs are divided over the ranks: (..., in / tp) -> (..., out), the same on every rank."""

    def __init__(self, in_features: int, out_features: int, tp: RankGroup):
        super().__init__()
        self.tp = tp
        self.weight = shard_parameter(torch.empty(out_features, in_features // tp.size), 1)
        self.bias = replicated(out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return F.linear(x, self.weight, self.bias)
        # Every rank has the bias, which must enter the sum once.
        return self.tp.sum_(F.linear(x, self.weight)).add_(self.bias)


class ShardedRMSNorm(nn.Module):
    """RMS norm with weights over all heads together, of which each rank holds some: (..., dim / tp)."""

    def __init__(self, dim: int, eps: float, tp: RankGroup):
        super().__init__()
        self.dim, self.eps, self.tp = dim, eps, tp
        self.weight = shard_parameter(torch.empty(dim // tp.size), 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return F.rms_norm(x, (self.dim,), self.weight, self.eps)
        x32 = x.float()
        squares = self.tp.sum_(x32.square().sum(-1, keepdim=True))
        normed = x32 * torch.rsqrt(squares / self.dim + self.eps)
        return (normed * self.weight.float()).to(x.dtype)
