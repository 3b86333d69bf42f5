"""The LTX-2.3 audio-video diffusion transformer, over the ranks of a TPGroup.

Module names are the checkpoint's own. Source: `model.py`, `transformer_args.py`, `adaln.py` and
`timestep_embedding.py` of the reference v1.2.0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ltx_ray.checkpoints.transformer_config import StreamConfig, TransformerConfig
from ltx_ray.model.block import AVBlock, Stream, modulate
from ltx_ray.model.rope import RopeTable, rope_table
from ltx_ray.parallel.layers import Linear, TPGroup, replicated
from ltx_ray.parallel.mesh import Tokens
from ltx_ray.records import AV

_TIMESTEP_CHANNELS = 256


@dataclass(frozen=True)
class Modality:
    """Input of one stream.

    latent (B, T, C); sigma (B,), the stream's noise level; timesteps (B, 1) when all tokens are at
    one level, else (B, T); context (B, S, D); ropes from `Transformer.ropes`. With `level_of` (T,) int32,
    which only the fused path reads, timesteps are (B, L) levels and it says which of them a token has.
    """

    latent: torch.Tensor
    sigma: torch.Tensor
    timesteps: torch.Tensor
    context: torch.Tensor
    rope: RopeTable
    cross_rope: RopeTable
    enabled: bool = True
    level_of: torch.Tensor | None = None


@dataclass(frozen=True)
class Perturbation:
    """What a guidance pass takes away: self-attention in some blocks, or the bridge between streams."""

    values_only: AV[frozenset[int]] = AV(frozenset(), frozenset())  # noqa: RUF009 (immutable)
    isolated: bool = False


NO_PERTURBATION = Perturbation()


class AdaLayerNorm(nn.Module):
    """Timestep (N,) -> (modulation (N, rows * dim), embedding (N, dim))."""

    def __init__(self, dim: int, rows: int):
        super().__init__()
        embedder = nn.Module()
        embedder.linear_1 = Linear(_TIMESTEP_CHANNELS, dim)
        embedder.linear_2 = Linear(dim, dim)
        self.emb = nn.Module()
        self.emb.timestep_embedder = embedder
        self.linear = Linear(dim, rows * dim)

    def forward(self, timesteps: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        waves = timestep_waves(timesteps).to(dtype)
        embedder = self.emb.timestep_embedder
        embedded = embedder.linear_2(F.silu(embedder.linear_1(waves)))
        return self.linear(F.silu(embedded)), embedded


def timestep_waves(timesteps: torch.Tensor) -> torch.Tensor:
    """(N,) -> (N, 256) float32: cosines, then sines, of 128 frequencies from 1 down to 1/10000."""
    half = _TIMESTEP_CHANNELS // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(exponents)[None, :]
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class Transformer(nn.Module):
    """Velocity of video and audio latents. Build it under `torch.device("meta")`, then load it."""

    def __init__(self, config: TransformerConfig, tp: TPGroup = TPGroup()):  # noqa: B008 (frozen)
        super().__init__()
        self.config, self.tp = config, tp
        video, audio = config.video, config.audio
        self.patchify_proj = Linear(video.in_channels, video.dim)
        self.audio_patchify_proj = Linear(audio.in_channels, audio.dim)
        self.adaln_single = AdaLayerNorm(video.dim, 9)
        self.audio_adaln_single = AdaLayerNorm(audio.dim, 9)
        self.prompt_adaln_single = AdaLayerNorm(video.dim, 2)
        self.audio_prompt_adaln_single = AdaLayerNorm(audio.dim, 2)
        self.av_ca_video_scale_shift_adaln_single = AdaLayerNorm(video.dim, 4)
        self.av_ca_audio_scale_shift_adaln_single = AdaLayerNorm(audio.dim, 4)
        self.av_ca_a2v_gate_adaln_single = AdaLayerNorm(video.dim, 1)
        self.av_ca_v2a_gate_adaln_single = AdaLayerNorm(audio.dim, 1)
        self.transformer_blocks = nn.ModuleList(AVBlock(config, tp) for _ in range(config.num_layers))
        self.scale_shift_table = replicated(2, video.dim)
        self.audio_scale_shift_table = replicated(2, audio.dim)
        self.proj_out = Linear(video.dim, video.out_channels)
        self.audio_proj_out = Linear(audio.dim, audio.out_channels)

    def ropes(self, positions: AV[torch.Tensor], dtype: torch.dtype) -> AV[tuple[RopeTable, RopeTable]]:
        """(own, cross) rotary tables of each stream for its token intervals; constant over a clip.

        The cross tables look at time alone, on one grid for both streams.
        """
        config = self.config
        heads = self.tp.slice(config.video.heads)

        def tables(stream: StreamConfig, where: torch.Tensor) -> tuple[RopeTable, RopeTable]:
            def table(intervals: torch.Tensor, dim: int, max_pos: tuple[int, ...]) -> RopeTable:
                return rope_table(
                    intervals, dim=dim, heads=stream.heads, max_pos=max_pos, theta=config.rope_theta,
                    float64=config.rope_float64, dtype=dtype, head_slice=heads,
                )  # fmt: skip

            own = table(where, stream.dim, stream.max_pos)
            cross = table(where[:, 0:1], config.audio.context_dim, (config.cross_max_pos,))
            return own, cross

        return AV(config.video, config.audio).map(tables, positions)

    def forward(
        self,
        inputs: AV[Modality],
        perturbation: Perturbation = NO_PERTURBATION,
        spread: TPGroup = TPGroup(),  # noqa: B008 (frozen)
    ) -> AV[torch.Tensor]:
        """Velocities (B, T, C_out) of both streams.

        The ranks of `spread`, which hold the same weights and get the same inputs, share the video's
        tokens out; the few of the audio each computes itself. Every rank returns everything.
        """
        tokens = Tokens(spread, inputs.video.latent.shape[1]) if spread.size > 1 else None
        if tokens is not None:
            inputs = AV(_own_part(inputs.video, tokens), inputs.audio)
        video, v_embedded = self._enter(
            inputs.video, inputs.audio, self.patchify_proj, self.adaln_single, self.prompt_adaln_single,
            self.av_ca_video_scale_shift_adaln_single, self.av_ca_a2v_gate_adaln_single,
        )  # fmt: skip
        audio, a_embedded = self._enter(
            inputs.audio, inputs.video, self.audio_patchify_proj, self.audio_adaln_single,
            self.audio_prompt_adaln_single, self.av_ca_audio_scale_shift_adaln_single, self.av_ca_v2a_gate_adaln_single,
        )  # fmt: skip
        video.tokens = tokens
        streams = AV(video, audio)
        for index, block in enumerate(self.transformer_blocks):
            block(streams, perturbation.values_only.map(lambda blocks, i=index: i in blocks), perturbation.isolated)
        v_out = self._leave(video.x, v_embedded, self.scale_shift_table, self.proj_out)
        a_out = self._leave(audio.x, a_embedded, self.audio_scale_shift_table, self.audio_proj_out)
        return AV(v_out if tokens is None else tokens.gather(v_out), a_out)

    def _enter(
        self,
        own: Modality,
        other: Modality,
        patchify: Linear,
        adaln: AdaLayerNorm,
        prompt_adaln: AdaLayerNorm,
        cross_adaln: AdaLayerNorm,
        gate_adaln: AdaLayerNorm,
    ) -> tuple[Stream, torch.Tensor]:
        dtype, batch = own.latent.dtype, own.latent.shape[0]
        scale = self.config.timestep_scale
        x = patchify(own.latent)
        timesteps = (own.timesteps * scale).flatten()

        def rows(modulation: torch.Tensor, count: int) -> torch.Tensor:
            return modulation.view(batch, -1, count, x.shape[-1])

        def of_tokens(layer: AdaLayerNorm) -> tuple[torch.Tensor, ...]:
            if timesteps.numel() > 1 or x.shape[1] == 1:
                return layer(timesteps, dtype)
            # one level for all tokens, where the reference has a row for each: two equal rows round as many do,
            # a single one goes through another kernel
            return tuple(both[:1] for both in layer(timesteps.expand(2), dtype))

        modulation, embedded = of_tokens(adaln)
        prompt_modulation, _ = prompt_adaln((own.sigma * scale).flatten(), dtype)
        # scale and shift of the bridge follow the stream's own tokens, its gate the other's noise level
        cross_modulation, _ = of_tokens(cross_adaln)
        gate_factor = self.config.av_timestep_scale / scale
        cross_gate, _ = gate_adaln((other.sigma * scale * gate_factor).flatten(), dtype)
        stream = Stream(
            x=x,
            context=own.context,
            rope=own.rope,
            cross_rope=own.cross_rope,
            modulation=rows(modulation, 9),
            prompt_modulation=rows(prompt_modulation, 2),
            cross_modulation=rows(cross_modulation, 4),
            cross_gate=rows(cross_gate, 1),
            enabled=own.enabled,
        )
        return stream, embedded.view(batch, -1, x.shape[-1])

    def _leave(self, x: torch.Tensor, embedded: torch.Tensor, table: torch.Tensor, project: Linear) -> torch.Tensor:
        shift, scale = (table[None, None].to(x.dtype) + embedded[:, :, None]).unbind(dim=2)
        return project(modulate(F.layer_norm(x, x.shape[-1:], eps=self.config.norm_eps), shift, scale))


def _own_part(video: Modality, tokens: Tokens) -> Modality:
    def part(table: RopeTable) -> RopeTable:
        return RopeTable(tokens.split(table.cos, 2), tokens.split(table.sin, 2))

    alike = video.timesteps.shape[1] == 1
    return replace(
        video,
        latent=tokens.split(video.latent, 1),
        timesteps=video.timesteps if alike else tokens.split(video.timesteps, 1),
        rope=part(video.rope),
        cross_rope=part(video.cross_rope),
    )
