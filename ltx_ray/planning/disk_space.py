"""Whether an output on a local disk has room for the clips of a plan. It is said before a GPU is used."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path

from ltx_ray.manifest.rules import LegalRow, judge
from ltx_ray.planning.estimate import PlannedWork, Stored, estimate_clip, size_text
from ltx_ray.planning.plan import Plan
from ltx_ray.storage.store import Store

#: Rows whose sizes stand for those of a manifest, and the most that are counted where a manifest does not say how many
#: it has.
_SAMPLE, _MOST_COUNTED = 200, 20_000


def space_warning(store: Store, needed: float) -> str | None:
    """What a user should know when an output on this machine's disks needs more bytes than are free."""
    if not store.is_local:
        return None
    place = Path(store.root)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed <= free:
        return None
    return (
        f"{store.name}: about {size_text(needed)} are needed there and {size_text(free)} are free; a run ends when the "
        f"disk is full"
    )


def expected_shortage(store: Store, plan: Plan, stored: Stored) -> str | None:
    """`space_warning` for a plan whose rows were not read yet, by the sizes of the first ones.

    Rows that are in the dataset have their place.
    """
    if not store.is_local or plan.selection.ids is not None:
        return None
    raws = plan.selected_raws(plan.read(extra=False))
    transformer, work, clips = plan.builder.checkpoint.transformer, PlannedWork(), 0
    sample = list(islice(raws, _SAMPLE))
    for raw in sample:
        if isinstance(row := judge(raw, plan.rules), LegalRow):
            clips += 1
            work.add(estimate_clip(transformer, row.request))
    if not clips:
        return None
    rows = plan.expected_rows
    if rows is None:
        rows = (len(sample) + sum(1 for _ in islice(raws, _MOST_COUNTED))) * plan.samples
    left = max(rows - plan.existing.row_count, 0)
    return space_warning(store, stored.nbytes(clips, work.total) / clips * left)
