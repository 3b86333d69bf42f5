"""The toy model: the pieces of LTX-2.3 that a user downloads, at tiny widths and with random weights.

File formats, key names, metadata and features are those of the release (docs/ltx-2.3.md#checkpoint), so whatever loads
the release loads the toy. The weights are random, so its pictures mean nothing.

Importing this package is cheap, because torch is imported when a model is made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ltx_ray.checkpoints import transformer_keys
from ltx_ray.checkpoints.made_files import made_once
from ltx_ray.toy.config import MODEL_VERSION, ToyShape, checkpoint_config, upsampler_config

__all__ = ["FILES", "ToyShape", "make_toy_model", "ensure_toy_model"]

#: File or folder of each piece, by the name under which the command line takes it.
FILES = {
    "checkpoint_path": "ltx-2.3-toy-dev.safetensors",
    "distilled_lora": "ltx-2.3-toy-distilled-lora-1.1.safetensors",
    "spatial_upsampler_path": "ltx-2.3-toy-spatial-upscaler-x2-1.1.safetensors",
    "gemma_root": "gemma-toy",
}

_DEFAULT = ToyShape()


def save_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """Write a safetensors file whose bytes depend on its contents alone, and which every user may read.

    save_file writes the metadata in the order of a hash map, which differs between processes. The header is written
    again with sorted metadata, which does not change its length.
    """
    from safetensors.torch import save_file

    save_file(tensors, str(path), metadata=metadata)
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        entry = dict(sorted(header.pop("__metadata__").items()))
        text = json.dumps({"__metadata__": entry, **header}, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, (len(text), length)
        file.seek(8)
        file.write(text.ljust(length))
    os.chmod(path, 0o644)  # save_file gives access to the owner only


def make_toy_model(out_dir: str | os.PathLike, *, seed: int = 0, shape: ToyShape = _DEFAULT) -> dict[str, str]:
    """Write the pieces into `out_dir`, which is made if it does not exist, and return their paths by the keys of FILES.

    The bytes depend on `seed` and `shape` alone.
    """
    import torch

    from ltx_ray.toy import gemma, weights

    out = Path(out_dir)
    paths = {name: out / file for name, file in FILES.items()}
    paths["gemma_root"].mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    config = checkpoint_config(shape)
    draw = weights.Draw(generator)
    weights.draw_transformer(draw, shape)
    weights.draw_text(draw, shape)
    weights.draw_video_vae(draw, config["vae"])
    weights.draw_audio_vae(draw, config["audio_vae"])
    weights.draw_vocoder(draw, config["vocoder"])
    checkpoint = draw.tensors
    save_tensors(paths["checkpoint_path"], checkpoint, {"config": json.dumps(config), "model_version": MODEL_VERSION})

    draw = weights.Draw(generator)
    weights.draw_lora(draw, checkpoint, shape)
    save_tensors(paths["distilled_lora"], draw.tensors, {"format": "pt"})

    draw = weights.Draw(generator)
    weights.draw_upsampler(draw, shape)
    upsampler = {"config": json.dumps(upsampler_config(shape)), "model_version": MODEL_VERSION}
    save_tensors(paths["spatial_upsampler_path"], draw.tensors, upsampler)

    draw = weights.Draw(generator)
    gemma.draw_weights(draw, shape)
    save_tensors(paths["gemma_root"] / "model.safetensors", draw.tensors, {"format": "pt"})
    for name, content in gemma.files(shape).items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (paths["gemma_root"] / name).write_text(text, encoding="utf-8")
    return {name: str(path) for name, path in paths.items()}


def _digest(
    package: Path = Path(__file__).parent,
    tensor_names: Path = Path(transformer_keys.__file__),
) -> str:
    """Twelve hex digits that identify this generator: its default shape, its source, and the tensor names it uses."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(_DEFAULT)).encode())
    for file in [*sorted(package.glob("[!.]*.py")), tensor_names]:
        source = file.read_bytes()
        digest.update(f"{file.name} {len(source)}\n".encode() + source)
    return digest.hexdigest()[:12]


def ensure_toy_model(cache_dir: str | os.PathLike | None = None) -> dict[str, str]:
    """The paths of the default toy model, as make_toy_model returns them. The model is made on first use.

    `cache_dir`: see `made_once`. The folder's name has a digest of the generator, so every version of it makes a folder
    of its own.
    """
    folder = made_once(f"toy-{MODEL_VERSION}-{_digest()}", lambda making: make_toy_model(making), cache_dir)
    return {name: str(folder / file) for name, file in FILES.items()}
