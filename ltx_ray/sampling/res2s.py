"""res_2s: the second-order exponential sampler of the hq pipeline, with noise added at the midpoint and at each step.

The solver is the single-step refined exponential solver of Zhang, Song and Chen (RES, arXiv:2308.02157, algorithm 1)
with its free node at c2 = 1/2. Its coefficients are those of an explicit exponential Runge-Kutta method (Hochbruck and
Ostermann, Exponential integrators, Acta Numerica 19, 2010). The noise and the refinement of the anchor come from
RES4LYF; docs/ltx-2.3.md#res_2s has all formulas, in whose symbols this file is written.

Source: `res2s_audio_video_denoising_loop` in `ltx_pipelines/utils/samplers.py`, `ltx_pipelines/utils/res2s.py` and
`Res2sDiffusionStep` in `ltx_core/components/diffusion_steps.py` of the reference v1.2.0, in the mode that its pipelines
run. Between calls the state is float64; the model gets it in the latents' dtype.
"""

from __future__ import annotations

import math

import torch

from ltx_ray.records import AV
from ltx_ray.sampling.sampler import Blend, Denoise, NoiseSource

#: Stands for a final sigma of 0, whose logarithm the solver cannot take.
_FLOOR_SIGMA = 0.0011
#: Share of a step's noise level that is replaced by fresh noise, and its limit.
_ETA = 0.5
_MAX_ETA = 0.9999
_REFINE_BELOW_H = 0.5
_REFINE_ABOVE_SIGMA = 0.03
_REFINE_ITERATIONS = 100


def sample_res2s(
    denoise: Denoise,
    latents: AV[torch.Tensor],
    sigmas: torch.Tensor,
    noise: NoiseSource,
    blend: Blend,
) -> AV[torch.Tensor]:
    """Denoise packed `latents` (1, T, C) along `sigmas` (n + 1 float32, on the host) in n steps of two calls each.

    A final sigma of 0 is replaced by 0.0011, and one more call there gives the result. Steps call `denoise` with
    float32 sigmas and their index, midpoints with float64 sigmas and index 0.
    """
    dtype = latents.video.dtype
    steps = len(sigmas) - 1
    ends_clean = bool(sigmas[-1] == 0)
    if ends_clean:
        sigmas = torch.cat((sigmas[:-1], torch.tensor([_FLOOR_SIGMA, 0.0])))
    for index in range(steps):
        sigma, sigma_next = sigmas[index].double(), sigmas[index + 1].double()
        h = -torch.log(sigma_next / sigma).item()
        a21, b1, b2 = coefficients(h)
        x = latents.map(lambda t: t.double())
        x0 = blend(denoise(latents, sigmas[index], index))
        eps1 = x0.map(lambda d, t: d.double() - t, x)

        sigma_m = torch.sqrt(sigma * sigma_next)
        x_m = x.map(lambda t, e, k=h * a21: t + k * e, eps1)
        x_m = blend(_replace_with_noise(x, x_m, noise.substep(latents), sigma, sigma_m))
        if h < _REFINE_BELOW_H and sigma > _REFINE_ABOVE_SIGMA:
            x, eps1 = _refine_anchor(x, eps1, x_m, x0, h * a21)

        x0_m = blend(denoise(x_m.map(lambda t: t.to(dtype)), sigma_m, 0))
        eps2 = x0_m.map(lambda d, t: d.double() - t, x)
        x_next = AV(*(t + h * (b1 * e1 + b2 * e2) for t, e1, e2 in zip(x, eps1, eps2, strict=True)))
        x_next = blend(_replace_with_noise(x, x_next, noise.step(latents), sigmas[index], sigmas[index + 1]))
        latents = x_next.map(lambda t: t.to(dtype))
    if ends_clean:
        latents = blend(denoise(latents, sigmas[steps], steps)).map(lambda t: t.to(dtype))
    return latents


def coefficients(h: float) -> tuple[float, float, float]:
    """(a21, b1, b2) of the midpoint scheme (c2 = 1/2) for a step of size `h` in -log sigma."""
    c2 = 0.5
    a21 = c2 * _phi(1, -h * c2)
    b2 = _phi(2, -h) / c2
    return a21, _phi(1, -h) - b2, b2


def _phi(order: int, z: float) -> float:
    """phi_order(z) = (e^z - sum of its first `order` Taylor terms) / z^order."""
    if abs(z) < 1e-10:
        return 1.0 / math.factorial(order)
    taylor = sum(z**k / math.factorial(k) for k in range(order))
    return (math.exp(z) - taylor) / z**order


def _replace_with_noise(
    x: AV[torch.Tensor],
    x_to: AV[torch.Tensor],
    noise: AV[torch.Tensor],
    sigma: torch.Tensor,
    sigma_to: torch.Tensor,
) -> AV[torch.Tensor]:
    """`x_to` at `sigma_to`, part of whose noise is fresh. `x` at `sigma` is where the step began.

    Coefficients are computed in the dtype of the sigmas: float32 for steps, float64 for midpoints.
    """
    up = torch.minimum(sigma_to * _ETA, sigma_to * _MAX_ETA)
    residual = (sigma_to**2 - up**2).clamp(min=0) ** 0.5
    ratio = (1 - sigma_to) + residual
    down = residual / ratio
    distance, sigma_, ratio_, down_, up_ = (v.item() for v in (sigma - sigma_to, sigma, ratio, down, up))

    def with_noise(x: torch.Tensor, x_to: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        e = (x - x_to) / distance
        return ratio_ * ((x - sigma_ * e) + down_ * e) + up_ * n

    return x.map(with_noise, x_to, noise)


def _refine_anchor(
    x: AV[torch.Tensor], eps1: AV[torch.Tensor], x_m: AV[torch.Tensor], x0: AV[torch.Tensor], k: float
) -> tuple[AV[torch.Tensor], AV[torch.Tensor]]:
    """(x, eps1) with the anchor moved to where the noisy midpoint `x_m` would have come from. `k` is h * a21."""

    def refined(t: torch.Tensor, e: torch.Tensor, m: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, ...]:
        d = d.double()
        for _ in range(_REFINE_ITERATIONS):
            t = m - k * e
            e = d - t
        return t, e

    video, audio = x.map(refined, eps1, x_m, x0)
    return AV(video[0], audio[0]), AV(video[1], audio[1])
