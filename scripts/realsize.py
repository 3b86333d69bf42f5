"""The 22B transformer's tensors with random values, for the benchmarks: as files, or on a device."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from ltx_ray.headers import TensorInfo, read_header
from ltx_ray.lorafiles import Factor, LoraPair
from ltx_ray.model.config import TransformerConfig
from ltx_ray.model.transformer import Transformer
from ltx_ray.parallel.layers import TPGroup
from ltx_ray.toy.config import ToyShape, checkpoint_config

LORA_RANK = 384
_BLOCK_BYTES = 64 * 2**20


def config(layers: int = 48) -> TransformerConfig:
    """The released widths (shared facts: 32 heads of 128 and of 64), with `layers` blocks."""
    shape = ToyShape(layers=layers, heads=32, head_dim=128, audio_head_dim=64)
    return TransformerConfig.from_metadata(checkpoint_config(shape)["transformer"])


def build(layers: int, tp: TPGroup = TPGroup()) -> Transformer:  # noqa: B008 (frozen)
    """The transformer on the meta device."""
    with torch.device("meta"):
        return Transformer(config(layers), tp)


def lora_modules(model: Transformer) -> list[str]:
    """The 34 linear layers of each block, which the distilled LoRA changes: 1,632 at 48 blocks."""
    return [
        name[: -len(".weight")]
        for name, p in model.named_parameters()
        if name.startswith("transformer_blocks.") and name.endswith(".weight") and p.dim() == 2
    ]


def write_checkpoint(path: Path, layers: int) -> dict[str, TensorInfo]:
    """A file with the transformer's tensors in bfloat16, random; returns where they are."""
    shapes = {name: tuple(p.shape) for name, p in build(layers).named_parameters()}
    return _write(path, shapes)


def write_lora(path: Path, layers: int, rank: int = LORA_RANK) -> dict[str, LoraPair]:
    """A file with the factors of a LoRA on every linear layer of the blocks."""
    model = build(layers)
    shapes = {}
    for module in lora_modules(model):
        n_out, n_in = model.get_parameter(f"{module}.weight").shape
        shapes |= {f"{module}.lora_A.weight": (rank, n_in), f"{module}.lora_B.weight": (n_out, rank)}
    infos = _write(path, shapes)
    return {
        module: LoraPair(Factor(infos[f"{module}.lora_A.weight"]), Factor(infos[f"{module}.lora_B.weight"]))
        for module in lora_modules(model)
    }


def _write(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    table, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    if path.exists() and path.stat().st_size == 8 + len(header) + end:
        return dict(read_header(path).tensors)
    # one random block again and again, at another place in each tensor: as random as a copy engine can tell
    torch.manual_seed(0)
    block = (torch.randn(_BLOCK_BYTES // 2) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        left = end
        while left > 0:
            left -= file.write(block[: min(left, len(block))])
    return dict(read_header(path).tensors)
