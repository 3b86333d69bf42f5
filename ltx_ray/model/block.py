"""One block of the DiT: two streams that attend to themselves, to the text and to each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ltx_ray.checkpoints.transformer_config import StreamConfig, TransformerConfig
from ltx_ray.model.attention import Attention
from ltx_ray.model.rope import RopeTable
from ltx_ray.parallel.layers import ColumnLinear, RowLinear, TPGroup, replicated
from ltx_ray.parallel.mesh import Tokens
from ltx_ray.records import AV


@dataclass
class Stream:
    """A modality inside the model. N is 1 when all its tokens share a timestep, else T.

    x (B, T, D); context (B, S, D); modulation (B, N, 9, D); prompt_modulation (B, 1, 2, D);
    cross_modulation (B, N, 4, D); cross_gate (B, 1, 1, D). With `tokens`, T counts this rank's part of them.
    """

    x: torch.Tensor
    context: torch.Tensor
    rope: RopeTable
    cross_rope: RopeTable
    modulation: torch.Tensor
    prompt_modulation: torch.Tensor
    cross_modulation: torch.Tensor
    cross_gate: torch.Tensor
    enabled: bool = True
    tokens: Tokens | None = None


class FeedForward(nn.Module):
    """D -> 4D -> D with tanh-approximated GELU, the hidden part divided over the ranks."""

    def __init__(self, dim: int, tp: TPGroup):
        super().__init__()
        # the checkpoint numbers the layers net.0.proj and net.2
        up = nn.Module()
        up.proj = ColumnLinear(dim, 4 * dim, tp)
        self.net = nn.ModuleDict({"0": up, "2": RowLinear(4 * dim, dim, tp)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net["2"](F.gelu(self.net["0"].proj(x), approximate="tanh"))


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last axis, without weights."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale) + shift


def _table_rows(table: torch.Tensor, modulation: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
    """The block's table plus the timestep's modulation, rows `rows` (within the table): (B, N, D) each."""
    return (table[None, None, rows].to(modulation.dtype) + modulation).unbind(dim=2)


class AVBlock(nn.Module):
    """Source: `transformer.py` of the reference v1.2.0 (`BasicAVTransformerBlock`)."""

    def __init__(self, config: TransformerConfig, tp: TPGroup):
        super().__init__()
        video, audio, eps = config.video, config.audio, config.norm_eps
        self.eps = eps

        def attend(to: StreamConfig, context_dim: int, heads_of: StreamConfig) -> Attention:
            return Attention(to.dim, context_dim, heads_of.heads, heads_of.head_dim, eps, tp)

        self.attn1 = attend(video, video.dim, video)
        self.attn2 = attend(video, video.context_dim, video)
        self.ff = FeedForward(video.dim, tp)
        self.scale_shift_table = replicated(9, video.dim)
        self.prompt_scale_shift_table = replicated(2, video.dim)
        self.audio_attn1 = attend(audio, audio.dim, audio)
        self.audio_attn2 = attend(audio, audio.context_dim, audio)
        self.audio_ff = FeedForward(audio.dim, tp)
        self.audio_scale_shift_table = replicated(9, audio.dim)
        self.audio_prompt_scale_shift_table = replicated(2, audio.dim)
        # across the streams, attention is as wide as the audio's
        self.audio_to_video_attn = attend(video, audio.dim, audio)
        self.video_to_audio_attn = attend(audio, video.dim, audio)
        self.scale_shift_table_a2v_ca_video = replicated(5, video.dim)
        self.scale_shift_table_a2v_ca_audio = replicated(5, audio.dim)

    def forward(self, streams: AV[Stream], values_only: AV[bool], isolated: bool) -> None:
        """Update both streams' `x` in place of the old ones.

        `values_only` says whose self-attention is perturbed; `isolated` keeps the streams apart.
        A disabled stream is not updated, but the other still attends to it.
        """
        video, audio = streams
        if video.enabled:
            self._attend_self_and_text(
                video, self.attn1, self.attn2, self.scale_shift_table, self.prompt_scale_shift_table, values_only.video
            )
        if audio.enabled:
            self._attend_self_and_text(
                audio, self.audio_attn1, self.audio_attn2, self.audio_scale_shift_table,
                self.audio_prompt_scale_shift_table, values_only.audio,
            )  # fmt: skip
        if not isolated:
            self._attend_across(video, audio)
        if video.enabled:
            self._feed_forward(video, self.ff, self.scale_shift_table)
        if audio.enabled:
            self._feed_forward(audio, self.audio_ff, self.audio_scale_shift_table)

    def _attend_self_and_text(
        self,
        s: Stream,
        to_self: Attention,
        to_text: Attention,
        table: torch.Tensor,
        prompt_table: torch.Tensor,
        values_only: bool,
    ) -> None:
        shift, scale, gate = _table_rows(table, s.modulation[:, :, 0:3], slice(0, 3))
        attended = to_self(
            modulate(rms_norm(s.x, self.eps), shift, scale),
            q_rope=s.rope,
            values_only=values_only,
            x_tokens=s.tokens,
            context_tokens=s.tokens,
        )
        x = s.x + attended * gate
        shift, scale, gate = _table_rows(table, s.modulation[:, :, 6:9], slice(6, 9))
        shift_kv, scale_kv = _table_rows(prompt_table, s.prompt_modulation, slice(0, 2))
        queries = modulate(rms_norm(x, self.eps), shift, scale)
        s.x = x + to_text(queries, modulate(s.context, shift_kv, scale_kv), x_tokens=s.tokens) * gate

    def _attend_across(self, video: Stream, audio: Stream) -> None:
        # both directions read the streams as they were before either wrote
        video_normed, audio_normed = rms_norm(video.x, self.eps), rms_norm(audio.x, self.eps)
        video_table, audio_table = self.scale_shift_table_a2v_ca_video, self.scale_shift_table_a2v_ca_audio

        def scaled(normed: torch.Tensor, s: Stream, table: torch.Tensor, rows: slice) -> torch.Tensor:
            scale, shift = _table_rows(table, s.cross_modulation[:, :, rows], rows)
            return modulate(normed, shift, scale)

        if video.enabled:
            (gate,) = _table_rows(video_table, video.cross_gate, slice(4, 5))
            attended = self.audio_to_video_attn(
                scaled(video_normed, video, video_table, slice(0, 2)),
                scaled(audio_normed, audio, audio_table, slice(0, 2)),
                q_rope=video.cross_rope,
                k_rope=audio.cross_rope,
                x_tokens=video.tokens,
                context_tokens=audio.tokens,
            )
            video.x = video.x + attended * gate
        if audio.enabled:
            (gate,) = _table_rows(audio_table, audio.cross_gate, slice(4, 5))
            attended = self.video_to_audio_attn(
                scaled(audio_normed, audio, audio_table, slice(2, 4)),
                scaled(video_normed, video, video_table, slice(2, 4)),
                q_rope=audio.cross_rope,
                k_rope=video.cross_rope,
                x_tokens=audio.tokens,
                context_tokens=video.tokens,
            )
            audio.x = audio.x + attended * gate

    def _feed_forward(self, s: Stream, ff: FeedForward, table: torch.Tensor) -> None:
        shift, scale, gate = _table_rows(table, s.modulation[:, :, 3:6], slice(3, 6))
        s.x = s.x + ff(modulate(rms_norm(s.x, self.eps), shift, scale)) * gate
