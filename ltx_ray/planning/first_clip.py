"""The first clip that a run renders, whose size decoders warm up for before it reaches them."""

from __future__ import annotations

from collections.abc import Iterator

from ltx_ray.planning.plan import PlanEntry, PlannedRow, item_to_render
from ltx_ray.shapes import ClipShape


class FirstClip:
    """`shape` is that of the first row to render; None until one has passed."""

    shape: ClipShape | None = None

    def watch(self, rows: Iterator[PlanEntry]) -> Iterator[PlanEntry]:
        """The same rows. Those after the first one to render pass without a look."""
        for row in rows:
            if isinstance(row, PlannedRow) and item_to_render(row) is not None:
                self.shape = row.request.shape
                yield row
                break
            yield row
        yield from rows
