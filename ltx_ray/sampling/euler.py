"""Euler: the first-order sampler of the base and distilled pipelines.

Formulas: docs/ltx-2.3.md#euler. Source: `euler_denoising_loop` in `ltx_pipelines/utils/samplers.py` and
`EulerDiffusionStep` in `ltx_core/components/diffusion_steps.py` of the reference v1.2.0.
"""

from __future__ import annotations

import torch

from ltx_ray.records import AV
from ltx_ray.sampling.sampler import Blend, Denoise, NoiseSource


def sample_euler(
    denoise: Denoise,
    latents: AV[torch.Tensor],
    sigmas: torch.Tensor,
    noise: NoiseSource,
    blend: Blend,
) -> AV[torch.Tensor]:
    """Denoise packed `latents` (1, T, C) along `sigmas` (n + 1 float32, on the host) in n calls.

    Draws no noise. The velocity is rounded to the latents' dtype before the step, as in the reference.
    """
    for index in range(len(sigmas) - 1):
        sigma = sigmas[index].item()
        distance = (sigmas[index + 1] - sigmas[index]).item()
        x0 = blend(denoise(latents, sigmas[index], index))

        def step(x: torch.Tensor, d: torch.Tensor, sigma: float = sigma, distance: float = distance) -> torch.Tensor:
            velocity = ((x.float() - d.float()) / sigma).to(x.dtype)
            return (x.float() + velocity.float() * distance).to(x.dtype)

        latents = latents.map(step, x0)
    return latents
