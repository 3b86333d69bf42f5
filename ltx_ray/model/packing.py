"""Weights of the DiT laid out for the fused path: layers of one input side by side, so that one product serves them.

The parameters keep the checkpoint's names and become views of the packed storage, so that loading and LoRA
merging see the layers one by one. With precision fp8, products over the video's many rows are held in e4m3 with
a scale for every output feature; those over the audio's few rows stay in bfloat16, where fp8 would win nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ltx_ray.model.block import AVBlock
from ltx_ray.model.transformer import Transformer
from ltx_ray.parallel.fp8 import FP8


@dataclass(frozen=True)
class PackedLinear:
    """x -> x @ weight.T + bias: weight (N, K), bias (N,), of which `sizes` are the layers' parts and what is left is
    padding. In fp8: row_scale (N,) float32."""

    weight: torch.Tensor
    bias: torch.Tensor
    sizes: tuple[int, ...]
    row_scale: torch.Tensor | None = None

    @property
    def quantized(self) -> bool:
        return self.row_scale is not None

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The layers' parts of what the product gave, (R, N)."""
        return rows[:, : sum(self.sizes)].split(self.sizes, dim=1)


#: Output features come in multiples of this: rows of a product start where vector loads may, and fp8 demands it.
_MULTIPLE = 16
#: Products of an attention by what feeds them, and the layers that each is made of. The gates ride along with the
#: queries of a cross-attention for nothing; beside queries, keys and values they break the GEMM's tiling.
_OF_SELF = {"qkv": ("to_q", "to_k", "to_v"), "gates": ("to_gate_logits",), "out": ("to_out.0",)}
_OF_CROSS = {"q_gates": ("to_q", "to_gate_logits"), "kv": ("to_k", "to_v"), "out": ("to_out.0",)}
_OF_FEED_FORWARD = {"up": ("net.0.proj",), "down": ("net.2",)}
_SELF_ATTENTIONS = ("attn1", "audio_attn1")
_CROSS_ATTENTIONS = ("attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
_FEED_FORWARDS = ("ff", "audio_ff")
#: Products whose rows are the audio's tokens.
_AUDIO_ROWS = {
    *((name, product) for name in ("audio_attn1", "audio_attn2", "audio_ff")
      for product in (*_OF_SELF, *_OF_CROSS, *_OF_FEED_FORWARD)),
    ("audio_to_video_attn", "kv"), ("video_to_audio_attn", "q_gates"), ("video_to_audio_attn", "out"),
}  # fmt: skip

#: (module of a block, product) -> Product, of one block.
Products = dict[tuple[str, str], PackedLinear]


def layers_of_products() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(module, product, layers) of a block, in the order in which a pass uses them."""
    for name in (*_SELF_ATTENTIONS, *_CROSS_ATTENTIONS, *_FEED_FORWARDS):
        kinds = _OF_SELF if name in _SELF_ATTENTIONS else _OF_CROSS if name in _CROSS_ATTENTIONS else _OF_FEED_FORWARD
        for product, layers in kinds.items():
            yield name, product, layers


def pack(model: Transformer, device: torch.device, dtype: torch.dtype, precision: str = "bf16") -> None:
    """Allocate the blocks' linear layers of `model` (on the meta device) on `device`, packed; their values are garbage.

    All other parameters stay where they are. Afterwards `block.products` holds what was packed.
    """
    assert model.tp.size == 1, "the fused path is for whole weights"
    for block in model.transformer_blocks:
        block.products = _pack_block(block, device, dtype, precision)


def _pack_block(block: AVBlock, device: torch.device, dtype: torch.dtype, precision: str) -> Products:
    products: Products = {}
    for name, kind, layers in layers_of_products():
        modules = [block.get_submodule(f"{name}.{layer}") for layer in layers]
        sizes = tuple(module.weight.shape[0] for module in modules)
        total, inputs = -(-sum(sizes) // _MULTIPLE) * _MULTIPLE, modules[0].weight.shape[1]
        fp8 = precision == "fp8" and (name, kind) not in _AUDIO_ROWS
        weight = torch.empty((total, inputs), dtype=FP8 if fp8 else dtype, device=device)
        bias = torch.empty(total, dtype=dtype, device=device)
        row_scale = torch.empty(total, dtype=torch.float32, device=device) if fp8 else None
        for padded in (weight.view(torch.uint8) if fp8 else weight, bias, row_scale):
            if padded is not None:
                padded[sum(sizes) :] = 0
        products[name, kind] = PackedLinear(weight, bias, sizes, row_scale)
        start = 0
        for module, size in zip(modules, sizes, strict=True):
            rows = slice(start, start + size)
            module.weight = _view(weight[rows], module.weight)
            module.bias = _view(bias[rows], module.bias)
            if row_scale is not None:
                module.weight.row_scale = row_scale[rows]
            start += size
    return products


def _view(values: torch.Tensor, old: nn.Parameter) -> nn.Parameter:
    parameter = nn.Parameter(values, requires_grad=False)
    parameter.shard_dim = old.shard_dim
    return parameter
