"""A block of the fused path: packed layers, fused steps between them, and the exchanges of a gang's ranks.

A residual is not added where it arises, but by the step that reads the stream next. Tensor-parallel ranks divide the
rows of a stream between the sharded layers (mesh.RowSharding): partial products are summed by a reduce-scatter, and the
modulated rows are gathered, in pieces, so that the product of one hides the exchange of another. Ranks that divide the
video's tokens (mesh.SequenceSharding) exchange them for heads around the attention that needs all of them. A single
rank does neither.

Every rank issues the same exchanges in the same order, whichever CUDA stream they are of.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
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
    STREAM_NAMES,
    TEXT_ATTENTION_ROWS,
    AVBlock,
)
from ltx_ray.model.divided_attention import HeadExchange, attend_to_divided, head_groups
from ltx_ray.model.modulations import ModulationTables
from ltx_ray.model.packed_linear import PackedLinear
from ltx_ray.model.rope import RopeTable
from ltx_ray.model.row_pieces import (
    PendingRows,
    as_activations,
    exchanged_tensors,
    exchanged_together,
    piece_of,
    without_padding,
)
from ltx_ray.model.steps import Activations, Modulation, Norm, Residual, TokenLevels
from ltx_ray.parallel.collectives import Pending, RankGroup
from ltx_ray.parallel.head_exchange import HeadPlaces
from ltx_ray.parallel.mesh import RowSharding, SequenceSharding
from ltx_ray.records import AV


@dataclass(frozen=True)
class PendingResidual:
    """What is still to be added to a stream: values (R, D) in pieces, maybe on their way, times gate (L or 1, D)."""

    values: list[Pending[torch.Tensor]]
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
class _Product:
    """A row-parallel product of the stream `s`, which is to be added to it: the input of a piece by its number."""

    s: FusedStream
    piece: Callable[[int], Activations]
    layer: PackedLinear
    gate: torch.Tensor


@dataclass(frozen=True)
class _HeadNorm:
    """Queries or keys (R, heads * D) that are normed and rotated together, each with its weight.

    `names`: the modality in whose CUDA stream they are. `exchange`: how ranks that divide their tokens exchange them.
    """

    names: StreamNames
    parts: list[tuple[torch.Tensor, torch.Tensor]]
    heads: int
    rope: RopeTable | None
    exchange: HeadExchange | None = None


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

    def normed(
        self, s: FusedStream, piece: int, modulations: Sequence[Modulation], norm: Norm = "rms"
    ) -> list[Activations]:
        """This rank's rows of a piece, normed and modulated, after its residual has been added to them."""
        own = s.rows.own_rows_of(piece) if self._tp.size > 1 else slice(None)
        levels = s.levels if s.levels is None else TokenLevels(s.levels.index[own])
        with self._audio.running(s.names):
            residual = None if s.residual is None else Residual(s.residual.values[piece].wait(), s.residual.gate)
            if self._tp.size > 1:
                self._held.append((s.residual, residual))
            if piece == s.rows.pieces - 1:
                s.residual = None
            return self._steps.add_norm_modulate(s.x[own], residual, list(modulations), levels, norm, self._eps)

    def first_entry(self, s: FusedStream) -> torch.Tensor:
        """A copy of the first batch entry's x (T, D), with all that has been added to it."""
        if s.residual is not None:
            for piece in range(s.rows.pieces):
                self.normed(s, piece, [])
        if self._tp.size > 1:
            self._meet()
            return s.rows.gather(s.x)[: s.rows.length // s.batch].contiguous()
        with self._audio.running(s.names):
            return s.x[: len(s.x) // s.batch].clone()

    # --- the parts of a block --------------------------------------------------------------------

    def _attend_to_self(
        self, enabled: list[FusedStream], perturbed: list[FusedStream], block: AVBlock, index: int
    ) -> None:
        packed = block.packed_linears
        tables = [_own_tables(s, index, SELF_ATTENTION_ROWS, packed[s.names.self_attention, "qkv"]) for s in enabled]
        inputs = self._inputs((s, [modulation]) for s, (modulation, _) in zip(enabled, tables, strict=True))
        attentions = []
        for s, (h,) in zip(enabled, inputs, strict=True):
            with self._audio.running(s.names):
                attentions.append(self._project_self(s, block, h, any(s is other for other in perturbed)))
        means = self._start_head_means(attentions)
        for attention, (h,) in zip(attentions, inputs, strict=True):
            s = attention.s
            with self._audio.running(s.names):
                if attention.v is None:
                    attention.v = _values(packed[s.names.self_attention, "qkv"], h)
                gates = packed[s.names.self_attention, "gates"]
                (attention.logits,) = gates.split(h.through(gates))
        self._norm_heads(attentions, means)
        outs = []
        for attention in attentions:
            with self._audio.running(attention.s.names):
                outs.append(self._self_heads_out(attention))
        self._add_projected(attentions, outs, [gate for _, gate in tables])

    def _project_self(self, s: FusedStream, block: AVBlock, h: PendingRows, values_only: bool) -> _Attention:
        """Queries and keys, and where they come with them or are to be exchanged, the values."""
        name = s.names.self_attention
        module, qkv = getattr(block, name), block.packed_linears[name, "qkv"]
        attention = _Attention(s, module.heads, block.packed_linears[name, "out"], [])
        if s.tokens is None and self._tp.size == 1:
            attention.q, attention.k, attention.v = qkv.split(h.through(qkv))
        if values_only:
            attention.q = attention.k = None
            return attention
        if s.tokens is not None:
            # The exchange of the values takes place during the product of queries and keys.
            attention.v = _values(qkv, h)
            place = partial(self._steps.place_heads, attention.v, 0)
            (attention.exchanged_v,) = s.tokens.start_rows_to_heads([attention.v], s.batch, module.heads, place)
        if attention.q is None or attention.k is None:
            q_k = qkv.part(0, 2)
            attention.q, attention.k = q_k.split(h.through(q_k))
        parts = [(attention.q, module.q_norm.weight), (attention.k, module.k_norm.weight)]
        exchange = None
        if s.tokens is not None:
            groups = head_groups(module.heads // s.tokens.group.size, s.tokens.length)
            exchange = HeadExchange(s.tokens, s.batch, groups, [])
        attention.norms.append(_HeadNorm(s.names, parts, module.heads, s.rope, exchange))
        return attention

    def _self_heads_out(self, attention: _Attention) -> torch.Tensor:
        s, q, k, v, heads = attention.s, attention.q, attention.k, attention.v, attention.heads
        assert v is not None
        if q is None or k is None:
            return v.unflatten(1, (heads, -1))
        if s.tokens is None:
            return self._heads_out(q, k, v, heads, s.batch)
        (norm,) = attention.norms
        assert attention.exchanged_v is not None and norm.exchange is not None
        return attend_to_divided(s.tokens, norm.exchange.pending, attention.exchanged_v, heads, self._attend)

    def _attend_to_text(self, enabled: list[FusedStream], block: AVBlock, index: int) -> None:
        packed = block.packed_linears
        tables = [
            _own_tables(s, index, TEXT_ATTENTION_ROWS, packed[s.names.text_attention, "q_gates"]) for s in enabled
        ]
        inputs = self._inputs((s, [modulation]) for s, (modulation, _) in zip(enabled, tables, strict=True))
        attentions = []
        for s, (h,) in zip(enabled, inputs, strict=True):
            shift, scale = s.tables.prompt[index].unbind(1)
            name = s.names.text_attention
            with self._audio.running(s.names):
                (context,) = self._steps.add_norm_modulate(
                    s.context, None, [Modulation(shift, scale, packed[name, "kv"].quantized)], None, None, self._eps
                )
                attention = self._queries(s, block, name, h, None)
                text = PendingRows([Pending(context)], s.rows)
                self._keys_and_values(attention, block, name, text, s.names, None, None)
            attentions.append(attention)
        self._norm_heads(attentions, self._start_head_means(attentions))
        outs = []
        for attention in attentions:
            with self._audio.running(attention.s.names):
                outs.append(self._cross_heads_out(attention))
        self._add_projected(attentions, outs, [gate for _, gate in tables])

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
            # Keys and values of divided tokens will be exchanged before the other stream needs them.
            reader = s.names if other.tokens is None else other.names
            with self._audio.running(s.names):
                attention = self._queries(s, block, name, own[number], s.cross_rope)
            with self._audio.running(reader):
                self._keys_and_values(attention, block, name, others[number], reader, other.cross_rope, other)
            attentions.append(attention)
        self._norm_heads(attentions, self._start_head_means(attentions))
        outs = self._across_heads_out(attentions)
        self._add_projected(attentions, outs, [s.tables.cross_gate[index, :, 0] for s, _, _ in receivers])
        # Both CUDA streams read `inputs`, whose life ends here.
        self._meet()

    def _across_heads_out(self, attentions: list[_Attention]) -> list[torch.Tensor]:
        """Of each attention to the other stream, whose tokens may be divided: (B * T, heads, D)."""
        outs = []
        for attention in attentions:
            exchange = attention.norms[-1].exchange
            with self._audio.running(attention.s.names):
                if exchange is None:
                    outs.append(self._cross_heads_out(attention))
                    continue
                k, v = exchange.pending[0].wait()
                self._held.append((k, v))
                assert attention.q is not None
                tokens = exchange.tokens
                q = attention.q.unflatten(0, (attention.s.batch, -1)).unflatten(2, (attention.heads, -1))
                own = self._attend(q[:, :, tokens.group.slice(attention.heads)], k, v)
                outs.append(tokens.group.gather(own[None]).permute(1, 2, 0, 3, 4).flatten(2, 3).flatten(0, 1))
        return outs

    def _feed_forward(self, enabled: list[FusedStream], block: AVBlock, index: int) -> None:
        packed = block.packed_linears
        tables = [_own_tables(s, index, FEED_FORWARD_ROWS, packed[s.names.feed_forward, "up"]) for s in enabled]

        def product(s: FusedStream, h: PendingRows, gate: torch.Tensor) -> _Product:
            up, down = packed[s.names.feed_forward, "up"], packed[s.names.feed_forward, "down"]

            def hidden(piece: int) -> Activations:
                rows = h.pieces[piece].wait()
                if up.quantized or down.quantized:
                    return self._steps.gelu(steps.linear(rows, up), down.quantized)
                return self._steps.linear_gelu(rows, up)

            return _Product(s, hidden, down, gate)

        inputs = self._inputs((s, [modulation]) for s, (modulation, _) in zip(enabled, tables, strict=True))
        self._add([product(s, h, gate) for s, (h,), (_, gate) in zip(enabled, inputs, tables, strict=True)])

    # --- what they consist of --------------------------------------------------------------------

    def _queries(self, s: FusedStream, block: AVBlock, name: str, h: PendingRows, rope: RopeTable | None) -> _Attention:
        module, layer = getattr(block, name), block.packed_linears[name, "q_gates"]
        attention = _Attention(s, module.heads, block.packed_linears[name, "out"], [])
        attention.q, attention.logits = layer.split(h.through(layer))
        attention.norms.append(_HeadNorm(s.names, [(attention.q, module.q_norm.weight)], module.heads, rope))
        return attention

    def _keys_and_values(
        self,
        attention: _Attention,
        block: AVBlock,
        name: str,
        context: PendingRows,
        reader: StreamNames,
        rope: RopeTable | None,
        other: FusedStream | None,
    ) -> None:
        """Of the text, or of the `other` stream, whose tokens may be divided."""
        module, layer = getattr(block, name), block.packed_linears[name, "kv"]
        attention.k, attention.v = layer.split(context.through(layer))
        exchange = None
        if other is not None and other.tokens is not None:
            exchange = HeadExchange(other.tokens, other.batch, 1, [attention.v])
        attention.norms.append(_HeadNorm(reader, [(attention.k, module.k_norm.weight)], module.heads, rope, exchange))

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
        products = []
        for attention, heads_out, gate in zip(attentions, outs, gates, strict=True):
            with self._audio.running(attention.s.names):
                if heads_out.stride(-2) != heads_out.shape[-1] or heads_out.stride(-1) != 1:
                    # Unlike `contiguous`, this gives an axis of a single head the stride that the kernel expects, too.
                    heads_out = heads_out.flatten(1).unflatten(1, heads_out.shape[1:])
                assert attention.logits is not None
                gated = self._steps.apply_gates(heads_out, attention.logits, attention.out.quantized)
            products.append(_Product(attention.s, partial(piece_of, gated, attention.s.rows), attention.out, gate))
        self._add(products)

    # --- exchanges of tensor-parallel ranks ------------------------------------------------------

    def _meet(self, *held: object) -> None:
        """Each CUDA stream waits for the other, so that neither reads any longer what was held for it."""
        self._audio.synchronize()
        self._held = list(held)

    def _meet_with(self, streams: Sequence[FusedStream], held: object) -> None:
        """Meet where the audio is among the `streams` whose rows are exchanged."""
        if any(s.names is STREAM_NAMES.audio for s in streams):
            self._meet(held)

    def _inputs(self, wanted: Iterable[tuple[FusedStream, list[Modulation]]]) -> list[list[PendingRows]]:
        """All B * T rows of each stream, normed and modulated."""
        wanted = list(wanted)
        found = [[PendingRows([], s.rows) for _ in modulations] for s, modulations in wanted]
        for pieces in exchanged_together([s.rows for s, _ in wanted]):
            normed = [self.normed(wanted[number][0], piece, wanted[number][1]) for number, piece in pieces]
            if self._tp.size == 1:
                gathered = iter([Pending(part) for parts in normed for part in parts])
            else:
                self._meet_with([wanted[number][0] for number, _ in pieces], normed)
                shards = [exchanged_tensors(part) for parts in normed for part in parts]
                pending = self._tp.start_gather([tensor for tensors in shards for tensor in tensors])
                # The audio may read its part until the two meet again.
                self._held.append(pending)
                firsts = itertools.accumulate((len(tensors) for tensors in shards), initial=0)
                gathered = iter(
                    [
                        pending.then(partial(as_activations, first, len(tensors) > 1))
                        for first, tensors in zip(firsts, shards, strict=False)
                    ]
                )
            for number, piece in pieces:
                for rows in found[number]:
                    rows.pieces.append(next(gathered).then(partial(without_padding, rows.rows, piece)))
        return found

    def _add(self, products: list[_Product]) -> None:
        """Leave the products (B * T, D), summed over the ranks, to be added to their streams."""
        values: list[list[Pending[torch.Tensor]]] = [[] for _ in products]
        for pieces in exchanged_together([product.s.rows for product in products]):
            partials = []
            for number, piece in pieces:
                s, layer = products[number].s, products[number].layer
                with self._audio.running(s.names):
                    value = steps.linear(products[number].piece(piece), layer)
                    partials.append(value if self._tp.size == 1 else s.rows.padded(value))
            if self._tp.size == 1:
                sums = [Pending(value) for value in partials]
            else:
                self._meet_with([products[number].s for number, _ in pieces], partials)
                sums = self._tp.start_reduce_scatter(partials)
            for (number, _), summed in zip(pieces, sums, strict=True):
                values[number].append(summed)
        for product, of_pieces in zip(products, values, strict=True):
            product.s.residual = PendingResidual(of_pieces, product.gate)

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
        """Norm and rotate the queries and keys, in place, or on their way to the ranks that attend with them."""
        norms = [norm for attention in attentions for norm in attention.norms]
        if means is None:
            of_norms: list[torch.Tensor | None] = [None] * len(norms)
        else:
            sizes = [len(norm.parts) * len(norm.parts[0][0]) for norm in norms]
            found = means.wait()
            of_norms = [x.view(len(n.parts), -1) for n, x in zip(norms, found.split(sizes), strict=True)]
            self._meet(found)
        for norm, mean in zip(norms, of_norms, strict=True):
            write = partial(self._write_heads, norm, mean)
            with self._audio.running(norm.names):
                if norm.exchange is None:
                    write(None)
                else:
                    rows = [x for x, _ in norm.parts] + norm.exchange.unnormed
                    tokens, batch, groups = norm.exchange.tokens, norm.exchange.batch, norm.exchange.groups
                    norm.exchange.pending = tokens.start_rows_to_heads(rows, batch, norm.heads, write, groups)

    def _write_heads(self, norm: _HeadNorm, mean: torch.Tensor | None, places: HeadPlaces | None) -> None:
        self._steps.norm_heads_(norm.parts, norm.heads, self._eps, norm.rope, mean, places)
        if places is not None and norm.exchange is not None:
            for part, x in enumerate(norm.exchange.unnormed, start=len(norm.parts)):
                self._steps.place_heads(x, part, places)


def _own_tables(s: FusedStream, index: int, rows: slice, layer: PackedLinear) -> tuple[Modulation, torch.Tensor]:
    """The modulation of the input of `layer` in block `index`, and the gate of what comes of it."""
    shift, scale, gate = s.tables.own[index, :, rows].unbind(1)
    return Modulation(shift, scale, layer.quantized), gate


def _values(qkv: PackedLinear, h: PendingRows) -> torch.Tensor:
    """The values (R, heads * D) alone."""
    layer = qkv.part(2, 3)
    (v,) = layer.split(h.through(layer))
    return v
