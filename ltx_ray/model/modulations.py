"""Modulations of the fused path: computed once for every noise level of a call, and not for every token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ltx_ray.checkpoints.transformer_keys import CROSS_ROWS, StreamNames
from ltx_ray.model.block import STREAM_NAMES
from ltx_ray.model.transformer import Modality, Transformer
from ltx_ray.records import AV


@dataclass(frozen=True)
class ModulationTables:
    """Modulations of a stream in all n blocks at L noise levels.

    own (n, L, 9, D), prompt (n, 1, 2, D), cross (n, L, 4, D), cross_gate (n, 1, 1, D), and before the last projection
    output (1, L, 2, D). Rows are those of docs/ltx-2.3.md#transformer.
    """

    own: torch.Tensor
    prompt: torch.Tensor
    cross: torch.Tensor
    cross_gate: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class _BlockTables:
    """A stream's tables of all n blocks, one after the other: own (n, 9, D), prompt (n, 2, D), cross (n, 5, D)."""

    own: torch.Tensor
    prompt: torch.Tensor
    cross: torch.Tensor


class Modulations:
    """Makes the modulations of a call, and keeps those of the last one for the other passes of the same call."""

    def __init__(self, model: Transformer):
        self._model = model

        def stacked(names: StreamNames) -> _BlockTables:
            def of_blocks(table: str) -> torch.Tensor:
                return torch.stack([block.get_parameter(table).data for block in model.blocks])

            return _BlockTables(*(of_blocks(name) for name in (names.table, names.prompt_table, names.cross_table)))

        self._block_tables = STREAM_NAMES.map(stacked)
        self._last: tuple[tuple[torch.Tensor, ...], AV[ModulationTables]] | None = None

    def of(self, inputs: AV[Modality]) -> AV[ModulationTables]:
        """The modulations of a call. Passes with the very same timestep tensors get those of the first of them."""
        levels = tuple(tensor for modality in inputs for tensor in (modality.timesteps, modality.sigma))
        last = self._last
        if last is None or any(old is not new for old, new in zip(last[0], levels, strict=True)):
            tables = inputs.map(self._make, inputs.swapped(), STREAM_NAMES, self._block_tables)
            last = self._last = levels, tables
        return last[1]

    def _make(self, own: Modality, other: Modality, names: StreamNames, blocks: _BlockTables) -> ModulationTables:
        model, dtype = self._model, own.latent.dtype
        scale = model.config.timestep_scale
        # Every batch entry has the timesteps of the first one.
        levels = own.timesteps[0] * scale

        def modulation(adaln: str, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            rows, embedded = model.get_submodule(adaln)(timesteps.flatten(), dtype)
            return rows.unflatten(1, (-1, embedded.shape[1])), embedded

        def plus_table(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return table[:, None].to(dtype) + rows[None]

        rows, embedded = modulation(names.adaln, levels)
        prompt, _ = modulation(names.prompt_adaln, own.sigma[:1] * scale)
        cross, _ = modulation(names.cross_adaln, levels)
        gate_factor = model.config.av_timestep_scale / scale
        cross_gate, _ = modulation(names.cross_gate_adaln, other.sigma[:1] * scale * gate_factor)
        return ModulationTables(
            own=plus_table(blocks.own, rows),
            prompt=plus_table(blocks.prompt, prompt),
            cross=plus_table(blocks.cross[:, :CROSS_ROWS], cross),
            cross_gate=plus_table(blocks.cross[:, CROSS_ROWS:], cross_gate),
            output=model.get_parameter(names.output_table)[None, None].to(dtype) + embedded[None, :, None],
        )
