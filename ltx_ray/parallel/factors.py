"""What one LoRA adds to a layer."""

from __future__ import annotations

from typing import NamedTuple

import torch


class FactorProduct(NamedTuple):
    """strength * B @ A: what one LoRA adds to a layer."""

    a: torch.Tensor
    """(rank, in)"""
    b: torch.Tensor
    """(out, rank)"""
    strength: float
