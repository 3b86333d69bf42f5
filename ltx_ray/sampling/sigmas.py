"""Noise schedules, as the samplers take them.

Formulas: docs/ltx-2.3.md#schedules. schedule_limits.py computes them without torch.
"""

from __future__ import annotations

import torch

from ltx_ray.sampling.schedule_limits import host_sigmas


def shifted_sigmas(steps: int, tokens: int) -> torch.Tensor:
    """`host_sigmas` as a tensor on the host: (steps + 1,) float32."""
    return torch.from_numpy(host_sigmas(steps, tokens))
