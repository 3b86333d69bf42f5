"""One block of the transformer: two streams that attend to themselves, to the text and to each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ltx_ray.checkpoints.transformer_config import StreamConfig, TransformerConfig
from ltx_ray.checkpoints.transformer_keys import (
    AUDIO,
    CROSS_GATE_ROWS,
    CROSS_ROWS,
    FEED_FORWARD_DOWN,
    FEED_FORWARD_FACTOR,
    FEED_FORWARD_UP,
    MODULATION_ROWS,
    PROMPT_ROWS,
    VIDEO,
    StreamNames,
)
from ltx_ray.model.attention import Attention
from ltx_ray.model.packed_linear import PackedLinears
from ltx_ray.model.rope import RopeTable
from ltx_ray.parallel.collectives import RankGroup
from ltx_ray.parallel.layers import ColumnParallelLinear, RowParallelLinear, replicated
from ltx_ray.parallel.mesh import SequenceSharding
from ltx_ray.records import AV

#: What each stream's modules and tables are called.
STREAM_NAMES = AV(VIDEO, AUDIO)
#: Rows of a block's modulation, each (shift, scale, gate), as docs/ltx-2.3.md#transformer lists them.
SELF_ATTENTION_ROWS, FEED_FORWARD_ROWS, TEXT_ATTENTION_ROWS = slice(0, 3), slice(3, 6), slice(6, 9)
#: Rows of the modulation of cross-attention, each (scale, shift), by the stream that receives.
CROSS_ATTENTION_ROWS = AV(slice(0, 2), slice(2, 4))
#: Row of the same table that holds the gate.
CROSS_GATE_ROW = slice(CROSS_ROWS, CROSS_ROWS + CROSS_GATE_ROWS)


@dataclass
class Stream:
    """A modality inside the transformer. N is 1 when all of its tokens share a timestep, and T otherwise.

    x (B, T, D); context (B, S, D); modulation (B, N, 9, D); prompt_modulation (B, 1, 2, D); cross_modulation
    (B, N, 4, D); cross_gate (B, 1, 1, D). With `sharding`, the T tokens are those of this rank.
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
    sharding: SequenceSharding | None = None


class FeedForward(nn.Module):
    """D -> 4D -> D with GELU approximated by tanh. The hidden features are divided over the tensor-parallel ranks."""

    def __init__(self, dim: int, tp: RankGroup):
        super().__init__()
        hidden = FEED_FORWARD_FACTOR * dim
        # The checkpoint names the layers net.0.proj and net.2.
        up = nn.ModuleDict({"proj": ColumnParallelLinear(dim, hidden, tp)})
        self.net = nn.ModuleDict({"0": up, "2": RowParallelLinear(hidden, dim, tp)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = self.get_submodule(FEED_FORWARD_UP), self.get_submodule(FEED_FORWARD_DOWN)
        return down(F.gelu(up(x), approximate="tanh"))


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last axis, without weights."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x * (1 + scale) + shift."""
    return x * (1 + scale) + shift


class AVBlock(nn.Module):
    """A block of both streams. Source: `BasicAVTransformerBlock` in `ltx_core/model/transformer/transformer.py` of the
    reference v1.2.0; docs/ltx-2.3.md#transformer."""

    #: Packed layers of the fused path, which packing.pack_linears sets.
    packed_linears: PackedLinears

    def __init__(self, config: TransformerConfig, tp: RankGroup):
        super().__init__()
        self.eps = config.norm_eps
        streams = AV(config.video, config.audio)
        # Attention between the streams is as wide as the audio stream, in both directions.
        for names, stream, other in zip(STREAM_NAMES, streams, streams.swapped(), strict=True):
            self.add_module(names.self_attention, self._attention(stream, stream.dim, stream, tp))
            self.add_module(names.text_attention, self._attention(stream, stream.context_dim, stream, tp))
            self.add_module(names.cross_attention, self._attention(stream, other.dim, config.audio, tp))
            self.add_module(names.feed_forward, FeedForward(stream.dim, tp))
            self.register_parameter(names.table, replicated(MODULATION_ROWS, stream.dim))
            self.register_parameter(names.prompt_table, replicated(PROMPT_ROWS, stream.dim))
            self.register_parameter(names.cross_table, replicated(CROSS_ROWS + CROSS_GATE_ROWS, stream.dim))

    def _attention(self, to: StreamConfig, context_dim: int, heads_of: StreamConfig, tp: RankGroup) -> Attention:
        return Attention(to.dim, context_dim, heads_of.heads, heads_of.head_dim, self.eps, tp)

    def _modulation(self, table: str, modulation: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
        """`rows` of the block's `table` plus the same rows of the timestep's `modulation`: (B, N, D) each."""
        return (getattr(self, table)[None, None, rows].to(modulation.dtype) + modulation).unbind(dim=2)

    def forward(self, streams: AV[Stream], values_only: AV[bool], isolated: bool) -> None:
        """Replace the `x` of both streams.

        `values_only` perturbs a stream's self-attention. `isolated` leaves out the attention between the streams. A
        disabled stream is not updated, but the other one still attends to it.
        """
        streams.map(self._attend_to_self_and_text, STREAM_NAMES, values_only)
        if not isolated:
            self._attend_across(streams)
        streams.map(self._feed_forward, STREAM_NAMES)

    def _attend_to_self_and_text(self, s: Stream, names: StreamNames, values_only: bool) -> None:
        if not s.enabled:
            return
        self_attention, text_attention = getattr(self, names.self_attention), getattr(self, names.text_attention)
        shift, scale, gate = self._modulation(names.table, s.modulation[:, :, SELF_ATTENTION_ROWS], SELF_ATTENTION_ROWS)
        attended = self_attention(
            modulate(rms_norm(s.x, self.eps), shift, scale),
            q_rope=s.rope,
            values_only=values_only,
            x_sharding=s.sharding,
            context_sharding=s.sharding,
        )
        x = s.x + attended * gate
        shift, scale, gate = self._modulation(names.table, s.modulation[:, :, TEXT_ATTENTION_ROWS], TEXT_ATTENTION_ROWS)
        prompt_shift, prompt_scale = self._modulation(names.prompt_table, s.prompt_modulation, slice(0, 2))
        queries = modulate(rms_norm(x, self.eps), shift, scale)
        text = modulate(s.context, prompt_shift, prompt_scale)
        s.x = x + text_attention(queries, text, x_sharding=s.sharding) * gate

    def _attend_across(self, streams: AV[Stream]) -> None:
        # Both directions read the streams as they were before either was written.
        normed = streams.map(lambda s: rms_norm(s.x, self.eps))

        def attend(
            s: Stream,
            names: StreamNames,
            x: torch.Tensor,
            other: Stream,
            other_names: StreamNames,
            other_x: torch.Tensor,
            rows: slice,
        ) -> None:
            if not s.enabled:
                return

            def modulated(x: torch.Tensor, s: Stream, names: StreamNames) -> torch.Tensor:
                scale, shift = self._modulation(names.cross_table, s.cross_modulation[:, :, rows], rows)
                return modulate(x, shift, scale)

            (gate,) = self._modulation(names.cross_table, s.cross_gate, CROSS_GATE_ROW)
            attended = getattr(self, names.cross_attention)(
                modulated(x, s, names),
                modulated(other_x, other, other_names),
                q_rope=s.cross_rope,
                k_rope=other.cross_rope,
                x_sharding=s.sharding,
                context_sharding=other.sharding,
            )
            s.x = s.x + attended * gate

        streams.map(
            attend, STREAM_NAMES, normed, streams.swapped(), STREAM_NAMES.swapped(), normed.swapped(),
            CROSS_ATTENTION_ROWS,
        )  # fmt: skip

    def _feed_forward(self, s: Stream, names: StreamNames) -> None:
        if not s.enabled:
            return
        feed_forward = getattr(self, names.feed_forward)
        shift, scale, gate = self._modulation(names.table, s.modulation[:, :, FEED_FORWARD_ROWS], FEED_FORWARD_ROWS)
        s.x = s.x + feed_forward(modulate(rms_norm(s.x, self.eps), shift, scale)) * gate
