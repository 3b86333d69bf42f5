"""LoRA merged into a rank's shard, with no communication, at any strengths, any number of times.

A column-parallel layer needs its rows of B and all of A, a row-parallel layer all of B and its
columns of A. Rounding is the reference's (v1.2.0, `fuse_loras.py`): the first product is
`round((round(B * strength)) @ A)`, later ones are added by addmm, the clean weight last. Clean
weights come from the file each time and are never reconstructed by subtracting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ltx_ray.modelfiles import LORA_PREFIX
from ltx_ray.parallel.layers import TPGroup
from ltx_ray.parallel.loading import ShardReader

MERGE_CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class LoraSetting:
    """What is merged: LoRA files by their place in the list given to LoraMerger, and strengths."""

    strengths: tuple[float, ...]


class LoraMerger:
    """Keeps the weights of `module` at a LoraSetting.

    `paths` are the LoRA files in the reference's order (user LoRAs, then the distilled one);
    `weights` reads the clean weights. Products are rounded to the parameters' dtype.
    """

    def __init__(self, module: nn.Module, weights: ShardReader, paths: Sequence[str], tp: TPGroup):
        self.module, self.weights = module, weights
        self._loras = [ShardReader(path, _lora_prefix(path), tp) for path in paths]
        self._parameters = dict(module.named_parameters())
        #: What is merged now; None after a merge that failed half-way.
        self._current: LoraSetting | None = LoraSetting((0.0,) * len(paths))
        touched = {
            name[: -len(".lora_A.weight")]
            for lora in self._loras
            for name in lora.names
            if name.endswith(".lora_A.weight")
        }
        self._targets = sorted(stem for stem in touched if f"{stem}.weight" in self._parameters)

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
                (*self._factors(lora, stem, parameter), strength)
                for lora, strength in zip(self._loras, setting.strengths, strict=True)
                if strength != 0.0 and f"{stem}.lora_A.weight" in lora.names
            ]
            merge_(parameter.data, clean, factors)
        self._current = setting
        return True

    def _factors(self, lora: ShardReader, stem: str, parameter: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor]:
        a = lora.read(f"{stem}.lora_A.weight", 1 if parameter.shard_dim == 1 else None)
        b = lora.read(f"{stem}.lora_B.weight", 0 if parameter.shard_dim == 0 else None)
        return a.to(parameter.device, parameter.dtype), b.to(parameter.device, parameter.dtype)


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


def _lora_prefix(path: str) -> str:
    # ShardReader drops the prefix; files without it hold bare module names
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    return LORA_PREFIX if names and all(name.startswith(LORA_PREFIX) for name in names) else ""
