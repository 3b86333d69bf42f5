"""Rows of an earlier version's dataset move into numbered parts: each once at any moment, and all at the end."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from ltx_ray.cli.app import app
from ltx_ray.dataset import migrate as migrating
from ltx_ray.dataset.existing import list_existing
from ltx_ray.dataset.fold import fold_output
from ltx_ray.dataset.layout import ADDED_COLUMNS, FAILED_SCHEMA, INDEX_SCHEMA, NUMBERED_PART, row_key
from ltx_ray.dataset.migrate import migrate
from ltx_ray.dataset.parts import encode_part
from ltx_ray.manifest.reader import RawRow
from ltx_ray.storage.store import Store
from tests.support.damaged_dataset import ITEMS, ROWS, as_one_row_parts, build, part_of, rows_of
from tests.support.datasets import dataset_writer, finish, rows_in
from tests.support.results import CRASH, ITEM, RENDERED
from tests.support.samples import request

ALL = sorted((ITEMS[n], row_id) for n, row_id in ROWS)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def store(request, tmp_path) -> Store:
    """Rows of all tables in parts of one row, of which one lacks columns."""
    store = build(Store(str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("bucket")))
    writer = dataset_writer(store)
    writer.write_preview(ITEM, request_of("p"), RawRow("m.jsonl", 1, {}), RENDERED)
    writer.write_failed(ITEM, request_of("f"), RawRow("m.jsonl", 2, {}), CRASH)
    writer.write_illegal(RawRow("m.jsonl", 3, {"prompt": ""}), ["why"])
    finish(writer)
    as_one_row_parts(store), as_one_row_parts(store, "previews")
    [failed] = store.list_names("failed")
    table = pq.read_table(io.BytesIO(store.read_bytes(f"failed/{failed}")))
    store.delete(f"failed/{failed}")
    for at, name in enumerate((f"infra-{ITEM}-{row_key('f')}", f"illegal-{'7' * 32}-{row_key('m.jsonl:3')}")):
        store.write_bytes(f"failed/part-{name}.parquet", encode_part(table.slice(at, 1), "failed"))
    part = pq.read_table(io.BytesIO(store.read_bytes(part_of(1, "c")))).drop_columns(list(ADDED_COLUMNS))
    buffer = io.BytesIO()
    pq.write_table(part, buffer)
    store.write_bytes(part_of(1, "c"), buffer.getvalue())
    return store


def request_of(row_id: str):
    return request(id=row_id)


def whole(store: Store) -> bool:
    """Whether all rows are in numbered parts, each once."""
    names = [name for folder in ("index", "previews", "failed") for name in store.list_names(folder)]
    return (
        all(map(NUMBERED_PART.fullmatch, names))
        and sorted(rows_of(store)) == ALL
        and [row["id"] for row in rows_in(store, "previews")] == ["p"]
        and sorted(row["source"] for row in rows_in(store, "failed")) == ["m.jsonl:2", "m.jsonl:3"]
        and not list(store.names("state/wal"))
    )


def test_all_rows_move_into_numbered_parts(store):
    said: list[str] = []
    counted: list[tuple[int, int]] = []
    on_rows = lambda done, total: counted.append((done, total))  # noqa: E731
    assert migrate(store, "0badcafe", "fold-1", said.append, at_once=3, on_rows=on_rows) == 7
    assert whole(store) and not said
    assert counted[0][0] == 3 and counted[-1] == (7, 7) and counted == sorted(counted)
    tables = [pq.read_table(io.BytesIO(store.read_bytes(f"index/{name}"))) for name in store.list_names("index")]
    assert all(table.schema.equals(INDEX_SCHEMA) for table in tables)
    old = {row["id"]: row["motion"] for row in pa.concat_tables(tables).to_pylist()}
    assert old["c"] is None
    [failed] = store.list_names("failed")
    assert pq.read_table(io.BytesIO(store.read_bytes(f"failed/{failed}"))).schema.equals(FAILED_SCHEMA)
    existing = list_existing(store)
    assert (existing.row_count, existing.preview_count, existing.failed_count) == (4, 1, 2)
    assert migrate(store, "0badcafe", "fold-2", said.append) == 0 and whole(store)


class Interrupted(Exception):
    pass


OPERATIONS = ("create", "delete", "delete_many")


def test_no_row_is_seen_twice_at_any_moment_and_an_interruption_loses_none(tmp_path):
    """Interrupted before and after every operation in turn, and then done again."""
    for at in range(100):
        store = as_one_row_parts(build(Store(str(tmp_path / str(at)))))
        count = 0

        def step(store=store, at=at):
            nonlocal count
            rows = rows_of(store)
            assert len(set(rows)) == len(rows), "a row is seen twice"
            count += 1
            if count > at:
                raise Interrupted

        for name in OPERATIONS:
            real = getattr(store, name)

            def operation(*arguments, real=real):
                step()
                answer = real(*arguments)
                step()
                return answer

            setattr(store, name, operation)
        try:
            migrate(store, "0badcafe", "fold-1", lambda message: None, at_once=2)
            ended = True
        except Interrupted:
            ended = False
        again = Store(store.uri)
        fold_output(again, lambda message: None)
        assert sorted(rows_of(again)) == ALL
        migrate(again, "0badcafe", "fold-2", lambda message: None, at_once=2)
        assert sorted(rows_of(again)) == ALL and all(map(NUMBERED_PART.fullmatch, again.list_names("index")))
        if ended:
            return
    pytest.fail("it does not end")


def test_parts_that_cannot_be_moved_stay_and_are_named(store):
    store.write_bytes(part_of(1, "c"), b"no Parquet")
    store.write_bytes(f"index/part-{'9' * 32}-{row_key('x')}.parquet", store.read_bytes(part_of(2, "d")))
    store.write_bytes("index/_lost-part-x.parquet", b"set aside by an earlier version")
    said: list[str] = []
    assert migrate(store, "0badcafe", "fold-1", said.append) == 6
    assert sum("is damaged" in line or "is not named after its row" in line for line in said) == 2
    assert len([name for name in store.list_names("index") if not NUMBERED_PART.fullmatch(name)]) == 2
    assert store.exists("state/aside/index/_lost-part-x.parquet")


def test_the_command(tmp_path, monkeypatch):
    store = as_one_row_parts(build(Store(str(tmp_path / "out"))))

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["fold", *arguments])
        return result.exit_code, result.output

    assert run(store.uri) == (0, "0 rows folded\n") and len(store.list_names("index")) == 4
    code, said = run(store.uri, "--migrate")
    assert code == 0 and said.endswith("0 rows folded, 4 rows moved from parts of one row\n")
    assert sorted(rows_of(store)) == ALL and len(store.list_names("index")) == 1
    assert run(str(tmp_path / "none"))[0] == 2
    assert migrating.PART_ROWS == 10_000
