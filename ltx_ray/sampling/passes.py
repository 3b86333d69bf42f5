"""Which model passes guidance takes. No torch, because planning counts them.

Source: docs/ltx-2.3.md#guidance; `ltx_core/components/guiders.py` and `ltx_pipelines/utils/denoisers.py` of the
reference v1.2.0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum

from ltx_ray.records import Guidance, RenderRequest


class Pass(StrEnum):
    """A model pass by what it takes away, in the order in which the reference makes them."""

    COND = "cond"
    UNCOND = "uncond"
    PERTURBED = "perturbed"
    ISOLATED = "isolated"


def needs_uncond(g: Guidance) -> bool:
    """Whether a stream needs the pass on the negative prompt (CFG, arXiv:2207.12598)."""
    return _guides(g.cfg_scale)


def needs_negative(request: RenderRequest) -> bool:
    """Whether a request's negative prompt is used. It is asked for every row, so no `Guidance` is made for it."""
    return _guides(request.video_cfg_scale) or _guides(request.audio_cfg_scale)


def _guides(cfg_scale: float) -> bool:
    return not math.isclose(cfg_scale, 1.0)


def needs_perturbed(g: Guidance) -> bool:
    """Whether a stream needs the pass without self-attention in its `stg_blocks` (STG, arXiv:2411.18664)."""
    # Without blocks the pass would repeat the first one, and their difference would be zero.
    return not math.isclose(g.stg_scale, 0.0) and bool(g.stg_blocks)


def needs_isolated(g: Guidance) -> bool:
    """Whether a stream needs the pass without attention between the streams (LTX-2, arXiv:2601.03233)."""
    return not math.isclose(g.modality_scale, 1.0)


def divide_passes(names: tuple[Pass, ...], ranks: int) -> list[tuple[Pass, ...]]:
    """The passes of a call for each of `ranks`, so that the rank with the most work has as little as it can.

    The perturbed pass goes to the rank of the conditional one, whose first blocks it takes over.
    """
    together = tuple(name for name in names if name in (Pass.COND, Pass.PERTURBED))
    parts: list[tuple[Pass, ...]] = [together] if ranks < len(names) else [(name,) for name in together]
    divided: list[tuple[Pass, ...]] = [()] * ranks
    for part in (*parts, *((name,) for name in names if name not in together)):
        fewest = min(range(ranks), key=lambda rank: len(divided[rank]))
        divided[fewest] += part
    return divided


def passes_for(guidance: Iterable[Guidance]) -> tuple[Pass, ...]:
    """The passes of a call, given the guidance of each stream that takes part.

    A pass is made for both streams when either needs it.
    """
    streams = tuple(guidance)
    needed = {
        Pass.COND: True,
        Pass.UNCOND: any(needs_uncond(g) for g in streams),
        Pass.PERTURBED: any(needs_perturbed(g) for g in streams),
        Pass.ISOLATED: any(needs_isolated(g) for g in streams),
    }
    return tuple(name for name in Pass if needed[name])
