"""Muon (K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024) for convolutions.

Adam moves every number of a layer alike, so a layer's output moves mostly along the few directions in which its inputs
are large. Muon moves all directions of a layer by the same amount, and rare ones are learned sooner.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

#: Coefficients of the paper's quintic iteration, and number of iterations.
_QUINTIC, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5


class Muon(torch.optim.Optimizer):
    """Moves each weight of at least two dimensions by `lr` along its momentum with all singular values set to 1.

    A weight is a matrix of one row per output. The step of an output is then near `lr` times the size of a unit input,
    whatever the layer's width.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            by_shape: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for weight, direction in zip(weights, self._directions(weights, group["momentum"]), strict=True):
                by_shape.setdefault((len(weight), weight[0].numel()), []).append((weight, direction))
            for (outputs, inputs), members in by_shape.items():
                updates = orthogonal(torch.stack([direction.flatten(1) for _, direction in members]))
                for (weight, _), update in zip(members, updates, strict=True):
                    weight.sub_(update.view(weight.shape), alpha=group["lr"] * math.sqrt(outputs / inputs))

    def _directions(self, weights: list[torch.Tensor], momentum: float) -> list[torch.Tensor]:
        """Nesterov's momentum of the gradients."""
        gradients: list[torch.Tensor] = [weight.grad for weight in weights if weight.grad is not None]
        for weight in weights:
            if "exp_avg" not in self.state[weight]:
                self.state[weight]["exp_avg"] = torch.zeros_like(weight)
        averages = [self.state[weight]["exp_avg"] for weight in weights]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        return list(torch._foreach_lerp(gradients, averages, momentum))


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (N, rows, columns) with their singular values set to about 1 (0.7 to 1.2), by the quintic iteration."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)
