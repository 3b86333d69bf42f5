"""A block of the fused path: packed layers, fused steps between them, and the exchanges of a gang's ranks.

A residual is not added where it arises, but by the step that reads the stream next. Tensor-parallel ranks divide the
rows of a stream between the sharded layers (mesh.RowSharding): partial products are summed by a reduce-scatter, and the
modulated rows are gathered. Ranks that divide the video's tokens (mesh.SequenceSharding) exchange them for heads around
the attention that needs all of them. A single rank does neither.

All exchanges are issued from the video's CUDA stream, by every rank in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from types import ModuleType

import torch

from ltx_ray.checkpoints.transformer_keys import StreamNames
from ltx_ray.model import steps
from ltx_ray.model.attention_backends import Attend
from ltx_ray.model.audio_stream import AudioCudaStream
from ltx_ray.model.block import (
    CROSS_ATTENTION_ROWS,
    FEED_FORWARD_ROWS,
    SELF_ATTENTION_ROWS,
    TEXT_ATTENTION_ROWS,
    AVBlock,
)
from ltx_ray.model.modulations import ModulationTables
from ltx_ray.model.packed_linear import PackedLinear
from ltx_ray.model.rope import RopeTable
from ltx_ray.model.steps import Activations, Modulation, Norm, QuantizedRows, Residual, TokenLevels
from ltx_ray.parallel.collectives import Pending, RankGroup
from ltx_ray.parallel.fp8 import FP8
from ltx_ray.parallel.mesh import RowSharding, SequenceSharding
from ltx_ray.records import AV


@dataclass(frozen=True)
class PendingResidual:
    """What is still to be added to a stream: value (R, D), which may be on its way, times gate (L, D) or (1, D)."""

    value: Pending[torch.Tensor]
    gate: torch.Tensor


@dataclass
class FusedStream:
    """A modality inside the blocks: x (R, D), to which `residual` is still to be added, and the text (S, D_text).

    With `tokens`, the T tokens of each batch entry, and the rows of `rope` and `cross_rope`, are those of this rank.
    The R rows of x, and their `levels`, are this tensor-parallel rank's part of the B * T rows (`rows`).
    """

    names: StreamNames
    x: torch.Tensor
    context: torch.Tensor
    rope: RopeTable
    cross_rope: RopeTable
    levels: TokenLevels | None
    tables: ModulationTables
    enabled: bool
    batch: int
    rows: RowSharding
    tokens: SequenceSharding | None = None
    residual: PendingResidual | None = None


@dataclass(frozen=True)
class _HeadNorm:
    """Queries or keys (R, heads * D) that are normed and rotated together, each with its weight.

    `names`: the modality in whose CUDA stream they are.
    """

    names: StreamNames
    parts: list[tuple[torch.Tensor, torch.Tensor]]
    heads: int
    rope: RopeTable | None


@dataclass
class _Attention:
    """An attention of the stream `s`: what its layers made of their inputs, for the heads of this rank.

    q, k, v (R, heads * D), logits (R, heads). Without q and k the values pass unattended. `exchanged_v`: the values of
    all tokens and some heads, where ranks divide the tokens.
    """

    s: FusedStream
    heads: int
    out: PackedLinear
    norms: list[_HeadNorm]
    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    exchanged_v: Pending[tuple[torch.Tensor, ...]] | None = None


class FusedBlocks:
    """Runs blocks on both streams. `tp` shares the weights, and `fused_steps` is the module steps or kernels."""

    def __init__(self, attend: Attend, fused_steps: ModuleType, audio: AudioCudaStream, tp: RankGroup, eps: float):
        self._attend, self._steps, self._audio, self._tp, self._eps = attend, fused_steps, audio, tp, eps
        #: Tensors of one CUDA stream that the other may still read, until the two meet.
        self._held: list[object] = []

    def run(self, streams: AV[FusedStream], block: AVBlock, index: int, values_only: AV[bool], isolated: bool) -> None:
        """Advance both streams by block number `index`, perturbed as `AVBlock.forward` says."""
        perturbed = [s for s, values_only in zip(streams, values_only, strict=True) if values_only]
        enabled = [s for s in streams if s.enabled]
        self._attend_to_self(enabled, perturbed, block, index)
        self._attend_to_text(enabled, block, index)
        if not isolated:
            self._attend_across(streams, block, index)
        self._feed_forward(enabled, block, index)

    def normed(self, s: FusedStream, modulations: Sequence[Modulation], norm: Norm = "rms") -> list[Activations]:
        """This rank's rows of the stream, normed and modulated, after its residual has been added to them."""
        pending, s.residual = s.residual, None
        with self._audio.running(s.names):
            residual = None if pending is None else Residual(pending.value.wait(), pending.gate)
            if self._tp.size > 1:
                self._held.append(residual)
            return self._steps.add_norm_modulate(s.x, residual, list(modulations), s.levels, norm, self._eps)

    def first_entry(self, s: FusedStream) -> torch.Tensor:
        """A copy of the first batch entry's x (T, D), with all that has been added to it."""
        if s.residual is not None:
            self.normed(s, [])
        if self._tp.size > 1:
            self._meet()
            return s.rows.gather(s.x)[: s.rows.length // s.batch].contiguous()
        with self._audio.running(s.names):
            return s.x[: len(s.x) // s.batch].clone()

    # --- the parts of a block --------------------------------------------------------------------

    def _attend_to_self(
        self, enabled: list[FusedStream], perturbed: list[FusedStream], block: AVBlock, index: int
    ) -> None:
        def modulation(s: FusedStream) -> Modulation:
            shift, scale, _ = s.tables.own[index, :, SELF_ATTENTION_ROWS].unbind(1)
            return Modulation(shift, scale, block.packed_linears[s.names.self_attention, "qkv"].quantized)

        inputs = self._inputs((s, [modulation(s)]) for s in enabled)
        attentions = []
        for s, (h,) in zip(enabled, inputs, strict=True):
            with self._audio.running(s.names):
                attentions.append(self._project_self(s, block, h, any(s is other for other in perturbed)))
        means = self._start_head_means(attentions)
        for attention, (h,) in zip(attentions, inputs, strict=True):
            s, packed = attention.s, block.packed_linears
            with self._audio.running(s.names):
                if attention.v is None:
                    attention.v = _values(packed[s.names.self_attention, "qkv"], h)
                gates = packed[s.names.self_attention, "gates"]
                (attention.logits,) = gates.split(steps.linear(h, gates))
        self._norm_heads(attentions, means)
        outs = []
        for attention in attentions:
            with self._audio.running(attention.s.names):
                outs.append(self._self_heads_out(attention))
        self._add_projected(attentions, outs, [s.tables.own[index, :, SELF_ATTENTION_ROWS][:, 2] for s in enabled])

    def _project_self(self, s: FusedStream, block: AVBlock, h: Activations, values_only: bool) -> _Attention:
        """Queries and keys, and where they come with them or are to be exchanged, the values."""
        name = s.names.self_attention
        module, qkv = getattr(block, name), block.packed_linears[name, "qkv"]
        attention = _Attention(s, module.heads, block.packed_linears[name, "out"], [])
        if s.tokens is None and self._tp.size == 1:
            attention.q, attention.k, attention.v = qkv.split(steps.linear(h, qkv))
        if values_only:
            attention.q = attention.k = None
            return attention
        if s.tokens is not None:
            # The exchange of the values takes place during the product of queries and keys.
            attention.v = _values(qkv, h)
            attention.exchanged_v = s.tokens.start_rows_to_heads([attention.v], s.batch, module.heads)
        if attention.q is None or attention.k is None:
            q_k = qkv.part(0, 2)
            attention.q, attention.k = q_k.split(steps.linear(h, q_k))
        parts = [(attention.q, module.q_norm.weight), (attention.k, module.k_norm.weight)]
        attention.norms.append(_HeadNorm(s.names, parts, module.heads, s.rope))
        return attention

    def _self_heads_out(self, attention: _Attention) -> torch.Tensor:
        s, q, k, v, heads = attention.s, attention.q, attention.k, attention.v, attention.heads
        assert v is not None
        if q is None or k is None:
            return v.unflatten(1, (heads, -1))
        if s.tokens is None:
            return self._heads_out(q, k, v, heads, s.batch)
        q, k = s.tokens.start_rows_to_heads([q, k], s.batch, heads).wait()
        assert attention.exchanged_v is not None
        (v,) = attention.exchanged_v.wait()
        return s.tokens.start_heads_to_rows(self._attend(q, k, v)).wait()

    def _attend_to_text(self, enabled: list[FusedStream], block: AVBlock, index: int) -> None:
        packed = block.packed_linears

        def modulation(s: FusedStream) -> Modulation:
            shift, scale, _ = s.tables.own[index, :, TEXT_ATTENTION_ROWS].unbind(1)
            return Modulation(shift, scale, packed[s.names.text_attention, "q_gates"].quantized)

        attentions = []
        inputs = self._inputs((s, [modulation(s)]) for s in enabled)
        for s, (h,) in zip(enabled, inputs, strict=True):
            shift, scale = s.tables.prompt[index].unbind(1)
            name = s.names.text_attention
            with self._audio.running(s.names):
                (context,) = self._steps.add_norm_modulate(
                    s.context, None, [Modulation(shift, scale, packed[name, "kv"].quantized)], None, None, self._eps
                )
                attention = self._queries(s, block, name, h, None)
                self._keys_and_values(attention, block, name, context, s.names, None)
            attentions.append(attention)
        self._norm_heads(attentions, self._start_head_means(attentions))
        outs = []
        for attention in attentions:
            with self._audio.running(attention.s.names):
                outs.append(self._cross_heads_out(attention))
        self._add_projected(attentions, outs, [s.tables.own[index, :, TEXT_ATTENTION_ROWS][:, 2] for s in enabled])

    def _attend_across(self, streams: AV[FusedStream], block: AVBlock, index: int) -> None:
        """Attention from each enabled stream to the other.

        Both directions read the streams as they were before either was written, so each stream is normed once, and
        modulated for every direction in which it takes part.
        """
        directions = zip(streams, streams.swapped(), CROSS_ATTENTION_ROWS, strict=True)
        receivers = [(s, other, rows) for s, other, rows in directions if s.enabled]

        def modulations(s: FusedStream) -> list[Modulation]:
            def modulation(receiver: FusedStream, rows: slice) -> Modulation:
                layer = block.packed_linears[receiver.names.cross_attention, "q_gates" if receiver is s else "kv"]
                scale, shift = s.tables.cross[index, :, rows].unbind(1)
                return Modulation(shift, scale, layer.quantized)

            return [modulation(receiver, rows) for receiver, _, rows in receivers]

        inputs = AV(*self._inputs((s, modulations(s)) for s in streams))
        self._meet()
        attentions = []
        for number, (s, other, _) in enumerate(receivers):
            own, others = inputs if s is streams.video else inputs.swapped()
            name = s.names.cross_attention
            # Keys and values of divided tokens will be exchanged, from the video's CUDA stream.
            reader = s.names if other.tokens is None else other.names
            with self._audio.running(s.names):
                attention = self._queries(s, block, name, own[number], s.cross_rope)
            with self._audio.running(reader):
                self._keys_and_values(attention, block, name, others[number], reader, other.cross_rope)
            attentions.append(attention)
        self._norm_heads(attentions, self._start_head_means(attentions))
        outs = self._across_heads_out(attentions, [other.tokens for _, other, _ in receivers])
        self._add_projected(attentions, outs, [s.tables.cross_gate[index, :, 0] for s, _, _ in receivers])
        # Both CUDA streams read `inputs`, whose life ends here.
        self._meet()

    def _across_heads_out(
        self, attentions: list[_Attention], divided: list[SequenceSharding | None]
    ) -> list[torch.Tensor]:
        """Of each attention to the other stream, whose tokens may be divided: (B * T, heads, D)."""

        def exchanged(a: _Attention, tokens: SequenceSharding | None) -> Pending[tuple[torch.Tensor, ...]] | None:
            assert a.k is not None and a.v is not None
            return None if tokens is None else tokens.start_rows_to_heads([a.k, a.v], a.s.batch, a.heads)

        exchanges = [exchanged(attention, tokens) for attention, tokens in zip(attentions, divided, strict=True)]
        if any(exchanges):
            self._meet()
        outs = []
        for attention, tokens, exchange in zip(attentions, divided, exchanges, strict=True):
            with self._audio.running(attention.s.names):
                if tokens is None or exchange is None:
                    outs.append(self._cross_heads_out(attention))
                    continue
                k, v = exchange.wait()
                self._held.append((k, v))
                assert attention.q is not None
                q = attention.q.unflatten(0, (attention.s.batch, -1)).unflatten(2, (attention.heads, -1))
                outs.append(self._attend(q[:, :, tokens.group.slice(attention.heads)], k, v))
        for number, tokens in enumerate(divided):
            if tokens is not None:
                self._meet(outs[number])
                by_rank = tokens.group.gather(outs[number][None])
                outs[number] = by_rank.permute(1, 2, 0, 3, 4).flatten(2, 3).flatten(0, 1)
                self._meet()
        return outs

    def _feed_forward(self, enabled: list[FusedStream], block: AVBlock, index: int) -> None:
        def modulation(s: FusedStream) -> Modulation:
            shift, scale, _ = s.tables.own[index, :, FEED_FORWARD_ROWS].unbind(1)
            return Modulation(shift, scale, block.packed_linears[s.names.feed_forward, "up"].quantized)

        partials = []
        inputs = self._inputs((s, [modulation(s)]) for s in enabled)
        for s, (h,) in zip(enabled, inputs, strict=True):
            up, down = (block.packed_linears[s.names.feed_forward, part] for part in ("up", "down"))
            with self._audio.running(s.names):
                if up.quantized or down.quantized:
                    hidden = self._steps.gelu(steps.linear(h, up), down.quantized)
                else:
                    hidden = self._steps.linear_gelu(h, up)
                partials.append(steps.linear(hidden, down))
        self._add(enabled, partials, [s.tables.own[index, :, FEED_FORWARD_ROWS][:, 2] for s in enabled])

    # --- what they consist of --------------------------------------------------------------------

    def _queries(self, s: FusedStream, block: AVBlock, name: str, h: Activations, rope: RopeTable | None) -> _Attention:
        module, layer = getattr(block, name), block.packed_linears[name, "q_gates"]
        attention = _Attention(s, module.heads, block.packed_linears[name, "out"], [])
        attention.q, attention.logits = layer.split(steps.linear(h, layer))
        attention.norms.append(_HeadNorm(s.names, [(attention.q, module.q_norm.weight)], module.heads, rope))
        return attention

    def _keys_and_values(
        self,
        attention: _Attention,
        block: AVBlock,
        name: str,
        context: Activations,
        reader: StreamNames,
        rope: RopeTable | None,
    ) -> None:
        module, layer = getattr(block, name), block.packed_linears[name, "kv"]
        attention.k, attention.v = layer.split(steps.linear(context, layer))
        attention.norms.append(_HeadNorm(reader, [(attention.k, module.k_norm.weight)], module.heads, rope))

    def _cross_heads_out(self, attention: _Attention) -> torch.Tensor:
        q, k, v = attention.q, attention.k, attention.v
        assert q is not None and k is not None and v is not None
        return self._heads_out(q, k, v, attention.heads, attention.s.batch)

    def _heads_out(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, batch: int) -> torch.Tensor:
        """Attention of q, k and v (R, heads * head_dim): (R, heads, head_dim)."""
        by_head = (x.unflatten(0, (batch, -1)).unflatten(2, (heads, -1)) for x in (q, k, v))
        return self._attend(*by_head).flatten(0, 1)

    def _add_projected(self, attentions: list[_Attention], outs: list[torch.Tensor], gates: list[torch.Tensor]) -> None:
        """Gate the heads' results (B * T, heads, D), project them, and leave them to be added to their streams."""
        partials = []
        for attention, heads_out in zip(attentions, outs, strict=True):
            with self._audio.running(attention.s.names):
                if heads_out.stride(1) != heads_out.shape[2] or heads_out.stride(2) != 1:
                    # Unlike `contiguous`, this gives an axis of a single head the stride that the kernel expects, too.
                    heads_out = heads_out.flatten(1).unflatten(1, heads_out.shape[1:])
                assert attention.logits is not None
                gated = self._steps.apply_gates(heads_out, attention.logits, attention.out.quantized)
                partials.append(steps.linear(gated, attention.out))
        self._add([attention.s for attention in attentions], partials, gates)

    # --- exchanges of tensor-parallel ranks ------------------------------------------------------

    def _meet(self, *held: object) -> None:
        """Each CUDA stream waits for the other, so that neither reads any longer what was held for it."""
        self._audio.synchronize()
        self._held = list(held)

    def _inputs(self, wanted: Iterable[tuple[FusedStream, list[Modulation]]]) -> list[list[Activations]]:
        """All B * T rows of each stream, normed and modulated."""
        wanted = list(wanted)
        normed = [self.normed(s, modulations) for s, modulations in wanted]
        if self._tp.size == 1:
            return normed
        self._meet(normed)
        shards = [tensor for parts in normed for part in parts for tensor in _tensors(part)]
        whole = iter(self._tp.start_gather(shards).wait())
        gathered = [
            [_as_activations([next(whole)[: s.rows.length] for _ in _tensors(part)]) for part in parts]
            for (s, _), parts in zip(wanted, normed, strict=True)
        ]
        self._meet()
        return gathered

    def _add(self, streams: list[FusedStream], partials: list[torch.Tensor], gates: list[torch.Tensor]) -> None:
        """Leave `partials` (B * T, D), summed over the ranks, to be added to their streams."""
        if self._tp.size == 1:
            sums = [Pending(partial) for partial in partials]
        else:
            self._meet(partials)
            padded = [s.rows.padded(partial) for s, partial in zip(streams, partials, strict=True)]
            pending = self._tp.start_reduce_scatter(padded)
            sums = [pending.then(itemgetter(number)) for number in range(len(streams))]
        for s, value, gate in zip(streams, sums, gates, strict=True):
            s.residual = PendingResidual(value, gate)

    def _start_head_means(self, attentions: list[_Attention]) -> Pending[torch.Tensor] | None:
        """Begin to sum what `_norm_heads` needs of the other ranks' heads; None where this rank has all heads."""
        if self._tp.size == 1:
            return None
        means = []
        for norm in (norm for attention in attentions for norm in attention.norms):
            with self._audio.running(norm.names):
                tensors = [x for x, _ in norm.parts]
                means.append(self._steps.head_means(tensors, self._tp.size * tensors[0].shape[1]).flatten())
        self._meet(means)
        return self._tp.start_sum(torch.cat(means)) if means else None

    def _norm_heads(self, attentions: list[_Attention], means: Pending[torch.Tensor] | None) -> None:
        """Norm and rotate the queries and keys, in place."""
        norms = [norm for attention in attentions for norm in attention.norms]
        if means is None:
            of_norms: list[torch.Tensor | None] = [None] * len(norms)
        else:
            sizes = [len(norm.parts) * len(norm.parts[0][0]) for norm in norms]
            found = means.wait()
            of_norms = [x.view(len(n.parts), -1) for n, x in zip(norms, found.split(sizes), strict=True)]
            self._meet(found)
        for norm, mean in zip(norms, of_norms, strict=True):
            with self._audio.running(norm.names):
                self._steps.norm_heads_(norm.parts, norm.heads, self._eps, norm.rope, mean)


def _values(qkv: PackedLinear, h: Activations) -> torch.Tensor:
    """The values (R, heads * D) alone."""
    layer = qkv.part(2, 3)
    (v,) = layer.split(steps.linear(h, layer))
    return v


def _tensors(x: Activations) -> tuple[torch.Tensor, ...]:
    """What ranks exchange of rows. Not every transport knows e4m3."""
    return (x,) if isinstance(x, torch.Tensor) else (x.values.view(torch.uint8), x.scale)


def _as_activations(tensors: list[torch.Tensor]) -> Activations:
    """The inverse of `_tensors`."""
    return tensors[0] if len(tensors) == 1 else QuantizedRows(tensors[0].view(FP8), tensors[1])
