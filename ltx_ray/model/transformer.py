"""The LTX-2.3 audio-video diffusion transformer, whose weights tensor-parallel ranks may share.

Modules and tables have the checkpoint's names (transformer_keys.py). Source: docs/ltx-2.3.md#transformer; `model.py`,
`transformer_args.py`, `adaln.py` and `timestep_embedding.py` in `ltx_core/model/transformer/` of the reference v1.2.0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from ltx_ray.checkpoints.transformer_config import StreamConfig, TransformerConfig
from ltx_ray.checkpoints.transformer_keys import (
    ADALN_LINEAR_1,
    ADALN_LINEAR_2,
    CROSS_GATE_ROWS,
    CROSS_ROWS,
    MODULATION_ROWS,
    OUTPUT_ROWS,
    PROMPT_ROWS,
    TIMESTEP_CHANNELS,
    StreamNames,
)
from ltx_ray.model.block import STREAM_NAMES, AVBlock, Stream, modulate
from ltx_ray.model.rope import RopeTable, rope_table
from ltx_ray.parallel.collectives import SINGLE_RANK, RankGroup
from ltx_ray.parallel.layers import ReplicatedLinear, replicated
from ltx_ray.parallel.mesh import SequenceSharding
from ltx_ray.records import AV


@dataclass(frozen=True)
class Modality:
    """Input of one stream.

    latent (B, T, C); sigma (B,), the stream's noise level; timesteps, the noise levels of its tokens: (B, 1) when all
    share one, (B, T) otherwise; context (B, S, D); ropes from `Transformer.ropes`.

    The fused path takes the distinct noise levels instead: timesteps (B, L), and `level_index` (T,) int32 with the
    level of each token.
    """

    latent: torch.Tensor
    sigma: torch.Tensor
    timesteps: torch.Tensor
    context: torch.Tensor
    rope: RopeTable
    cross_rope: RopeTable
    enabled: bool = True
    level_index: torch.Tensor | None = None


@dataclass(frozen=True)
class Perturbation:
    """What a guidance pass takes away: self-attention in some blocks of each stream (STG, arXiv:2411.18664), or the
    attention between the streams."""

    values_only: AV[frozenset[int]] = AV(frozenset(), frozenset())  # noqa: RUF009 (immutable)
    isolated: bool = False


NO_PERTURBATION = Perturbation()


@dataclass
class Prefix:
    """The first blocks of a pass, for another one that equals it up to them.

    A pass with an empty prefix leaves in `streams` the x of both streams before block number `length`, of the first
    batch entry and of the tokens that the pass has. A pass with a filled one begins there.
    """

    length: int
    streams: AV[torch.Tensor] | None = None


class AdaLayerNorm(nn.Module):
    """AdaLN-single (arXiv:2310.00426): timesteps (N,) -> (modulation (N, rows * dim), embedding (N, dim))."""

    def __init__(self, dim: int, rows: int):
        super().__init__()
        layers = {"linear_1": ReplicatedLinear(TIMESTEP_CHANNELS, dim), "linear_2": ReplicatedLinear(dim, dim)}
        self.emb = nn.ModuleDict({"timestep_embedder": nn.ModuleDict(layers)})
        self.linear = ReplicatedLinear(dim, rows * dim)

    def forward(self, timesteps: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        sinusoids = timestep_sinusoids(timesteps).to(dtype)
        linear_1, linear_2 = self.get_submodule(ADALN_LINEAR_1), self.get_submodule(ADALN_LINEAR_2)
        embedded = linear_2(F.silu(linear_1(sinusoids)))
        return self.linear(F.silu(embedded)), embedded


def timestep_sinusoids(timesteps: torch.Tensor) -> torch.Tensor:
    """(N,) -> (N, 256) float32: cosines, then sines, of 128 frequencies 10000^(-k / 128)."""
    half = TIMESTEP_CHANNELS // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(exponents)[None, :]
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class Transformer(nn.Module):
    """Velocities of video and audio latents. It is built under `torch.device("meta")` and then loaded."""

    def __init__(self, config: TransformerConfig, tp: RankGroup = SINGLE_RANK):
        super().__init__()
        self.config, self.tp = config, tp
        for names, stream in zip(STREAM_NAMES, (config.video, config.audio), strict=True):
            self.add_module(names.patchify, ReplicatedLinear(stream.in_channels, stream.dim))
            self.add_module(names.adaln, AdaLayerNorm(stream.dim, MODULATION_ROWS))
            self.add_module(names.prompt_adaln, AdaLayerNorm(stream.dim, PROMPT_ROWS))
            self.add_module(names.cross_adaln, AdaLayerNorm(stream.dim, CROSS_ROWS))
            self.add_module(names.cross_gate_adaln, AdaLayerNorm(stream.dim, CROSS_GATE_ROWS))
            self.register_parameter(names.output_table, replicated(OUTPUT_ROWS, stream.dim))
            self.add_module(names.proj_out, ReplicatedLinear(stream.dim, stream.out_channels))
        self.transformer_blocks = nn.ModuleList(AVBlock(config, tp) for _ in range(config.num_layers))

    @property
    def blocks(self) -> list[AVBlock]:
        """The blocks in order."""
        return cast(list[AVBlock], list(self.transformer_blocks))

    def ropes(self, positions: AV[torch.Tensor], dtype: torch.dtype) -> AV[tuple[RopeTable, RopeTable]]:
        """Rotary tables of each stream for its tokens' intervals: (of self-attention, of cross-attention).

        They stay the same throughout a stage. Cross-attention looks at time alone, on one grid for both streams.
        """
        config = self.config
        heads = self.tp.slice(config.video.heads)

        def tables(stream: StreamConfig, intervals: torch.Tensor) -> tuple[RopeTable, RopeTable]:
            def table(intervals: torch.Tensor, dim: int, max_pos: tuple[int, ...]) -> RopeTable:
                return rope_table(
                    intervals, dim=dim, heads=stream.heads, max_pos=max_pos, theta=config.rope_theta,
                    float64=config.rope_float64, dtype=dtype, head_slice=heads,
                )  # fmt: skip

            own = table(intervals, stream.dim, stream.max_pos)
            cross = table(intervals[:, 0:1], config.audio.context_dim, (config.cross_max_pos,))
            return own, cross

        return AV(config.video, config.audio).map(tables, positions)

    def forward(
        self,
        inputs: AV[Modality],
        perturbation: Perturbation = NO_PERTURBATION,
        sequence_group: RankGroup = SINGLE_RANK,
        prefix: Prefix | None = None,
    ) -> AV[torch.Tensor]:
        """Velocities (B, T, C_out) of both streams. A `prefix` is left by this pass, or taken over from another.

        The ranks of `sequence_group` hold the same weights and get the same inputs. They divide the video's tokens and
        compute the few audio tokens each for itself. Every rank returns all velocities.
        """
        sharding = None
        if sequence_group.size > 1:
            sharding = SequenceSharding(sequence_group, inputs.video.latent.shape[1])
            inputs = AV(_own_shard(inputs.video, sharding), inputs.audio)
        embedded_streams = inputs.map(self._embed, inputs.swapped(), STREAM_NAMES)
        streams = embedded_streams.map(lambda pair: pair[0])
        timestep_embeddings = embedded_streams.map(lambda pair: pair[1])
        streams.video.sharding = sharding
        first = 0
        if prefix is not None and prefix.streams is not None:
            first = prefix.length
            for s, x in zip(streams, prefix.streams, strict=True):
                s.x = x
        for index, block in enumerate(self.blocks[first:], first):
            if prefix is not None and prefix.streams is None and index == prefix.length:
                prefix.streams = streams.map(lambda s: s.x[:1])
            block(streams, perturbation.values_only.map(lambda blocks, i=index: i in blocks), perturbation.isolated)
        velocities = streams.map(self._project_out, timestep_embeddings, STREAM_NAMES)
        if sharding is None:
            return velocities
        return AV(sharding.gather_tokens(velocities.video), velocities.audio)

    def _embed(self, own: Modality, other: Modality, names: StreamNames) -> tuple[Stream, torch.Tensor]:
        """The stream before the first block, and its timesteps' embedding (B, N, D)."""
        dtype, batch = own.latent.dtype, own.latent.shape[0]
        scale = self.config.timestep_scale
        x = getattr(self, names.patchify)(own.latent)
        timesteps = (own.timesteps * scale).flatten()

        def rows(modulation: torch.Tensor, count: int) -> torch.Tensor:
            return modulation.view(batch, -1, count, x.shape[-1])

        def of_tokens(adaln: AdaLayerNorm) -> tuple[torch.Tensor, ...]:
            if timesteps.numel() > 1 or x.shape[1] == 1:
                return adaln(timesteps, dtype)
            # All tokens share one timestep, for which the reference computes a row for each token. Two equal rows are
            # rounded as many are, while a single row would go through another kernel.
            return tuple(both[:1] for both in adaln(timesteps.expand(2), dtype))

        modulation, embedded = of_tokens(getattr(self, names.adaln))
        prompt_modulation, _ = getattr(self, names.prompt_adaln)((own.sigma * scale).flatten(), dtype)
        # Scale and shift of cross-attention follow the stream's own tokens, its gate the other stream's noise level.
        cross_modulation, _ = of_tokens(getattr(self, names.cross_adaln))
        gate_factor = self.config.av_timestep_scale / scale
        gate_timesteps = (other.sigma * scale * gate_factor).flatten()
        cross_gate, _ = getattr(self, names.cross_gate_adaln)(gate_timesteps, dtype)
        stream = Stream(
            x=x,
            context=own.context,
            rope=own.rope,
            cross_rope=own.cross_rope,
            modulation=rows(modulation, MODULATION_ROWS),
            prompt_modulation=rows(prompt_modulation, PROMPT_ROWS),
            cross_modulation=rows(cross_modulation, CROSS_ROWS),
            cross_gate=rows(cross_gate, CROSS_GATE_ROWS),
            enabled=own.enabled,
        )
        return stream, embedded.view(batch, -1, x.shape[-1])

    def _project_out(self, s: Stream, embedded: torch.Tensor, names: StreamNames) -> torch.Tensor:
        table, proj_out = getattr(self, names.output_table), getattr(self, names.proj_out)
        shift, scale = (table[None, None].to(s.x.dtype) + embedded[:, :, None]).unbind(dim=2)
        return proj_out(modulate(F.layer_norm(s.x, s.x.shape[-1:], eps=self.config.norm_eps), shift, scale))


def _own_shard(video: Modality, sharding: SequenceSharding) -> Modality:
    def own_rows(table: RopeTable) -> RopeTable:
        return RopeTable(sharding.own_shard(table.cos, 2), sharding.own_shard(table.sin, 2))

    one_timestep = video.timesteps.shape[1] == 1
    return replace(
        video,
        latent=sharding.own_shard(video.latent, 1),
        timesteps=video.timesteps if one_timestep else sharding.own_shard(video.timesteps, 1),
        rope=own_rows(video.rope),
        cross_rope=own_rows(video.cross_rope),
    )
