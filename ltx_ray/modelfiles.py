"""Checkpoints seen from outside: what is in them, what they can serve, their digests. No torch.

A user's mistake with a file (wrong generation, a missing piece, a truncated download) is found here,
before any actor starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ltx_ray.headers import MAX_HEADER_BYTES, SafetensorsHeader, TensorInfo, read_header

TRANSFORMER_PREFIX = "model.diffusion_model."
CONNECTOR_PREFIXES = (
    "model.diffusion_model.video_embeddings_connector.",
    "model.diffusion_model.audio_embeddings_connector.",
)
SUPPORTED_GENERATION = (2, 3)
#: What a single file must hold, by the prefix of its keys.
PIECES = {
    "model.diffusion_model.transformer_blocks.": "transformer",
    "model.diffusion_model.video_embeddings_connector.": "video text connector",
    "model.diffusion_model.audio_embeddings_connector.": "audio text connector",
    "text_embedding_projection.": "text projection",
    "vae.decoder.": "video decoder",
    "vae.encoder.": "video encoder",
    "vae.per_channel_statistics.": "statistics of the video latents",
    "audio_vae.decoder.": "audio decoder",
    "vocoder.vocoder.": "vocoder",
    "vocoder.bwe_generator.": "bandwidth extension of the vocoder",
}

_SAMPLES = 64
_SAMPLE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a model from its headers alone.

    `transformer` is `config.transformer` in the official spelling; `tensors` holds the transformer's
    tensors by their official names without prefix (no connectors), wherever they are; `size` in bytes.
    """

    path: str
    model_version: str
    transformer: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    size: int

    @property
    def num_layers(self) -> int:
        return int(self.transformer.get("num_layers", 48))

    @property
    def num_heads(self) -> int:
        return int(self.transformer.get("num_attention_heads", 32))

    @cached_property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Transformer linears by module name, as (out features, in features)."""
        return {
            name[: -len(".weight")]: (info.shape[0], info.shape[1])
            for name, info in self.tensors.items()
            if name.endswith(".weight") and len(info.shape) == 2
        }


def parse_generation(model_version: str) -> tuple[int, ...]:
    """Leading numbers of a `model_version` such as "2.3.1" or "2.3-rc1" (empty when there are none)."""
    match = re.match(r"\d+(?:\.\d+)*", model_version.strip())
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def open_checkpoint(path: str) -> Checkpoint:
    """Open an LTX single file, or raise ValueError when it is not of the supported generation."""
    header = read_header(path)
    version = header.metadata.get("model_version", "")
    generation = parse_generation(version)
    if not version and "transformer" not in header.config:
        raise ValueError(
            f"{path}: not an LTX checkpoint (its metadata has neither model_version nor config.transformer); "
            f"legal: an official LTX-2.3 single file such as ltx-2.3-22b-dev.safetensors"
        )
    if generation[:2] != SUPPORTED_GENERATION:
        raise ValueError(
            f"{path}: model_version is {version or 'not given'!r}; legal: 2.3.x "
            f"(LTX-2.0 and LTX-2.5 are other architectures)"
        )
    for prefix, piece in PIECES.items():
        if not any(name.startswith(prefix) for name in header.tensors):
            raise ValueError(f"{path}: has no {piece} (no keys under {prefix}); legal: a whole single file")
    return Checkpoint(path, version, header.config.get("transformer", {}), _transformer_tensors(header), header.size)


def _transformer_tensors(header: SafetensorsHeader) -> dict[str, TensorInfo]:
    return {
        name[len(TRANSFORMER_PREFIX) :]: info
        for name, info in header.tensors.items()
        if name.startswith(TRANSFORMER_PREFIX) and not name.startswith(CONNECTOR_PREFIXES)
    }


def check_upsampler(path: str) -> None:
    """Raise ValueError unless the file at `path` is a spatial latent upsampler x2."""
    header = read_header(path)
    config = header.config
    doubles = config.get("spatial_upsample", True) and not config.get("temporal_upsample", False)
    if "initial_conv.weight" not in header.tensors or not doubles or config.get("spatial_scale", 2.0) != 2.0:
        example = "ltx-2.3-spatial-upscaler-x2-1.1.safetensors"
        raise ValueError(f"{path}: not a spatial upsampler x2; legal: such as {example}")


def check_tensor_parallel(checkpoint: Checkpoint, tp: int) -> None:
    """Raise ValueError unless the attention heads can be divided over `tp` ranks."""
    heads = checkpoint.num_heads
    if tp < 1 or heads % tp:
        legal = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(f"--tp: {tp}, legal: a divisor of the {heads} attention heads of {checkpoint.path}: {legal}")


def file_digest(path: str) -> str:
    """32 hex digits for a file: its size, its head and fixed samples of the rest.

    A 46 GB file takes some 4 MB of reading. Files up to that size are hashed whole.
    """
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(file.read())
        else:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if path.endswith(".safetensors") else 0
            digest.update(head + file.read(min(length, MAX_HEADER_BYTES)))
            for i in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def cached_digest(path: str, cache_dir: Path | None = None) -> str:
    """`file_digest`, or for a directory the digest over its config, tokenizer and weight files.

    Cached by path, size and mtime under `cache_dir` (default: the ltx-ray cache).
    """
    if os.path.isdir(path):
        files = sorted(
            p for p in Path(path).rglob("*") if p.suffix in (".safetensors", ".json", ".model") and p.is_file()
        )
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.relative_to(path)}:{cached_digest(str(file), cache_dir)}\n".encode())
        return digest.hexdigest()[:32]
    stat = os.stat(path)
    key = [os.path.realpath(path), stat.st_size, stat.st_mtime_ns]
    folder = (cache_dir or cache_root()) / "digests"
    entry = folder / (hashlib.sha256(key[0].encode()).hexdigest()[:32] + ".json")
    try:
        stored = json.loads(entry.read_text())
        if stored["key"] == key:
            return stored["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = file_digest(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = entry.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"key": key, "digest": digest}))
        temporary.replace(entry)
    except OSError:
        pass  # a read-only home only costs the reading again
    return digest


def cache_root() -> Path:
    """$LTX_RAY_CACHE, or `ltx-ray` in the user's cache directory."""
    if explicit := os.environ.get("LTX_RAY_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ltx-ray"
