"""Noise schedules.

Formulas: docs/ltx-2.3.md#schedules. Source: `LTX2Scheduler` in `ltx_core/components/schedulers.py` of the reference
v1.2.0.
"""

from __future__ import annotations

import math

import torch

_TOKENS_LOW, _TOKENS_HIGH = 1024, 4096
_SHIFT_LOW, _SHIFT_HIGH = 0.95, 2.05
_LAST_SIGMA = 0.1


def shifted_sigmas(steps: int, tokens: int) -> torch.Tensor:
    """`steps + 1` sigmas from 1 to 0 (float32, on the host), shifted by the number of video tokens. `steps` >= 2.

    More tokens keep the schedule at high noise for longer. The shift is linear in `tokens` and not clamped. Sigmas are
    then stretched so that the last one above 0 is 0.1.
    """
    assert steps >= 2
    slope = (_SHIFT_HIGH - _SHIFT_LOW) / (_TOKENS_HIGH - _TOKENS_LOW)
    shift = math.exp(tokens * slope + (_SHIFT_LOW - slope * _TOKENS_LOW))
    even = torch.linspace(1.0, 0.0, steps + 1)
    sigmas = torch.where(even != 0, shift / (shift + (1 / even - 1)), 0)
    positive = sigmas != 0
    complement = 1.0 - sigmas[positive]
    sigmas[positive] = 1.0 - complement / (complement[-1] / (1.0 - _LAST_SIGMA))
    return sigmas.to(torch.float32)
