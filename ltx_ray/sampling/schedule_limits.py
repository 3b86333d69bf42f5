"""Which computed schedules can be sampled. Without torch, because it is asked while rows are planned."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np

from ltx_ray.shapes import TIME_FACTOR, ClipShape

_TOKENS_LOW, _TOKENS_HIGH = 1024, 4096
_SHIFT_LOW, _SHIFT_HIGH = 0.95, 2.05
#: No schedule of more tokens can be sampled, not even one of two steps.
_MOST_TOKENS = 60_000
#: Above the first number of tokens that cannot be sampled, luck of rounding makes some legal, never this far apart.
_LUCKY_TOKENS = 2048
#: The last sigma above 0.
LAST_SIGMA = 0.1


def schedule_shift(tokens: int) -> float:
    """The shift of a schedule for this many video tokens."""
    slope = (_SHIFT_HIGH - _SHIFT_LOW) / (_TOKENS_HIGH - _TOKENS_LOW)
    return math.exp(tokens * slope + (_SHIFT_LOW - slope * _TOKENS_LOW))


@lru_cache(maxsize=4096)
def is_sampled(steps: int, tokens: int) -> bool:
    """Whether the sigmas of `shifted_sigmas(steps, tokens)` are finite and fall with every step.

    The shift grows exponentially with the tokens. From some number on, the first sigmas round to the same float32, and
    a sampler divides by their difference, which is 0; from a larger one on, all are NaN.
    """
    if tokens > _MOST_TOKENS:
        return False
    with np.errstate(all="ignore"):
        sigmas = host_sigmas(steps, tokens)
    return bool(np.isfinite(sigmas).all() and (np.diff(sigmas) < 0).all())


def most_frames(steps: int, shape: ClipShape) -> int | None:
    """The number of frames, below those of `shape`, up to which every schedule of stage 1 can be sampled.

    None when a single frame has too many tokens.
    """
    frame_tokens = replace(shape, num_frames=1).half().video_tokens
    highest = _MOST_TOKENS // frame_tokens * TIME_FACTOR + 1
    most, most_tokens = None, 0
    for frames in range(min(shape.num_frames - TIME_FACTOR, highest), 0, -TIME_FACTOR):
        tokens = replace(shape, num_frames=frames).half().video_tokens
        if not is_sampled(steps, tokens):
            most = None
        elif most is None:
            most, most_tokens = frames, tokens
        elif most_tokens - tokens > _LUCKY_TOKENS:
            break
    return most


def host_sigmas(steps: int, tokens: int) -> np.ndarray:
    """`shifted_sigmas` in numpy: the same float32 numbers, in the order of operations of torch's kernels."""
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
