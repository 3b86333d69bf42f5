"""Linear layers that read the same input, packed so that one matrix product serves them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class PackedLinear:
    """x -> x @ weight.T + bias for several layers at once: weight (N, K), bias (N,), in fp8 row_scale (N,) float32.

    `sizes` are the layers' output features in order. The rest of the N is padding.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    sizes: tuple[int, ...]
    row_scale: torch.Tensor | None = None

    @property
    def quantized(self) -> bool:
        return self.row_scale is not None

    def part(self, first: int, last: int) -> PackedLinear:
        """The layers from number `first` to before `last`, on the same memory and without padding."""
        rows = slice(sum(self.sizes[:first]), sum(self.sizes[:last]))
        scale = None if self.row_scale is None else self.row_scale[rows]
        return PackedLinear(self.weight[rows], self.bias[rows], self.sizes[first:last], scale)

    def split(self, outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs (R, N) of the packed layer -> those of each layer (R, size)."""
        return outputs[:, : sum(self.sizes)].split(self.sizes, dim=1)


#: A packed layer within a module of a block.
Packed = Literal["qkv", "gates", "out", "q_gates", "kv", "up", "down"]
#: Packed layers of a block by (module, packed layer).
PackedLinears = dict[tuple[str, Packed], PackedLinear]
