"""What a sampler is: a pure function from a denoiser, latents, sigmas and a source of noise to denoised latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from ltx_ray.records import AV

#: (packed latents (1, T, C), sigma 0-d, step index) -> denoised latents x0, like the latents. Sigmas are on the host.
Denoise = Callable[[AV[torch.Tensor], torch.Tensor, int], AV[torch.Tensor]]
#: Puts the clean latent back where the denoise mask holds it.
Blend = Callable[[AV[torch.Tensor]], AV[torch.Tensor]]


class NoiseSource(Protocol):
    """Noise of a stochastic sampler: float64 tensors of the shapes of `like`."""

    def substep(self, like: AV[torch.Tensor]) -> AV[torch.Tensor]:
        """Noise for the midpoint of a step."""

    def step(self, like: AV[torch.Tensor]) -> AV[torch.Tensor]:
        """Noise for a whole step."""


class Sampler(Protocol):
    """Denoises packed latents (1, T, C) along n + 1 sigmas (float32, on the host), in n steps."""

    def __call__(
        self,
        denoise: Denoise,
        latents: AV[torch.Tensor],
        sigmas: torch.Tensor,
        noise: NoiseSource,
        blend: Blend,
    ) -> AV[torch.Tensor]: ...
