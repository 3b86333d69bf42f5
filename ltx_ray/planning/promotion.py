"""Previews that are promoted to finished clips."""

from __future__ import annotations

from collections.abc import Iterator

from ltx_ray.dataset.existing import ExistingRows
from ltx_ray.manifest.rules import RowProblem
from ltx_ray.planning.plan import TODO, PlanEntry, PlannedRow


def promoted(rows: Iterator[PlanEntry], items: frozenset[str], existing: ExistingRows) -> Iterator[PlanEntry]:
    """Those of `rows`, of the table of previews, that are to render `items` (by item_id).

    A row is illegal when it is now another item than its preview, or when its stage-1 latents are missing.
    """
    for row in rows:
        if not isinstance(row, PlannedRow) or row.status != TODO:
            yield row
        elif row.item_id not in items and existing.has_preview(row.item_id, row.key):
            continue  # An older preview of the same id.
        elif row.item_id in items and existing.has_latents(row.item_id):
            yield row
        else:
            legal = (
                "the model, LoRAs, --dtype, --precision and --noise-device that its preview was made with "
                "(or it has no latents)"
            )
            yield row.refused(RowProblem("preview", row.id, legal))
