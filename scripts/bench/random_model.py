#!/usr/bin/env python
"""A complete model at the released widths with random bfloat16 weights, for the benchmarks that render clips.

    scripts/bench/random_model.py FOLDER [--layers 12] [--gemma-layers 12] [--connector-layers 8]

Writes the files that a user downloads: the single file, the distilled LoRA of rank 384, the spatial upsampler and a
Gemma directory. Smaller than the release are the depths given, Gemma's vocabulary (the toy's tokenizer, with 1,024
words instead of 262,208) and its vision tower, which is never run. Keys, metadata and standard deviations are the
toy's (ltx_ray/toy), so that latents stay finite and frames are smooth enough for a realistic load on the encoder.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import struct
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ltx_ray.toy import gemma, weights
from ltx_ray.toy.config import MODEL_VERSION, ToyShape, checkpoint_config, upsampler_config

FILES = {
    "checkpoint_path": "ltx-2.3-real-dev.safetensors",
    "distilled_lora": "ltx-2.3-real-distilled-lora-384.safetensors",
    "spatial_upsampler_path": "ltx-2.3-real-spatial-upscaler-x2.safetensors",
    "gemma_root": "gemma-3-real",
}
RANK = 384
#: Of Gemma 3 12B; its hidden size is 3840 and it has 48 layers.
GEMMA = {
    "head_dim": 256,
    "intermediate_size": 15360,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "query_pre_attn_scalar": 256,
    "sliding_window": 1024,
}
#: Every sixth layer of Gemma has full attention; the others see their sliding window only.
_GEMMA_FULL_EVERY = 6
#: Tensors from this size on are never made: they are written from one random block.
_LAZY = 1 << 20
#: Odd, so that the rows of a matrix larger than the block do not repeat.
_BLOCK = (1 << 25) - 39
_WRITERS = 8


def shape(layers: int = 48, gemma_layers: int = 48, connector_layers: int = 8) -> ToyShape:
    """The released widths. The VAE's and the vocoder's are those of diffusers' conversion script for 2.3."""
    return ToyShape(
        layers=layers,
        heads=32,
        head_dim=128,
        audio_head_dim=64,
        connector_layers=connector_layers,
        gemma_hidden=3840,
        gemma_layers=gemma_layers,
        gemma_heads=GEMMA["num_attention_heads"],
        gemma_kv_heads=GEMMA["num_key_value_heads"],
        encoder_layers=(4, 6, 4, 2, 2),
        encoder_multipliers=(2, 2, 2, 1),
        decoder_layers=(4, 6, 4, 2, 2),
        decoder_base=128,
        audio_mult=(1, 2, 4),
        audio_blocks=2,
        vocoder_channels=1536,
        bwe_channels=512,
        upsampler_channels=1024,
        upsampler_blocks=4,
        lora_rank=RANK,
    )


class Plan(weights.Draw):
    """The tensors of a file: small ones drawn, large ones on the meta device with their distribution."""

    def __init__(self, seed: int):
        super().__init__(torch.Generator().manual_seed(seed))
        #: (standard deviation, mean) of each tensor on the meta device.
        self.distribution: dict[str, tuple[float, float]] = {}

    def vector(self, key: str, shape, std: float, mean: float = 0.0) -> None:
        if math.prod(shape) < _LAZY:
            super().vector(key, shape, std, mean)
            return
        assert key not in self.tensors, key
        self.tensors[key] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        self.distribution[key] = (std, mean)


def write_model(folder: Path, layers: int, gemma_layers: int, connector_layers: int = 8) -> dict[str, str]:
    """Write the model into `folder` and return its paths by option name. A file with its header and size is kept."""
    size = shape(layers, gemma_layers, connector_layers)
    paths = {name: folder / file for name, file in FILES.items()}
    paths["gemma_root"].mkdir(parents=True, exist_ok=True)

    config = checkpoint_config(size)
    plan = Plan(0)
    weights.draw_transformer(plan, size)
    blocks = {key: tensor for key, tensor in plan.tensors.items() if ".transformer_blocks." in key}
    weights.draw_text(plan, size)
    weights.draw_video_vae(plan, config["vae"])
    weights.draw_audio_vae(plan, config["audio_vae"])
    weights.draw_vocoder(plan, config["vocoder"])
    _write(paths["checkpoint_path"], plan, {"config": json.dumps(config), "model_version": MODEL_VERSION})

    plan = Plan(1)
    weights.draw_lora(plan, blocks, size)
    _write(paths["distilled_lora"], plan, {"format": "pt"})

    plan = Plan(2)
    weights.draw_upsampler(plan, size)
    upsampler = {"config": json.dumps(upsampler_config(size)), "model_version": MODEL_VERSION}
    _write(paths["spatial_upsampler_path"], plan, upsampler)

    plan = Plan(3)
    _draw_gemma(plan, size)
    _write(paths["gemma_root"] / "model.safetensors", plan, {"format": "pt"})
    for name, content in _gemma_files(size).items():
        (paths["gemma_root"] / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    return {name: str(path) for name, path in paths.items()}


def _gemma_files(size: ToyShape) -> dict[str, dict]:
    """The toy's files, with the released sizes in config.json in place of those derived from the hidden size."""
    files = gemma.files(size)
    kinds = ["sliding_attention"] * (_GEMMA_FULL_EVERY - 1) + ["full_attention"]
    files["config.json"]["text_config"] |= GEMMA | {
        "layer_types": [kinds[layer % _GEMMA_FULL_EVERY] for layer in range(size.gemma_layers)]
    }
    return files


def _draw_gemma(plan: Plan, size: ToyShape) -> None:
    """The toy's tensors, with those of the layers drawn again at the sizes in GEMMA."""
    tiny = ToyShape(gemma_hidden=size.gemma_hidden, gemma_layers=1)
    gemma.draw_weights(plan, tiny)
    layer = "language_model.model.layers."
    for key in [key for key in plan.tensors if key.startswith(layer)]:
        del plan.tensors[key]
        plan.distribution.pop(key, None)
    dim, wide, head = size.gemma_hidden, GEMMA["intermediate_size"], GEMMA["head_dim"]
    query, few = GEMMA["num_attention_heads"] * head, GEMMA["num_key_value_heads"] * head
    matrices = {
        "self_attn.q_proj": (query, dim), "self_attn.k_proj": (few, dim), "self_attn.v_proj": (few, dim),
        "self_attn.o_proj": (dim, query),
        "mlp.gate_proj": (wide, dim), "mlp.up_proj": (wide, dim), "mlp.down_proj": (dim, wide),
    }  # fmt: skip
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    for number in range(size.gemma_layers):
        block = f"{layer}{number}."
        for name in norms:
            plan.vector(f"{block}{name}_layernorm.weight", (dim,), 0.2)
        for name in ("q", "k"):
            plan.vector(f"{block}self_attn.{name}_norm.weight", (head,), 0.2)
        for name, (n_out, n_in) in matrices.items():
            plan.vector(f"{block}{name}.weight", (n_out, n_in), 1 / math.sqrt(n_in))


# --- writing -----------------------------------------------------------------------------------------------------


def _write(path: Path, plan: Plan, metadata: dict[str, str]) -> None:
    """Write the plan as a safetensors file with several threads, and publish it by rename."""
    table: dict[str, object] = {"__metadata__": metadata}
    places, end = {}, 0
    for name, tensor in plan.tensors.items():
        places[name] = end
        table[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    start = struct.pack("<Q", len(header)) + header
    if path.exists() and path.stat().st_size == len(start) + end:
        with open(path, "rb") as file:
            if file.read(len(start)) == start:
                return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    try:
        os.pwrite(descriptor, start, 0)
        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(lambda name: _fill(descriptor, len(start) + places[name], plan, name), places))
        os.rename(temporary, path)
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


def _fill(descriptor: int, offset: int, plan: Plan, name: str) -> None:
    tensor = plan.tensors[name]
    if not tensor.is_meta:
        _pwrite(descriptor, tensor.view(torch.uint8).numpy().reshape(-1).data, offset)
        return
    with _LOCK:  # else several threads would compute the same block
        block = _block(*plan.distribution[name])
    left, at = 2 * tensor.numel(), offset // 2 % _BLOCK * 2
    while left:
        part = block[at : at + min(left, len(block) - at)]
        _pwrite(descriptor, part, offset)
        offset, left, at = offset + len(part), left - len(part), 0


_LOCK = threading.Lock()


@functools.cache
def _uniform() -> torch.Tensor:
    """A block of uniform numbers with mean 0 and standard deviation 1, as in `weights.Draw`, for all large tensors."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(_BLOCK, generator=generator) * 2 - 1) * math.sqrt(3.0)


@functools.lru_cache(maxsize=24)
def _block(std: float, mean: float) -> memoryview:
    """The block scaled and shifted, as bytes of bfloat16. Large tensors have few distributions."""
    return (_uniform() * std + mean).bfloat16().view(torch.uint8).numpy().data


def _pwrite(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done


def size_of(paths: Mapping[str, str]) -> int:
    """Bytes of the files at `paths`, and of those in the folders there."""
    files = [file for path in paths.values() for file in [Path(path), *Path(path).glob("*")]]
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=12, help="blocks of the transformer, 48 in the release")
    parser.add_argument("--gemma-layers", type=int, default=12, help="48 in the release")
    parser.add_argument("--connector-layers", type=int, default=8, help="8 in the release")
    arguments = parser.parse_args()
    began = time.perf_counter()
    paths = write_model(arguments.folder, arguments.layers, arguments.gemma_layers, arguments.connector_layers)
    seconds, total = time.perf_counter() - began, size_of(paths)
    for name, path in paths.items():
        print(f"{size_of({name: path}) / 1e9:8.2f} GB  {name:24} {path}")
    print(f"{total / 1e9:8.2f} GB  in {seconds:.1f} s")


if __name__ == "__main__":
    main()
