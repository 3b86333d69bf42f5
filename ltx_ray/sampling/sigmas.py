"""Noise schedules.

Formulas: docs/ltx-2.3.md#schedules. Source: `LTX2Scheduler` in `ltx_core/components/schedulers.py` of the reference
v1.2.0.
"""

from __future__ import annotations

import torch

from ltx_ray.sampling.schedule_limits import LAST_SIGMA, schedule_shift


def shifted_sigmas(steps: int, tokens: int) -> torch.Tensor:
    """`steps + 1` sigmas from 1 to 0 (float32, on the host), shifted by the number of video tokens. `steps` >= 2.

    More tokens keep the schedule at high noise for longer. The shift is linear in `tokens` and not clamped. Sigmas are
    then stretched so that the last one above 0 is 0.1.
    """
    assert steps >= 2
    shift = schedule_shift(tokens)
    even = torch.linspace(1.0, 0.0, steps + 1)
    sigmas = torch.where(even != 0, shift / (shift + (1 / even - 1)), 0)
    positive = sigmas != 0
    complement = 1.0 - sigmas[positive]
    sigmas[positive] = 1.0 - complement / (complement[-1] / (1.0 - LAST_SIGMA))
    return sigmas.to(torch.float32)
