"""Euler: the first-order sampler of the base and distilled pipelines.

Source: `euler_denoising_loop` and `EulerDiffusionStep` of the reference v1.2.0.
"""

from __future__ import annotations

import torch

from ltx_ray.records import AV
from ltx_ray.sampling.noise import NoiseSource
from ltx_ray.sampling.res2s import Blend, Denoise


def sample_euler(
    denoise: Denoise,
    latents: AV[torch.Tensor],
    sigmas: torch.Tensor,
    noise: NoiseSource,
    blend: Blend,
) -> AV[torch.Tensor]:
    """Denoise packed `latents` (1, T, C) along `sigmas` (n + 1 float32 levels on the host), one call a step.

    Draws no noise. The velocity is rounded to the latents' dtype before the step, as in the reference.
    """
    for index in range(len(sigmas) - 1):
        level = sigmas[index].item()
        distance = (sigmas[index + 1] - sigmas[index]).item()
        x0 = blend(denoise(latents, sigmas[index], index))

        def step(x: torch.Tensor, d: torch.Tensor, level: float = level, distance: float = distance) -> torch.Tensor:
            velocity = ((x.float() - d.float()) / level).to(x.dtype)
            return (x.float() + velocity.float() * distance).to(x.dtype)

        latents = latents.map(step, x0)
    return latents
