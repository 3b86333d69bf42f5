"""Which model passes guidance needs. No torch, so that the plan can count them.

Source: `guiders.py` and `denoisers.py` of the reference v1.2.0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from ltx_ray.records import Guidance

#: Names of the passes, in the order in which the reference makes them.
PASSES = ("cond", "uncond", "perturbed", "isolated")


def wants_uncond(g: Guidance) -> bool:
    return not math.isclose(g.cfg_scale, 1.0)


def wants_perturbed(g: Guidance) -> bool:
    # without blocks the pass would repeat the first one, and its difference be zero
    return not math.isclose(g.stg_scale, 0.0) and bool(g.stg_blocks)


def wants_isolated(g: Guidance) -> bool:
    return not math.isclose(g.modality_scale, 1.0)


def passes_for(guidance: Iterable[Guidance]) -> tuple[str, ...]:
    """The passes of a call for the streams that take part in it; one serves both whenever either wants it."""
    streams = tuple(guidance)
    wanted = {
        "cond": True,
        "uncond": any(wants_uncond(g) for g in streams),
        "perturbed": any(wants_perturbed(g) for g in streams),
        "isolated": any(wants_isolated(g) for g in streams),
    }
    return tuple(name for name in PASSES if wanted[name])
