"""res_2s: a second-order exponential sampler with noise injected at the midpoint and at each step.

Source: `res2s_audio_video_denoising_loop`, `Res2sDiffusionStep` and `res2s.py` of the reference
v1.2.0, in the mode the pipelines run it. State between model calls is float64; the model sees `dtype`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ltx_ray.records import AV
from ltx_ray.sampling.noise import NoiseSource

#: (latents, sigma 0-d, step index) -> x0; float32 sigmas at steps, float64 at midpoints.
Denoise = Callable[[AV[torch.Tensor], torch.Tensor, int], AV[torch.Tensor]]
#: Puts the clean latent back where the mask says so.
Blend = Callable[[AV[torch.Tensor]], AV[torch.Tensor]]

_FLOOR_SIGMA = 0.0011
_ETA = 0.5
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
    """Denoise packed `latents` (1, T, C) along `sigmas` (n + 1 float32 levels on the host).

    A last level of 0 is reached through 0.0011: n full steps of two calls each, then one more call.
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
        eps = x0.map(lambda d, t: d.double() - t, x)
        middle_sigma = torch.sqrt(sigma * sigma_next)

        middle = x.map(lambda t, e, k=h * a21: t + k * e, eps)
        middle = blend(_inject(x, middle, noise.substep(latents), sigma, middle_sigma))
        if h < _REFINE_BELOW_H and sigma > _REFINE_ABOVE_SIGMA:
            x, eps = _refine(x, eps, middle, x0, h * a21)

        x0_middle = blend(denoise(middle.map(lambda t: t.to(dtype)), middle_sigma, 0))
        eps_middle = x0_middle.map(lambda d, t: d.double() - t, x)
        following = AV(*(t + h * (b1 * e1 + b2 * e2) for t, e1, e2 in zip(x, eps, eps_middle, strict=True)))
        following = blend(_inject(x, following, noise.step(latents), sigmas[index], sigmas[index + 1]))
        latents = following.map(lambda t: t.to(dtype))
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
    """(e^z - sum of its first `order` Taylor terms) / z^order."""
    if abs(z) < 1e-10:
        return 1.0 / math.factorial(order)
    head = sum(z**k / math.factorial(k) for k in range(order))
    return (math.exp(z) - head) / z**order


def _inject(
    start: AV[torch.Tensor],
    end: AV[torch.Tensor],
    noise: AV[torch.Tensor],
    sigma: torch.Tensor,
    sigma_next: torch.Tensor,
) -> AV[torch.Tensor]:
    """Trade part of the step from `start` to `end` for fresh noise, keeping the noise level.

    The coefficients are computed in the sigmas' own dtype (float32 at steps, float64 at midpoints).
    """
    up = torch.minimum(sigma_next * _ETA, sigma_next * 0.9999)
    residual = (sigma_next**2 - up**2).clamp(min=0) ** 0.5
    ratio = (1 - sigma_next) + residual
    down = residual / ratio
    distance, sigma_v, ratio_v, down_v, up_v = (v.item() for v in (sigma - sigma_next, sigma, ratio, down, up))

    def one(x: torch.Tensor, x_next: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        eps = (x - x_next) / distance
        return ratio_v * ((x - sigma_v * eps) + down_v * eps) + up_v * n

    return start.map(one, end, noise)


def _refine(
    x: AV[torch.Tensor], eps: AV[torch.Tensor], middle: AV[torch.Tensor], x0: AV[torch.Tensor], k: float
) -> tuple[AV[torch.Tensor], AV[torch.Tensor]]:
    """Move the anchor to where the noisy midpoint would have come from: a fixed number of iterations."""

    def one(t: torch.Tensor, e: torch.Tensor, m: torch.Tensor, d: torch.Tensor) -> AV[torch.Tensor]:
        d = d.double()
        for _ in range(_REFINE_ITERATIONS):
            t = m - k * e
            e = d - t
        return AV(t, e)

    video, audio = x.map(one, eps, middle, x0)
    return AV(video.video, audio.video), AV(video.audio, audio.audio)
