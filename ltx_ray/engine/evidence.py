"""What a rank shows of what it computes with, before its replica joins a run (records.Evidence)."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from ltx_ray.checkpoints.digests import cached_digest
from ltx_ray.checkpoints.lora import lora_digest
from ltx_ray.checkpoints.node_cache import on_this_node
from ltx_ray.config import EngineSpec, ModelFiles
from ltx_ray.dataset.package_versions import installed_versions, package_versions
from ltx_ray.engine.patchify import latent_sizes
from ltx_ray.records import AV, Conditions, Evidence, PromptContext, ReplicaError
from ltx_ray.shapes import ClipShape

#: Seed of what a known-answer clip begins with, and tokens of its prompt.
_SEED, _PROMPT_TOKENS = 20_260_101, 16
KNOWN_SHAPE = ClipShape(num_frames=9, height=64, width=64, frame_rate=24.0)
_DRIVER_VERSION = Path("/sys/module/nvidia/version")


class FileDigests:
    """Digests of the files that an engine opens, found on a thread while the engine loads them.

    `parts`: fields of ModelFiles. Those that the model lacks are left out.
    """

    def __init__(self, spec: EngineSpec, *parts: str):
        self._model, self._scheme, self._parts = on_this_node(spec.model), spec.scheme, parts
        self._found: dict[str, str] = {}
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._find, name="digests", daemon=True)
        self._thread.start()

    def _find(self) -> None:
        try:
            for part in self._parts:
                self._found.update(_digests(self._model, part, self._scheme))
        except Exception as error:
            self._error = error

    def result(self) -> dict[str, str]:
        """By name, as `ItemBuilder.digests` has them. Raises what reading raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found


def _digests(model: ModelFiles, part: str, scheme: int) -> dict[str, str]:
    if part == "loras":
        return {f"lora {lora.name}": lora_digest(lora.path, scheme) for lora in model.loras}
    path = getattr(model, part)
    if path is None:
        return {}
    return {part: lora_digest(path, scheme) if part == "distilled_lora" else cached_digest(path, scheme=scheme)}


def evidence(
    files: FileDigests, device: torch.device, answers: dict[str, AV[torch.Tensor]], kernels: Sequence[str] = ()
) -> Evidence:
    """`answers`: what the engine computes for its known-answer clip; `kernels`: packages of those that it uses.

    Raises ReplicaError when an answer is not finite.
    """
    if bad := [name for name, values in answers.items() if not all(torch.isfinite(x).all() for x in values)]:
        raise ReplicaError(f"the {bad[0]} of the known-answer clip is not finite, so this device computes wrongly")
    driver = _DRIVER_VERSION.read_text().strip() if device.type == "cuda" and _DRIVER_VERSION.exists() else ""
    return Evidence(
        files=files.result(),
        versions=package_versions(),
        driver=driver,
        device=_device_name(device),
        answers={name: _digest(values) for name, values in answers.items()},
        kernels=installed_versions(kernels) if device.type == "cuda" else {},
    )


def known_conditions(dims: AV[int]) -> Conditions:
    """Conditions of a known-answer clip: contexts (1, 16, D) that follow from a seed, for the widths `dims`."""
    generator = torch.Generator("cpu").manual_seed(_SEED)
    context = dims.map(lambda dim: torch.randn((1, _PROMPT_TOKENS, dim), generator=generator))
    return Conditions(PromptContext(context, _PROMPT_TOKENS, truncated=False), None)


def known_latents() -> AV[torch.Tensor]:
    """Latents of a known-answer clip: standard normal numbers on the CPU that follow from a seed."""
    return latent_sizes(KNOWN_SHAPE).map(
        lambda size: torch.randn(size, generator=torch.Generator("cpu").manual_seed(_SEED))
    )


def _digest(values: AV[torch.Tensor]) -> str:
    """32 hex digits of sha256 over the bits of `values`."""
    digest = hashlib.sha256()
    for x in values:
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _device_name(device: torch.device) -> str:
    """The model of the GPU, or what decides how a CPU rounds."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})"
