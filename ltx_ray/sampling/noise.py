"""All random numbers of a clip: those of the ledger's generator, and the sampler's own.

Source: docs/ltx-2.3.md#noise; `ltx_core/components/noisers.py` and `ltx_pipelines/utils/samplers.py` of the reference
v1.2.0.
"""

from __future__ import annotations

import torch

from ltx_ray.records import AV, NoiseLedger, WrongDevice

#: Seeds of the sampler's noise, whatever the row's seed is (docs/ltx-2.3.md#sampler-noise).
STEP_SEED = -1
SUBSTEP_SEED = 9999


def check_noise_device(ledger: NoiseLedger, device_name: str) -> None:
    """Raise WrongDevice when the device `device_name` (a GPU's model, or "cpu") cannot repeat the ledger's draws."""
    if ledger.device == "cuda" and ledger.device_model != device_name:
        raise WrongDevice(
            f"stage 1 drew its noise on {ledger.device_model}, and this replica runs on {device_name}; "
            "legal: GPUs of one model, or --noise-device cpu"
        )


class ClipNoise:
    """The generator of a clip's initial noise in both stages, after the draws that the ledger lists.

    Every draw extends the ledger. Draws are made on the ledger's device, since another one gives other numbers, and
    returned on `device`. Their order is that of docs/ltx-2.3.md#order-of-draws.
    """

    def __init__(self, ledger: NoiseLedger, device: torch.device):
        self.ledger, self.device = ledger, device
        self._generator = torch.Generator(ledger.device).manual_seed(ledger.seed)
        for _, shape, dtype in ledger.draws:
            self._randn(shape, getattr(torch, dtype))

    def draw(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next standard normal numbers, of `shape` and `dtype`. The ledger lists them as `name`."""
        noise = self._randn(shape, dtype)
        self.ledger = self.ledger.extended(name, shape, str(dtype).removeprefix("torch."))
        return noise.to(self.device)

    def _randn(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, dtype=dtype, device=self.ledger.device)


class SamplerNoise:
    """Noise of res_2s (a sampler.NoiseSource): two generators with fixed seeds, new ones for each stage."""

    def __init__(self, device: str | torch.device):
        self._step = torch.Generator(device).manual_seed(STEP_SEED)
        self._substep = torch.Generator(device).manual_seed(SUBSTEP_SEED)

    def substep(self, like: AV[torch.Tensor]) -> AV[torch.Tensor]:
        """Noise for the midpoint of a step: float64, shaped and placed as `like`, video drawn first."""
        return like.map(lambda x: _normalized(self._substep, x))

    def step(self, like: AV[torch.Tensor]) -> AV[torch.Tensor]:
        """Noise for a whole step, as `substep` gives it."""
        return like.map(lambda x: _normalized(self._step, x))


def _normalized(generator: torch.Generator, like: torch.Tensor) -> torch.Tensor:
    """Float64 normal numbers, normalised as a whole and then over the last two axes (docs/ltx-2.3.md#sampler-noise)."""
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float64, device=generator.device)
    noise = (noise - noise.mean()) / noise.std()
    noise.sub_(noise.mean(dim=(-2, -1), keepdim=True))
    noise.div_(noise.std(dim=(-2, -1), keepdim=True))
    return noise.to(like.device)


def add_noise(
    noise: torch.Tensor, latent: torch.Tensor, clean_latent: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """lerp(clean_latent, lerp(latent, noise, scale), mask): where a stage begins (docs/ltx-2.3.md#initial-state).

    Tensors are (1, T, C), the denoise mask (1, T, 1), where None means 1 everywhere. Computed in float32, returned in
    the latent's dtype.
    """
    mixed = torch.lerp(latent.float(), noise.float(), scale)
    if mask is not None:
        mixed = torch.lerp(clean_latent.float(), mixed, mask)
    return mixed.to(latent.dtype)
