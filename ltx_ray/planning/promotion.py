"""Previews that are promoted to finished clips."""

from __future__ import annotations

from collections.abc import Iterator

from ltx_ray.manifest.rules import RowProblem
from ltx_ray.planning.plan import TODO, Plan, PlanEntry, PlannedRow


def promoted(rows: Iterator[PlanEntry], plan: Plan) -> Iterator[PlanEntry]:
    """`rows` of a plan that promotes previews, of which some are refused.

    A row is illegal when it is now another item than its preview, or when its stage-1 latents are missing.
    """
    items, refused = plan.promote or frozenset(), set[bytes]()
    for row in rows:
        if not isinstance(row, PlannedRow) or row.status != TODO:
            yield row
            continue
        if row.item_id in items and plan.existing.has_latents(row.item_id):
            yield row
            continue
        if row.item_id_bytes not in refused:  # Rows of one item are counted once.
            refused.add(row.item_id_bytes)
            plan.refused_work.add(row.estimate(plan.builder.checkpoint.transformer))
        legal = (
            "the model, LoRAs, --dtype, --precision and --noise-device that its preview was made with "
            "(or it has no latents)"
        )
        yield row.refused(RowProblem("preview", row.id, legal))
