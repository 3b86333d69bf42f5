"""Noise schedules that are computed, and which of them can be sampled. No torch, because planning asks.

Formulas: docs/ltx-2.3.md#schedules. Source: `LTX2Scheduler` in `ltx_core/components/schedulers.py` of the reference
v1.2.0.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np

from ltx_ray.shapes import TIME_FACTOR, ClipShape

_TOKENS_LOW, _TOKENS_HIGH = 1024, 4096
_SHIFT_LOW, _SHIFT_HIGH = 0.95, 2.05
_SLOPE = (_SHIFT_HIGH - _SHIFT_LOW) / (_TOKENS_HIGH - _TOKENS_LOW)
#: Above the first number of tokens that cannot be sampled, luck of rounding makes some legal, never this far apart.
_LUCKY_TOKENS = 2048
#: The last sigma above 0.
LAST_SIGMA = 0.1


def schedule_shift(tokens: int) -> float:
    """The shift of a schedule for this many video tokens."""
    return math.exp(tokens * _SLOPE + (_SHIFT_LOW - _SLOPE * _TOKENS_LOW))


@lru_cache(maxsize=4096)
def is_sampled(steps: int, tokens: int) -> bool:
    """Whether the sigmas of `host_sigmas(steps, tokens)` are finite and fall with every step.

    The shift grows exponentially with the tokens. From some number on, the first sigmas round to the same float32, and
    a sampler divides by their difference, which is 0; from a larger one on, all are NaN.
    """
    return _falls(steps, tokens)


def most_frames(steps: int, shape: ClipShape) -> int | None:
    """The number of frames, below those of `shape`, up to which every schedule of stage 1 can be sampled.

    None when a single frame has too many tokens.
    """
    frame_tokens = replace(shape, num_frames=1).half().video_tokens
    found = min(_most_latent_frames(steps, frame_tokens), shape.latent_frames - 1)
    return TIME_FACTOR * (found - 1) + 1 if found else None


@lru_cache(maxsize=4096)
def _most_latent_frames(steps: int, frame_tokens: int) -> int:
    """The number of latent frames up to which every schedule can be sampled; 0 for none."""
    # A number that can be sampled and whose successor cannot. The first that cannot is at most that successor.
    low, high = 0, _most_tokens(steps) // frame_tokens + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _falls(steps, middle * frame_tokens) else (low, middle)
    most = 0
    for n in range(low, 0, -1):
        if not _falls(steps, n * frame_tokens):
            most = 0
        elif not most:
            most = n
        elif (most - n) * frame_tokens > _LUCKY_TOKENS:
            break
    return most


def _most_tokens(steps: int) -> int:
    """A number of tokens above which no schedule can be sampled. The limit itself is up to an eighth lower.

    The first two sigmas are shift / (shift + 0) and shift / (shift + x), where x is 1 / (steps - 1). In float32 they
    are equal where x is less than 2^-25 of the shift, which is at most half of its last place.
    """
    most_shift = 1.01 * 2**25 / (steps - 1)  # x itself is rounded.
    return int((math.log(most_shift) - _SHIFT_LOW) / _SLOPE) + _TOKENS_LOW


def _falls(steps: int, tokens: int) -> bool:
    if tokens > _most_tokens(steps):
        return False
    sigmas = host_sigmas(steps, tokens)
    return bool(np.isfinite(sigmas).all() and (np.diff(sigmas) < 0).all())


def host_sigmas(steps: int, tokens: int) -> np.ndarray:
    """`steps` + 1 sigmas from 1 to 0 (float32), shifted by the number of video tokens. `steps` >= 2.

    More tokens keep the schedule at high noise for longer. The shift is linear in `tokens` and not clamped. Sigmas are
    then stretched so that the last one above 0 is 0.1. They are the reference's numbers on a CPU with AVX2, in the
    order of operations of torch's kernels. On other CPUs torch.linspace rounds otherwise, and a row that can be sampled
    on one machine might not be on the next.
    """
    assert steps >= 2
    with np.errstate(all="ignore"):
        shift = np.float32(schedule_shift(tokens))
        # torch.linspace fills each half from its own end, and rounds a product and its sum once.
        at = np.arange(steps + 1)
        step = np.float64(np.float32(-1.0) / np.float32(steps))
        even = np.where(at < (steps + 1) // 2, 1.0 + step * at, -step * (steps - at)).astype(np.float32)
        one = np.float32(1)
        # A number divided by a tensor is its reciprocal times the number.
        sigmas = np.where(even != 0, one / (shift + (one / even - one)) * shift, np.float32(0))
        positive = sigmas != 0
        complement = one - sigmas[positive]
        sigmas[positive] = one - complement / (complement[-1] / np.float32(1.0 - LAST_SIGMA))
    return sigmas
