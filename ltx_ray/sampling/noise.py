"""All random numbers of a clip: the ledger's generator, and the sampler's own noise.

Source: `noisers.py` and `samplers.py` of the reference v1.2.0.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ltx_ray.records import AV, NoiseLedger, WrongDevice

STEP_SEED = -1
SUBSTEP_SEED = 9999


def check_drawable(ledger: NoiseLedger, device_name: str) -> None:
    """Raise WrongDevice when the device of this name (a GPU's model, or "cpu") cannot draw the ledger's numbers."""
    if ledger.device == "cuda" and ledger.device_model != device_name:
        raise WrongDevice(
            f"stage 1 drew its noise on {ledger.device_model}, and this replica runs on {device_name}; "
            "legal: GPUs of one model, or --noise-device cpu"
        )


class ClipNoise:
    """The generator of a clip, put where the ledger says and moving it on with every draw.

    `device` is where tensors are wanted; draws are made on the ledger's device (they are other
    numbers on another one).
    """

    def __init__(self, ledger: NoiseLedger, device: torch.device):
        self.ledger, self.device = ledger, device
        self._generator = torch.Generator(ledger.device).manual_seed(ledger.seed)
        for _, shape, dtype in ledger.draws:
            self._randn(shape, getattr(torch, dtype))

    def draw(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next normal numbers, of `shape` and `dtype`; the ledger remembers them as `name`."""
        noise = self._randn(shape, dtype)
        self.ledger = self.ledger.extended(name, shape, str(dtype).removeprefix("torch."))
        return noise.to(self.device)

    def _randn(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, dtype=dtype, device=self.ledger.device)


class NoiseSource(Protocol):
    """Noise of a stochastic sampler: AV pairs of float64 tensors shaped like `like`."""

    def substep(self, like: AV[torch.Tensor]) -> AV[torch.Tensor]: ...

    def step(self, like: AV[torch.Tensor]) -> AV[torch.Tensor]: ...


class SamplerNoise:
    """res_2s noise: two generators a stage with fixed seeds, whatever the row's seed is."""

    def __init__(self, device: str | torch.device):
        self._step = torch.Generator(device).manual_seed(STEP_SEED)
        self._substep = torch.Generator(device).manual_seed(SUBSTEP_SEED)

    def substep(self, like: AV[torch.Tensor]) -> AV[torch.Tensor]:
        return like.map(lambda x: _normalized(self._substep, x))

    def step(self, like: AV[torch.Tensor]) -> AV[torch.Tensor]:
        return like.map(lambda x: _normalized(self._step, x))


def _normalized(generator: torch.Generator, like: torch.Tensor) -> torch.Tensor:
    """Float64 normal numbers, made exactly standard as a whole and then over the last two axes."""
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float64, device=generator.device)
    noise = (noise - noise.mean()) / noise.std()
    noise.sub_(noise.mean(dim=(-2, -1), keepdim=True))
    noise.div_(noise.std(dim=(-2, -1), keepdim=True))
    return noise.to(like.device)


def noised(noise: torch.Tensor, latent: torch.Tensor, clean: torch.Tensor, mask: torch.Tensor | None, scale: float):
    """Start of a stage: `latent` on the way to `noise` by `scale` where `mask` is 1, `clean` where it is 0.

    In float32, returned in the latent's dtype. `mask` None means 1 everywhere.
    """
    mixed = torch.lerp(latent.float(), noise.float(), scale)
    if mask is not None:
        mixed = torch.lerp(clean.float(), mixed, mask)
    return mixed.to(latent.dtype)
