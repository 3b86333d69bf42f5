"""The tiny clip that goes through every pool before a run grows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ltx_ray.manifest.raw import RawRow
from ltx_ray.manifest.rules import IllegalRow, judge
from ltx_ray.planning.plan import Plan
from ltx_ray.records import WorkItem


def preflight_item(plan: Plan, distilled: bool) -> WorkItem | None:
    """The smallest clip, with the run's defaults otherwise; None when the defaults make it illegal.

    `distilled`: the checkpoint is the distilled one, whose number of steps is fixed.
    """
    values: dict[str, Any] = {"prompt": "preflight", "height": 64, "width": 64, "num_frames": 9}
    if not distilled:
        values["num_inference_steps"] = 2
    row = judge(RawRow("preflight", 1, values), plan.rules)
    if isinstance(row, IllegalRow):
        return None
    return replace(plan.builder.item(row.request), preflight=True)
