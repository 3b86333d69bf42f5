"""A manifest of which too many rows are illegal is refused before a GPU is used: it is the wrong one, or badly made."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

from ltx_ray.manifest.reasons import Reasons
from ltx_ray.manifest.rules import IllegalRow, judge
from ltx_ray.planning.plan import Plan
from ltx_ray.planning.templates import TemplateCache
from ltx_ray.records import RenderRequest
from ltx_ray.storage.locations import recorded

#: Rows that are looked at, the fewest that say something of a manifest, and the part of them that may be illegal.
_ROWS, _FEWEST, _PART = 100_000, 1_000, 0.2


def _no_item(request: RenderRequest) -> Any:
    """In the place of a work item, which is of no use here. Making one would read files."""
    return SimpleNamespace(request=request)


def check_legality(plan: Plan) -> None:
    """Judge the first rows of a plan without reading their images. Raises ValueError when too many are illegal."""
    if plan.expected_rows is not None and plan.expected_rows < _FEWEST:
        return
    templates, reasons = TemplateCache(plan.rules, _no_item), Reasons()
    judged = illegal = 0
    for raw in itertools.islice(plan.selected_raws(plan.read(extra=False)), _ROWS):
        judged += 1
        if templates.match(raw) is None and isinstance(row := judge(raw, plan.rules), IllegalRow):
            illegal += 1
            reasons.take(row)
    if judged >= _FEWEST and illegal > _PART * judged:
        raise ValueError(
            f"{recorded(plan.manifest)}: {illegal:,} of the first {judged:,} rows are illegal: {reasons.commonest()}; "
            f"legal: at most {_PART:.0%} illegal rows, or --allow-illegal"
        )
