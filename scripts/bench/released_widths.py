"""The 22B transformer's tensors with random values, for the benchmarks: as files, or on a device."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ltx_ray.checkpoints.lora import Factor, LoraPair
from ltx_ray.checkpoints.safetensors import TensorInfo, read_header
from ltx_ray.checkpoints.transformer_config import TransformerConfig
from ltx_ray.model.transformer import Transformer
from ltx_ray.parallel.layers import TPGroup
from ltx_ray.toy.config import ToyShape, checkpoint_config

LORA_RANK = 384
_BLOCK_BYTES = 64 * 2**20


def metadata(layers: int = 48, tiny: bool = False) -> dict[str, Any]:
    """The `config` of a checkpoint of the released widths (shared facts: 32 heads of 128 and of 64), `layers` blocks.

    `tiny` widths are for trying a script out; they are multiples of what fp8 products need.
    """
    heads, head_dim = (16, 32) if tiny else (32, 128)
    return checkpoint_config(ToyShape(layers=layers, heads=heads, head_dim=head_dim, audio_head_dim=head_dim // 2))


def config(layers: int = 48, tiny: bool = False) -> TransformerConfig:
    """The architecture of `metadata`."""
    return TransformerConfig.from_metadata(metadata(layers, tiny)["transformer"])


def build(layers: int, tp: TPGroup = TPGroup()) -> Transformer:  # noqa: B008 (frozen)
    """The transformer on the meta device."""
    with torch.device("meta"):
        return Transformer(config(layers), tp)


def values(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Random values of the parameter that a checkpoint calls `name`: always the same on one device model.

    Products keep the scale of what they are given, norms and modulations do something, and no bias is zero, so that
    leaving any of them out shows in the result.
    """
    rng = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    # bfloat16 whatever is asked for: all dtypes shall hold the same model
    noise = torch.randn(shape, generator=rng, device=device, dtype=torch.bfloat16)
    if "scale_shift_table" in name:
        noise.mul_(0.1)
    elif len(shape) == 2:
        noise.mul_(max(0.02, shape[1] ** -0.5))
    elif "norm" in name:
        noise.mul_(0.1).add_(1)
    else:
        noise.mul_(0.02)
    return noise.to(dtype)


def fill(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    store: Callable[[nn.Parameter, torch.Tensor], None] | None = None,
    official: Callable[[str], str] = lambda name: name,
) -> None:
    """Give every parameter of `model` its `values`; those on the meta device get memory on `device`.

    `store` writes into a parameter that has memory (default: a copy), `official` turns the model's names into the
    checkpoint's.
    """
    for path, module in model.named_modules():
        for key, old in module.named_parameters(recurse=False):
            new = values(official(f"{path}.{key}" if path else key), tuple(old.shape), device, dtype)
            if not old.is_meta:
                (store or (lambda parameter, what: parameter.data.copy_(what)))(old, new)
                continue
            parameter = nn.Parameter(new, requires_grad=False)
            if hasattr(old, "shard_dim"):
                parameter.shard_dim = old.shard_dim
            setattr(module, key, parameter)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, f"buffers without memory: {left}"


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
