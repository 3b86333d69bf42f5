"""Weights of the fused path: linear layers that read the same input are packed, so that one matrix product serves them.

Parameters keep the checkpoint's names and become views of the packed memory, so loading and LoRA merging see the layers
one by one. With precision fp8, layers over the many video tokens are held in e4m3 with a scale for every output
feature. Layers over the few audio tokens stay in bfloat16, where fp8 would gain nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch

from ltx_ray.checkpoints.transformer_keys import (
    AUDIO,
    CROSS_ATTENTIONS,
    FEED_FORWARD_DOWN,
    FEED_FORWARD_UP,
    FEED_FORWARDS,
    SELF_ATTENTIONS,
    TO_GATES,
    TO_K,
    TO_OUT,
    TO_Q,
    TO_V,
    VIDEO,
)
from ltx_ray.model.block import AVBlock
from ltx_ray.model.packed_linear import Packed, PackedLinear, PackedLinears
from ltx_ray.model.transformer import Transformer
from ltx_ray.parallel.collectives import RankGroup
from ltx_ray.parallel.fp8 import FP8
from ltx_ray.parallel.layers import ShardParameter, shard_parameter

#: Output features of packed layers that are split come in multiples of this, where rows may be loaded as vectors and
#: fp8 products demand it. The result of any other layer is read as it is, so it has no padding.
_MULTIPLE = 16
_UNSPLIT: set[Packed] = {"out", "up", "down"}
#: Packed layers whose inputs tensor-parallel ranks divide.
_ROW_PARALLEL: set[Packed] = {"out", "down"}
#: Packed layers of each kind of module, and the layers that each consists of. Gates cost nothing beside the queries of
#: a cross-attention. Beside queries, keys and values they would break the tiles of the matrix product.
_SELF_ATTENTION: dict[Packed, tuple[str, ...]] = {"qkv": (TO_Q, TO_K, TO_V), "gates": (TO_GATES,), "out": (TO_OUT,)}
_CROSS_ATTENTION: dict[Packed, tuple[str, ...]] = {"q_gates": (TO_Q, TO_GATES), "kv": (TO_K, TO_V), "out": (TO_OUT,)}
_FEED_FORWARD: dict[Packed, tuple[str, ...]] = {"up": (FEED_FORWARD_UP,), "down": (FEED_FORWARD_DOWN,)}
#: Packed layers whose input are audio tokens.
_AUDIO_INPUTS: set[tuple[str, Packed]] = {
    *((AUDIO.self_attention, packed) for packed in _SELF_ATTENTION),
    *((AUDIO.text_attention, packed) for packed in _CROSS_ATTENTION),
    *((AUDIO.feed_forward, packed) for packed in _FEED_FORWARD),
    (VIDEO.cross_attention, "kv"),
    (AUDIO.cross_attention, "q_gates"),
    (AUDIO.cross_attention, "out"),
}


def packed_layers() -> Iterator[tuple[str, Packed, tuple[str, ...]]]:
    """(module, packed layer, layers that it consists of) of a block."""
    kinds = (SELF_ATTENTIONS, _SELF_ATTENTION), (CROSS_ATTENTIONS, _CROSS_ATTENTION), (FEED_FORWARDS, _FEED_FORWARD)
    for modules, packed_of_kind in kinds:
        for module in modules:
            for packed, layers in packed_of_kind.items():
                yield module, packed, layers


def pack_linears(model: Transformer, device: torch.device, dtype: torch.dtype, precision: str = "bf16") -> None:
    """Allocate the linear layers of the blocks of `model`, which are on the meta device, packed on `device`.

    Their values are undefined until load_shard fills them. All other parameters stay where they are. The packed layers
    are then in `packed_linears` of each block.
    """
    for block in model.blocks:
        block.packed_linears = _pack_block(block, model.tp, device, dtype, precision)


def _pack_block(
    block: AVBlock, tp: RankGroup, device: torch.device, dtype: torch.dtype, precision: str
) -> PackedLinears:
    packed_by_name: PackedLinears = {}
    for name, packed, layers in packed_layers():
        modules = [block.get_submodule(f"{name}.{layer}") for layer in layers]
        weights = [cast(ShardParameter, module.weight) for module in modules]
        sizes = tuple(len(weight) for weight in weights)
        multiple = 1 if packed in _UNSPLIT else _MULTIPLE
        total, inputs = -(-sum(sizes) // multiple) * multiple, weights[0].shape[1]
        fp8 = precision == "fp8" and (name, packed) not in _AUDIO_INPUTS
        weight = torch.empty((total, inputs), dtype=FP8 if fp8 else dtype, device=device)
        bias = torch.empty(total, dtype=dtype, device=device)
        row_scale = torch.empty(total, dtype=torch.float32, device=device) if fp8 else None
        for padded in (weight.view(torch.uint8) if fp8 else weight, bias, row_scale):
            if padded is not None:
                padded[sum(sizes) :] = 0
        # The ranks' partial products are summed, and the bias must enter the sum once.
        summed = packed in _ROW_PARALLEL and tp.rank > 0
        used_bias = torch.zeros_like(bias) if summed else bias
        packed_by_name[name, packed] = PackedLinear(weight, used_bias, sizes, row_scale)
        start = 0
        for module, old, size in zip(modules, weights, sizes, strict=True):
            rows = slice(start, start + size)
            module.weight = shard_parameter(weight[rows], old.shard_dim)
            module.bias = shard_parameter(bias[rows], cast(ShardParameter, module.bias).shard_dim)
            if row_scale is not None:
                module.weight.row_scale = row_scale[rows]
            start += size
    return packed_by_name
