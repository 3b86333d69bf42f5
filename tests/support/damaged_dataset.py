"""A small dataset made without a run, for tests that damage it."""

from __future__ import annotations

import hashlib
import io

import pyarrow as pa
import pyarrow.parquet as pq

from ltx_ray.dataset.layout import INDEX, INDEX_SCHEMA, one_row_part, row_key
from ltx_ray.dataset.parts import encode_part
from ltx_ray.dataset.writer import Rendered
from ltx_ray.engine.fake import mp4_boxes
from ltx_ray.records import Clip, canonical_json
from ltx_ray.storage.store import Store
from tests.support.datasets import dataset_writer, finish
from tests.support.samples import recipe, request

#: item_ids; the first two share a folder of clips.
ITEMS = ("0a" + "1" * 30, "0a" + "2" * 30, "fe" + "3" * 30)
#: (number of the item, id) of each row.
ROWS = ((0, "a"), (0, "b"), (1, "c"), (2, "d"))


def boxes(item_id: str) -> bytes:
    """The clip that the fake engine makes of an item."""
    return mp4_boxes(item_id, hashlib.sha256(item_id.encode()).hexdigest())


def clip_of(n: int) -> str:
    return f"clips/{ITEMS[n][:2]}/{ITEMS[n]}.mp4"


def part_of(n: int, row_id: str) -> str:
    """The part of a row, as earlier versions named it."""
    return f"index/{one_row_part(ITEMS[n], row_key(row_id))}"


def build(store: Store, rows: tuple[tuple[int, str], ...] = ROWS, clip: bool = True) -> Store:
    """Write an index row for each (number of the item, id) and, with `clip`, the item's clip."""
    writer = dataset_writer(store)
    for n, row_id in rows:
        content = boxes(ITEMS[n])
        path_and_digest = (clip_of(n), hashlib.sha256(content).hexdigest()) if clip else (None, None)
        if clip:
            store.write_bytes(clip_of(n), content)
        rendered = Rendered(
            clip=Clip(*path_and_digest, "d" * 64, (), "stage_1"), attempts=1, recipe=canonical_json(recipe()),
            recipe_digest="e" * 16, numerics="{}", noise_ledger="{}", versions="{}", device="cpu", seconds={},
        )  # fmt: skip
        writer.write_index(ITEMS[n], request(id=row_id, note=row_id), rendered)
    finish(writer)
    return store


def as_one_row_parts(store: Store, folder: str = INDEX) -> Store:
    """Give each row of the index a part of its own, as earlier versions did."""
    for name in store.list_names(folder):
        table = pq.read_table(io.BytesIO(store.read_bytes(f"{folder}/{name}")))
        store.delete(f"{folder}/{name}")
        for at in range(len(table)):
            row = table.slice(at, 1)
            own = one_row_part(row["item_id"][0].as_py(), row_key(row["id"][0].as_py()))
            store.write_bytes(f"{folder}/{own}", encode_part(row, folder))
    return store


def one_row(row: dict, schema: pa.Schema = INDEX_SCHEMA) -> bytes:
    """A Parquet file of one row. Columns that the row lacks are null."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in schema.names}], schema=schema), buffer)
    return buffer.getvalue()


def rows_of(store: Store) -> list[tuple[str, str]]:
    """(item_id, id) of the rows that a plain reader of `index/` sees."""
    names = [name for name in store.list_names("index") if not name.startswith(("_", "."))]
    tables = (pq.read_table(io.BytesIO(store.read_bytes(f"index/{name}")), columns=["item_id", "id"]) for name in names)
    return [(row["item_id"], row["id"]) for table in tables for row in table.to_pylist()]
