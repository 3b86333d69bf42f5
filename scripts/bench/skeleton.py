"""The skeleton of a pass of the DiT: only its matrix products and attention, one after the other.

Its time is the floor under a pass. The calls are those of the packed model, in its order and with its weights, on
random inputs made beforehand. Everything between them is left out: norms, modulation, rotation, gates, GELU, residuals
and the quantization of activations. The same list of calls gives the FLOPs of a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from ltx_ray.checkpoints.transformer_config import StreamConfig
from ltx_ray.model.attention_backends import Attend
from ltx_ray.model.block import STREAM_NAMES
from ltx_ray.model.packed_linear import PackedLinear, PackedLinears
from ltx_ray.model.steps import QuantizedRows, linear
from ltx_ray.model.transformer import Transformer
from ltx_ray.parallel.fp8 import FP8, FP8_MAX
from ltx_ray.parallel.layers import ReplicatedLinear
from ltx_ray.records import AV


@dataclass(frozen=True)
class Lengths:
    """Tokens of a pass, batch 1."""

    video: int
    audio: int
    text: int


@dataclass(frozen=True)
class Gemm:
    """A matrix product with `rows` rows of input."""

    layer: PackedLinear
    rows: int

    @property
    def flops(self) -> int:
        outputs, inputs = self.layer.weight.shape
        return 2 * self.rows * outputs * inputs


@dataclass(frozen=True)
class Attention:
    """Attention of `queries` tokens to `keys` tokens; `width` is heads x head_dim."""

    queries: int
    keys: int
    heads: int
    width: int

    @property
    def flops(self) -> int:
        return 4 * self.queries * self.keys * self.width


Plan = list[Gemm | Attention]


def plan(model: Transformer, lengths: Lengths, isolated: bool = False, sequence_parallel: int = 1) -> Plan:
    """The calls of a pass of the packed `model`, on one of the ranks that share its weights.

    `isolated` leaves out the attention between the streams. `sequence_parallel`: ranks that divide the video's tokens.
    """
    return list(_calls(model, lengths, isolated, sequence_parallel))


def flops(calls: Plan) -> int:
    return sum(call.flops for call in calls)


def _calls(model: Transformer, lengths: Lengths, isolated: bool, sequence_parallel: int) -> Iterator[Gemm | Attention]:
    tp = model.tp.size
    streams, whole = AV(model.config.video, model.config.audio), AV(lengths.video, lengths.audio)
    divided = AV(sequence_parallel, 1)
    own = whole.map(lambda tokens, n: -(-tokens // n), divided)
    by_stream = list(zip(STREAM_NAMES, streams, own, own.swapped(), whole, whole.swapped(), divided, strict=True))
    for names, _, rows, *_ in by_stream:
        yield _unpacked(getattr(model, names.patchify), -(-rows // tp))
    for block in model.blocks:
        packed = block.packed_linears
        for names, stream, rows, _, tokens, _, n in by_stream:
            # Ranks that divide the tokens attend from all of them with a part of the heads.
            yield Gemm(packed[names.self_attention, "qkv"], rows)
            yield Gemm(packed[names.self_attention, "gates"], rows)
            yield _attention(stream, tokens, tokens, tp * n)
            yield Gemm(packed[names.self_attention, "out"], rows)
            yield from _products(packed, names.text_attention, rows, lengths.text)
            yield _attention(stream, rows, lengths.text, tp)
        if not isolated:
            # Attention between the streams is as wide as the audio stream.
            for names, _, rows, other_rows, _, other_tokens, n in by_stream:
                yield from _products(packed, names.cross_attention, rows, other_rows)
                keys_divided = sequence_parallel if n == 1 else 1
                yield _attention(streams.audio, rows, other_tokens, tp * keys_divided)
        for names, _, rows, *_ in by_stream:
            yield Gemm(packed[names.feed_forward, "up"], rows)
            yield Gemm(packed[names.feed_forward, "down"], rows)
    for names, _, rows, *_ in by_stream:
        yield _unpacked(getattr(model, names.proj_out), -(-rows // tp))


def _products(packed: PackedLinears, name: str, rows: int, keys: int) -> Iterator[Gemm]:
    yield Gemm(packed[name, "q_gates"], rows)
    yield Gemm(packed[name, "kv"], keys)
    yield Gemm(packed[name, "out"], rows)


def _attention(stream: StreamConfig, queries: int, keys: int, ranks: int) -> Attention:
    return Attention(queries, keys, stream.heads // ranks, stream.dim // ranks)


def _unpacked(layer: ReplicatedLinear, rows: int) -> Gemm:
    return Gemm(PackedLinear(layer.weight, layer.bias, (layer.weight.shape[0],)), rows)


class Skeleton:
    """Issues the calls of a plan when it is called, and drops their results."""

    def __init__(self, calls: Plan, attend: Attend):
        self._inputs: dict[tuple, object] = {}
        like = next(call for call in calls if isinstance(call, Gemm)).layer.bias
        self._calls = [
            self._gemm(call) if isinstance(call, Gemm) else self._attention(call, attend, like) for call in calls
        ]

    def __call__(self) -> None:
        for call in self._calls:
            call()

    def _gemm(self, call: Gemm) -> Callable[[], torch.Tensor]:
        layer = call.layer
        x = self._once(("rows", call.rows, layer.weight.shape[1], layer.quantized), lambda: _rows(call))
        if not layer.quantized:
            return partial(F.linear, x, layer.weight, layer.bias)
        if not layer.weight.is_cuda:  # to try out the script
            return partial(linear, x, layer)
        assert layer.row_scale is not None
        # Transposed and reshaped beforehand, so that the call does nothing else.
        return partial(
            torch._scaled_mm, x.values, layer.weight.t(), x.scale, layer.row_scale[None], layer.bias,
            out_dtype=layer.bias.dtype, use_fast_accum=True,
        )  # fmt: skip

    def _attention(self, call: Attention, attend: Attend, like: torch.Tensor) -> Callable[[], torch.Tensor]:
        def tokens(count: int) -> torch.Tensor:
            size = (1, count, call.heads, call.width // call.heads)
            return torch.randn(size, device=like.device, dtype=like.dtype)

        q, k, v = self._once(("heads", call), lambda: [tokens(n) for n in (call.queries, call.keys, call.keys)])
        return partial(attend, q, k, v)

    def _once(self, key: tuple, make: Callable):
        """Calls of one shape share their inputs, as in a model that reuses its memory."""
        if key not in self._inputs:
            self._inputs[key] = make()
        return self._inputs[key]


def _rows(call: Gemm) -> torch.Tensor | QuantizedRows:
    like = call.layer.bias
    x = torch.randn((call.rows, call.layer.weight.shape[1]), device=like.device, dtype=like.dtype)
    if not call.layer.quantized:
        return x
    scale = x.float().abs().amax(dim=1, keepdim=True) / FP8_MAX
    return QuantizedRows((x.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale)
