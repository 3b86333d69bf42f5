"""Which model passes guidance needs. No torch, so that the plan can count them.

Source: `guiders.py` and `denoisers.py` of the reference v1.2.0.
"""

from __future__ import annotations

import math

from ltx_ray.records import AV, Guidance

#: Names of the passes, in the order in which the reference makes them.
PASSES = ("cond", "uncond", "perturbed", "isolated")


def wants_uncond(g: Guidance) -> bool:
    return not math.isclose(g.cfg_scale, 1.0)


def wants_perturbed(g: Guidance) -> bool:
    # without blocks the pass would repeat the first one, and its difference be zero
    return not math.isclose(g.stg_scale, 0.0) and bool(g.stg_blocks)


def wants_isolated(g: Guidance) -> bool:
    return not math.isclose(g.modality_scale, 1.0)


def passes_for(guidance: AV[Guidance]) -> tuple[str, ...]:
    """The passes that a call makes; one serves both streams whenever either wants it."""
    wanted = {
        "cond": True,
        "uncond": any(wants_uncond(g) for g in guidance),
        "perturbed": any(wants_perturbed(g) for g in guidance),
        "isolated": any(wants_isolated(g) for g in guidance),
    }
    return tuple(name for name in PASSES if wanted[name])
