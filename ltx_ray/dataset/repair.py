"""Takes what is bad out of a dataset, for `verify --repair`, which holds the lease.

Nothing is deleted: what is taken out lies below state/aside/. A start of a run repairs nothing that is folded.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Collection

from ltx_ray.dataset import layout
from ltx_ray.dataset.description import describe_dataset
from ltx_ray.dataset.existing import ExistingRows, list_existing
from ltx_ray.dataset.fold import fold_dataset, set_aside
from ltx_ray.dataset.identity import dataset_id
from ltx_ray.dataset.parts import encode_part, encode_segment, keys_of, read_part, take
from ltx_ray.storage.parquet import read_parquet
from ltx_ray.storage.store import Store


class Repair:
    """One repair. `say` takes lines for the user."""

    def __init__(self, store: Store, say: Callable[[str], None]):
        self._store, self._say = store, say
        self._run_id = f"repair-{secrets.token_hex(4)}"
        self._segments = 0
        self._existing: ExistingRows | None = None
        self._gone: set[str] = set()

    def take_out_rows(self, path: str, numbers: Collection[int], clips: Collection[str]) -> str:
        """Take rows out of a part, which keeps its name; returns where they are now.

        `clips`: those that are not their rows' any more. They go first: a worker that finds one would take it.
        """
        store, folder = self._store, path.partition("/")[0]
        for clip in sorted(clips):
            if store.exists(clip):
                set_aside(store, clip)
        while True:
            data, version = store.read_versioned(path)
            table = read_parquet(data)
            left = [number for number in range(len(table)) if number not in numbers]
            name = f"{os.path.basename(path).removesuffix('.parquet')}-rows-{secrets.token_hex(4)}.parquet"
            moved_to = f"{layout.ASIDE}/{folder}/{name}"
            store.create(moved_to, encode_part(take(table, sorted(numbers)), folder, self._run_id))
            if not left:
                store.delete(path)
                return moved_to
            if store.update(path, encode_part(take(table, left), folder, self._run_id), version):
                return moved_to
            store.delete(moved_to)

    def take_out_part(self, path: str) -> str:
        """Take a whole part out; returns where it is now."""
        self._gone.add(path)
        return set_aside(self._store, path)

    def adopt(self, path: str) -> tuple[str, int]:
        """Take a part out that is none of the dataset's own, such as a copy. Rows that no other part has stay.

        Returns where it is now, and the number of rows that stay. Raises UnreadablePart, and ValueError for rows
        without an item_id.
        """
        table = read_part(self._store, path)
        if self._existing is None:
            self._existing = list_existing(self._store)
        mine = []
        for number, key in enumerate(keys_of(table)):
            holders = set(self._existing.index.paths_of(key)) - self._gone - {path}
            if not holders:
                mine.append(number)
        if mine:
            # First into a segment: from now on they are finished whatever happens to the part.
            data = encode_segment(take(table, mine), layout.INDEX)
            assert self._store.create(layout.segment_path(self._run_id, self._segments, layout.INDEX), data)
            self._segments += 1
        return self.take_out_part(path), len(mine)

    def finish(self) -> None:
        """Fold what was adopted, and what runs have left."""
        existing = list_existing(self._store, self._say)
        fold_dataset(self._store, existing, dataset_id(self._store), self._run_id, self._say)
        describe_dataset(self._store, existing, anew=True)
