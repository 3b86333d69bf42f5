"""Noise schedules. Source: `schedulers.py` of the reference v1.2.0."""

from __future__ import annotations

import math

import torch

_TOKENS_LOW, _TOKENS_HIGH = 1024, 4096
_SHIFT_LOW, _SHIFT_HIGH = 0.95, 2.05
_LAST_SIGMA = 0.1


def shifted_sigmas(steps: int, tokens: int) -> torch.Tensor:
    """`steps + 1` noise levels from 1 to 0 (float32), shifted by the number of video tokens.

    More tokens keep the schedule longer at high noise. The shift is linear in `tokens` and not
    clamped; then the levels are stretched so that the last one above 0 is 0.1. `steps` >= 2.
    """
    assert steps >= 2
    slope = (_SHIFT_HIGH - _SHIFT_LOW) / (_TOKENS_HIGH - _TOKENS_LOW)
    shift = math.exp(tokens * slope + (_SHIFT_LOW - slope * _TOKENS_LOW))
    even = torch.linspace(1.0, 0.0, steps + 1)
    sigmas = torch.where(even != 0, shift / (shift + (1 / even - 1)), 0)
    above = sigmas != 0
    rest = 1.0 - sigmas[above]
    sigmas[above] = 1.0 - rest / (rest[-1] / (1.0 - _LAST_SIGMA))
    return sigmas.to(torch.float32)
