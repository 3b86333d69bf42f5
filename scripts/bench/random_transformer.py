"""The 22B transformer with random values at the released widths, as files or on a device, for the benchmarks."""

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
from ltx_ray.parallel.collectives import SINGLE_RANK, RankGroup
from ltx_ray.parallel.layers import ShardParameter, shard_parameter
from ltx_ray.toy.config import ToyShape, checkpoint_config

LORA_RANK = 384
_BLOCK_BYTES = 64 * 2**20


def metadata(layers: int = 48, tiny: bool = False) -> dict[str, Any]:
    """The `config` of a checkpoint with `layers` blocks at the released widths (docs/ltx-2.3.md#metadata).

    `tiny` widths are for trying out a script. They are multiples of what fp8 products need.
    """
    heads, head_dim = (16, 32) if tiny else (32, 128)
    return checkpoint_config(ToyShape(layers=layers, heads=heads, head_dim=head_dim, audio_head_dim=head_dim // 2))


def config(layers: int = 48, tiny: bool = False) -> TransformerConfig:
    """The architecture that `metadata` describes."""
    return TransformerConfig.from_metadata(metadata(layers, tiny)["transformer"])


def build(layers: int, tp: RankGroup = SINGLE_RANK) -> Transformer:
    """The transformer on the meta device."""
    with torch.device("meta"):
        return Transformer(config(layers), tp)


def values(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Random values of the parameter `name` of a checkpoint, always the same on one device model.

    Linear layers keep the scale of their input, norms and modulations change theirs, and no bias is zero. An
    implementation that leaves any of them out therefore gets another result.
    """
    rng = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    # Drawn in bfloat16, so that the model is the same in every dtype.
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
    tp: RankGroup = SINGLE_RANK,
) -> None:
    """Fill every parameter of `model` with its `values`; one on the meta device is allocated on `device`.

    `store` writes into a parameter that is allocated already (default: a copy). `official` maps the model's names to
    the checkpoint's. Ranks of `tp` get their parts of the same values.
    """
    for path, module in model.named_modules():
        for key, old in list(module.named_parameters(recurse=False)):
            name, shape = official(f"{path}.{key}" if path else key), list(old.shape)
            shard_dim = old.shard_dim if isinstance(old, ShardParameter) and tp.size > 1 else None
            if shard_dim is not None:
                shape[shard_dim] *= tp.size
            new = values(name, tuple(shape), device, dtype)
            if shard_dim is not None:
                new = new.chunk(tp.size, shard_dim)[tp.rank].contiguous()
            if not old.is_meta:
                (store or (lambda parameter, data: parameter.data.copy_(data)))(old, new)
                continue
            replace_parameter(module, key, new)
    missing = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not missing, f"buffers on the meta device: {missing}"


def replace_parameter(module: nn.Module, key: str, values: torch.Tensor) -> None:
    """Put `values` in the place of a parameter on the meta device."""
    old = module.get_parameter(key)
    new = shard_parameter(values, old.shard_dim) if isinstance(old, ShardParameter) else nn.Parameter(values, False)
    setattr(module, key, new)


def lora_modules(model: Transformer) -> list[str]:
    """The linear layers that the distilled LoRA changes: 34 in each block, 1,632 in all 48."""
    return [
        name[: -len(".weight")]
        for name, p in model.named_parameters()
        if name.startswith("transformer_blocks.") and name.endswith(".weight") and p.dim() == 2
    ]


def write_checkpoint(path: Path, layers: int) -> dict[str, TensorInfo]:
    """Write random bfloat16 tensors of the transformer; returns the tensors' places in the file."""
    shapes = {name: tuple(p.shape) for name, p in build(layers).named_parameters()}
    return _write(path, shapes)


def write_lora(path: Path, layers: int, rank: int = LORA_RANK) -> dict[str, LoraPair]:
    """Write random factors of a LoRA on every linear layer of the blocks; returns their places in the file."""
    model = build(layers)
    shapes: dict[str, tuple[int, ...]] = {}
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
    # One random block is repeated. Its offset differs from tensor to tensor, which is random enough for a copy.
    torch.manual_seed(0)
    block = (torch.randn(_BLOCK_BYTES // 2) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        left = end
        while left > 0:
            left -= file.write(block[: min(left, len(block))])
    return dict(read_header(path).tensors)
