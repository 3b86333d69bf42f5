"""The miniature's files in the released layout, assembled in the cache from the parts in the package.

The release is a single file with all parts but three, which are files or folders of their own. The distilled checkpoint
is the same with the distilled LoRA merged at strength 1.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ltx_ray.checkpoints.made_files import made_once
from ltx_ray.checkpoints.transformer_keys import TRANSFORMER_PREFIX
from ltx_ray.miniature.config import MODEL_VERSION, WEIGHTS

if TYPE_CHECKING:
    import torch

#: Parts that make up the single file, parts that are files of their own, and the folder of the text encoder.
_SINGLE_FILE = ("vae.safetensors", "audio.safetensors", "transformer.safetensors")
_UPSAMPLER, _LORA, _GEMMA = "upsampler.safetensors", "distilled_lora.safetensors", "gemma"
#: Sources of which the assembled bytes depend.
_SOURCES = ("config.py", "export.py", "files.py")

#: File or folder of each piece, by the name under which the command line takes it.
FILES = {
    "checkpoint_path": "ltx-2.3-miniature-dev.safetensors",
    "distilled_lora": "ltx-2.3-miniature-distilled-lora-1.1.safetensors",
    "spatial_upsampler_path": "ltx-2.3-miniature-spatial-upscaler-x2-1.1.safetensors",
    "gemma_root": "gemma-miniature",
}
#: The same of the distilled checkpoint, which has no distilled LoRA.
DISTILLED_FILES = {
    "checkpoint_path": "ltx-2.3-miniature-distilled.safetensors",
    **{name: FILES[name] for name in ("spatial_upsampler_path", "gemma_root")},
}


def ensure_miniature(cache_dir: str | os.PathLike | None = None, weights: Path | None = None) -> dict[str, str]:
    """Paths of the miniature's files, by the keys of FILES. They are assembled on first use.

    `cache_dir`: see `made_once`. `weights` is the folder of the parts, by default the package's. The folder's name has
    a digest of the parts, so other parts make a folder of their own. Raises ValueError that names a part which is not
    there.
    """
    weights = weights or WEIGHTS
    folder = made_once(f"miniature-{_digest(weights)}", lambda making: _assemble(weights, making), cache_dir)
    return {name: str(folder / file) for name, file in FILES.items()}


def ensure_miniature_distilled(
    cache_dir: str | os.PathLike | None = None, weights: Path | None = None
) -> dict[str, str]:
    """Paths of the distilled miniature's files, by the keys of DISTILLED_FILES; otherwise as `ensure_miniature`.

    Its weights have the bits that a bfloat16 run on a CPU has after it merged the LoRA at strength 1.
    """
    weights = weights or WEIGHTS
    name = f"miniature-distilled-{_digest(weights)}"
    folder = made_once(name, lambda making: _assemble_distilled(weights, making), cache_dir)
    return {name: str(folder / file) for name, file in DISTILLED_FILES.items()}


def _parts(weights: Path) -> Iterator[Path]:
    """Every file of the parts, in a fixed order. Raises ValueError that names a part which is not there."""
    for name in (*_SINGLE_FILE, _UPSAMPLER, _LORA):
        if not (weights / name).is_file():
            raise ValueError(
                f"the miniature is incomplete: {weights / name} is not there; legal: a file of trained weights"
            )
        yield weights / name
    gemma = weights / _GEMMA
    if not (gemma / "config.json").is_file():
        raise ValueError(f"the miniature is incomplete: {gemma} holds no Gemma; legal: a folder with config.json")
    yield from sorted(path for path in gemma.rglob("*") if path.is_file())


def _digest(weights: Path) -> str:
    """The model's version and twelve hex digits over the parts and over the code that assembles them."""
    paths = [*_parts(weights), *(Path(__file__).parent / name for name in _SOURCES)]
    states = [path.stat() for path in paths]
    return _digest_of(
        tuple((path, state.st_size, state.st_mtime_ns) for path, state in zip(paths, states, strict=True))
    )


@cache
def _digest_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    """`_digest` of files by path, size and time of change. A run asks for it many times."""
    digest = hashlib.sha256()
    for path, *_ in files:
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)}\n".encode() + data)
    return f"{MODEL_VERSION}-{digest.hexdigest()[:12]}"


def _assemble(weights: Path, folder: Path) -> None:
    """Write the files of FILES into `folder`."""
    from ltx_ray.miniature.export import save_part

    save_part(folder / FILES["checkpoint_path"], _single_file(weights))
    shutil.copyfile(weights / _LORA, folder / FILES["distilled_lora"])
    _copy_others(weights, folder)


def _assemble_distilled(weights: Path, folder: Path) -> None:
    """Write the files of DISTILLED_FILES into `folder`."""
    from ltx_ray.miniature.export import save_part

    tensors, target = _single_file(weights), folder / DISTILLED_FILES["checkpoint_path"]
    save_part(target, tensors)  # The merge reads a checkpoint and replaces it.
    merged = _merged(str(target), str(weights / _LORA))
    save_part(target, {**tensors, **{f"{TRANSFORMER_PREFIX}{name}": value for name, value in merged.items()}})
    _copy_others(weights, folder)


def _copy_others(weights: Path, folder: Path) -> None:
    shutil.copyfile(weights / _UPSAMPLER, folder / FILES["spatial_upsampler_path"])
    # Without the files' modes: other users of a shared cache may read what this one has copied.
    shutil.copytree(weights / _GEMMA, folder / FILES["gemma_root"], copy_function=shutil.copyfile)


def _single_file(weights: Path) -> dict[str, torch.Tensor]:
    """All tensors of the single file."""
    return joined([weights / name for name in _SINGLE_FILE])


def joined(parts: Iterable[Path]) -> dict[str, torch.Tensor]:
    """The tensors of all these files."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in parts:
        part = load_file(path)
        assert not tensors.keys() & part.keys(), tensors.keys() & part.keys()
        tensors.update(part)
    return tensors


def _merged(checkpoint_path: str, lora_path: str) -> dict[str, torch.Tensor]:
    """The transformer's tensors with the LoRA merged at strength 1, by the code that merges in a run."""
    import torch

    from ltx_ray.checkpoints.checkpoint import open_checkpoint
    from ltx_ray.checkpoints.lora import open_lora
    from ltx_ray.model.transformer import Transformer
    from ltx_ray.parallel.collectives import SINGLE_RANK
    from ltx_ray.parallel.loading import load_shard
    from ltx_ray.parallel.lora import LoraMerger, LoraSetting

    checkpoint = open_checkpoint(checkpoint_path)
    with torch.device("meta"):
        transformer = Transformer(checkpoint.transformer, SINGLE_RANK)
    load_shard(transformer, checkpoint.tensors, SINGLE_RANK, dtype=torch.bfloat16, device=torch.device("cpu"))
    lora = open_lora(lora_path).fit(checkpoint.linear_layers, checkpoint.path)
    merger = LoraMerger(transformer, checkpoint.tensors, [lora], SINGLE_RANK)
    with torch.no_grad():
        merger.switch_to(LoraSetting(((0, 1.0),)))
        merger.check_finite()
    return {name: parameter.detach().clone() for name, parameter in transformer.named_parameters()}
