"""Whether a run may write into its output."""

from __future__ import annotations

import math
import os

from ltx_ray.config import Selection
from ltx_ray.dataset import layout
from ltx_ray.storage.locations import is_in_job_copy, parent, resolve, split_options
from ltx_ray.storage.store import Store


def check_place(output: str) -> None:
    """Refuse a place that Ray deletes. Manifests and images may be there."""
    if is_in_job_copy(output):
        name = os.path.basename(output)
        raise ValueError(
            f"--output: {output}, is in the copy that Ray makes of a job's working directory, and is lost with it; "
            f"legal: a place outside of it, such as {os.path.join(os.path.expanduser('~'), name)}, s3:// or gs://"
        )


def check_creation(store: Store, single_writer: bool) -> None:
    """Refuse a store that does not refuse to create a file twice, unless nobody else writes into the output."""
    if not (single_writer or store.refuses_second_create()):
        raise ValueError(
            f"--output: {store.name}, whose store creates a file although there is one, so that two runs could write a "
            f"row twice; legal: a store with conditional writes, or --single-writer if no other run writes there"
        )


def wait_seconds(wait: float | None, selection: Selection = Selection()) -> float:  # noqa: B008 (frozen)
    """Seconds to wait for another run to leave the output: `wait`, or as long as it takes where that is None.

    Shards are meant to run side by side, which one output does not allow. So without `wait` they do not wait at all.
    """
    if wait is not None:
        return wait
    return math.inf if selection.shard is None else 0.0


def is_within(manifest: str, output: str) -> bool:
    """Whether a manifest is in the output: one of its tables."""
    inner, outer = (split_options(resolve(location))[0] for location in (manifest, output))
    return inner.startswith(f"{outer.rstrip('/')}/")


def is_own_table(manifest: str, output: str | None) -> bool:
    """Whether a manifest is failed/ or previews/ of the output, or a part of these; without an output, of any dataset.

    Rows there keep the place of the manifest that they were in first, from which paths of their images count. A run
    believes that of its own output alone: another dataset could name any folder as the place of its rows.
    """
    table = resolve(manifest)
    if layout.is_part(os.path.basename(split_options(table)[0])):
        table = parent(table)
    if os.path.basename(split_options(table)[0]) not in (layout.FAILED, layout.PREVIEWS):
        return False
    if output is None:
        return any(map(Store(parent(table)).exists, (layout.DATASET, layout.RUN_RECORD)))
    return split_options(resolve(output))[0] == split_options(parent(table))[0]
