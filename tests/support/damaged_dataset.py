"""A small dataset without a run, for tests that damage it."""

from __future__ import annotations

import hashlib
import io

import pyarrow.parquet as pq

from ltx_ray.dataset.layout import part_name, row_key
from ltx_ray.dataset.writer import DatasetWriter, Rendered
from ltx_ray.engine.fake import mp4_boxes
from ltx_ray.records import Clip, canonical_json
from ltx_ray.storage.store import Store
from tests.support.samples import recipe, request

ITEMS = ("0a" + "1" * 30, "0a" + "2" * 30, "fe" + "3" * 30)
ROWS = ((0, "a"), (0, "b"), (1, "c"), (2, "d"))


def boxes(item_id: str) -> bytes:
    return mp4_boxes(item_id, hashlib.sha256(item_id.encode()).hexdigest())


def clip_of(n: int) -> str:
    return f"clips/{ITEMS[n][:2]}/{ITEMS[n]}.mp4"


def part_of(n: int, row_id: str) -> str:
    return f"index/{part_name(ITEMS[n], row_key(row_id))}"


def build(store: Store, rows: tuple[tuple[int, str], ...] = ROWS, clip: bool = True) -> Store:
    """Index rows (item number, id) and their clips."""
    writer = DatasetWriter(store)
    for n, row_id in rows:
        content = boxes(ITEMS[n])
        place = (clip_of(n), hashlib.sha256(content).hexdigest()) if clip else (None, None)
        if clip:
            store.write_bytes(clip_of(n), content)
        rendered = Rendered(
            clip=Clip(*place, "d" * 64, (), "stage_1"), attempts=1, recipe=canonical_json(recipe()),
            recipe_digest="e" * 16, numerics="{}", noise_ledger="{}", versions="{}", device="cpu", seconds={},
        )  # fmt: skip
        writer.write_index(ITEMS[n], request(id=row_id, note=row_id), rendered)
    return store


def rows_of(store: Store) -> list[tuple[str, str]]:
    """(item_id, id) of what a plain reader of `index/` sees."""
    names = [name for name in store.list_names("index") if not name.startswith(("_", "."))]
    tables = (pq.read_table(io.BytesIO(store.read_bytes(f"index/{name}")), columns=["item_id", "id"]) for name in names)
    return [(row["item_id"], row["id"]) for table in tables for row in table.to_pylist()]
