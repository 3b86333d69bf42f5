"""LoRA merged into a rank's shard, with no communication, at any strengths, any number of times.

A column-parallel layer needs its rows of B and all of A, a row-parallel layer all of B and its
columns of A. Rounding is the reference's (v1.2.0, `fuse_loras.py`): the first product is
`round((round(B * strength)) @ A)`, later ones are added by addmm, the clean weight last. Clean
weights come from the file each time and are never reconstructed by subtracting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ltx_ray.lorafiles import Factor, LoraPair
from ltx_ray.parallel.layers import TPGroup
from ltx_ray.parallel.loading import ShardReader

MERGE_CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class LoraSetting:
    """What is merged: LoRAs by their place in the list given to LoraMerger, and strengths."""

    strengths: tuple[float, ...]


class LoraMerger:
    """Keeps the weights of `module` at a LoraSetting.

    `loras` are factor pairs by module, in the reference's order (user LoRAs, then the distilled one);
    `weights` reads the clean weights. Products are rounded to the parameters' dtype.
    """

    def __init__(self, module: nn.Module, weights: ShardReader, loras: Sequence[Mapping[str, LoraPair]], tp: TPGroup):
        self.module, self.weights, self._loras, self._tp = module, weights, loras, tp
        self._parameters = dict(module.named_parameters())
        #: What is merged now; None after a merge that failed half-way.
        self._current: LoraSetting | None = LoraSetting((0.0,) * len(loras))
        self._targets = sorted({stem for lora in loras for stem in lora})

    def switch(self, setting: LoraSetting) -> bool:
        """Bring the weights to `setting`; False when they are there already."""
        assert len(setting.strengths) == len(self._loras)
        if setting == self._current:
            return False
        # should this fail half-way, the next call must not take the mixture for what was there before
        self._current = None
        for stem in self._targets:
            parameter = self._parameters[f"{stem}.weight"]
            clean = self.weights.read(f"{stem}.weight", parameter.shard_dim)
            clean = clean.to(device=parameter.device, dtype=parameter.dtype)
            factors = [
                (*self._factors(lora[stem], parameter), strength * lora[stem].scale)
                for lora, strength in zip(self._loras, setting.strengths, strict=True)
                if strength != 0.0 and stem in lora
            ]
            merge_(parameter.data, clean, factors)
        self._current = setting
        return True

    def _factors(self, pair: LoraPair, parameter: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor]:
        a = self._factor(pair.a, 1 if parameter.shard_dim == 1 else None, parameter)
        return a, self._factor(pair.b, 0 if parameter.shard_dim == 0 else None, parameter)

    def _factor(self, factor: Factor, shard_dim: int | None, parameter: nn.Parameter) -> torch.Tensor:
        sides = {"factor": factor.tensor} | ({"scale": factor.scale} if factor.scale else {})
        reader = ShardReader(sides, self._tp)
        value = reader.read("factor", shard_dim).to(parameter.device)
        if factor.scale is not None:
            scale = reader.read("scale", None).to(parameter.device, torch.float32)
            if scale.numel() > 1:
                scale = scale.reshape(-1, 1)
                scale = scale[self._tp.slice(len(scale))] if shard_dim == 0 else scale
            value = value.float() * scale
        return value.to(parameter.dtype)


def merge_(
    target: torch.Tensor,
    clean: torch.Tensor,
    factors: Sequence[tuple[torch.Tensor, torch.Tensor, float]],
    chunk_bytes: int = MERGE_CHUNK_BYTES,
) -> None:
    """target (out, in) <- clean + sum of (B * strength) @ A, for factors (A (r, in), B (out, r), strength).

    Works on blocks of rows, so that temporaries stay within `chunk_bytes` however large B is.
    """
    if not factors:
        target.copy_(clean)
        return
    rows = max(1, chunk_bytes // (target.shape[1] * target.element_size()))
    for start in range(0, target.shape[0], rows):
        block = slice(start, start + rows)
        delta: torch.Tensor | None = None
        for a, b, strength in factors:
            if delta is None:
                delta = torch.matmul(b[block] * strength, a)
            else:
                delta.addmm_(b[block], a, alpha=strength)
        target[block] = delta.add_(clean[block])
