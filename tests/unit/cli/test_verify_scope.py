"""A check of some of the rows, a check that is resumed, and one that reads no clip because the store has checksums."""

from __future__ import annotations

import datetime
import hashlib
import json

import pyarrow as pa
import pytest
from click.testing import CliRunner

from ltx_ray.cli.app import app
from ltx_ray.cli.verify import verify
from ltx_ray.dataset import check_scope
from ltx_ray.dataset.check_scope import CheckScope
from ltx_ray.dataset.parts import encode_part, read_part
from ltx_ray.storage.checksums import SHA256
from ltx_ray.storage.store import Store
from tests.support.damaged_dataset import ITEMS, ROWS, boxes, build, clip_of

UTC = datetime.UTC


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def store(request, tmp_path) -> Store:
    """Four parts of one row each."""
    store = Store(str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("bucket"))
    for row in ROWS:
        build(store, (row,))
    return store


def parts(store: Store) -> list[str]:
    return [f"index/{name}" for name in store.list_names("index")]


def check(store: Store, **options) -> tuple[int, list[str]]:
    said: list[str] = []
    return verify(store.uri, said.append, **options), said


def finished_at(store: Store, number: int, *times: datetime.datetime) -> None:
    """Give the rows of a part other times."""
    part = parts(store)[number]
    table = read_part(store, part)
    at = table.schema.get_field_index("finished_at")
    column = pa.array(times, table.schema.field(at).type)
    store.write_bytes(part, encode_part(table.set_column(at, "finished_at", column), "index"))


def read_clips(monkeypatch) -> list[str]:
    read: list[str] = []
    read_bytes = Store.read_bytes

    def spy(self: Store, relative: str) -> bytes:
        if relative.startswith("clips/"):
            read.append(relative)
        return read_bytes(self, relative)

    monkeypatch.setattr(Store, "read_bytes", spy)
    return read


def test_rows_by_their_ids(store):
    store.delete(clip_of(1))
    assert check(store, scope=CheckScope(ids=frozenset("abd"))) == (0, ["3 rows and 3 clips checked: all well"])
    count, said = check(store, scope=CheckScope(ids=frozenset("c")))
    assert count == 1 and "is missing" in said[0] and said[-1] == "1 rows and 1 clips checked: 1 problems"


def test_ids_without_a_row_are_named(store, tmp_path):
    ids = frozenset({"a", "nobody", "noone"})
    note = "note: 2 ids have no row in the index, such as nobody, noone"
    assert check(store, scope=CheckScope(ids=ids)) == (0, [note, "1 rows and 1 clips checked: all well"])
    # Another machine may have the part with their rows.
    assert len(check(store, scope=CheckScope(ids=ids, part=(1, 2)))[1]) == 1


def test_rows_that_were_finished_since(store, monkeypatch):
    """A part of which no row is new is not read."""
    early, late = datetime.datetime(2026, 11, 1, tzinfo=UTC), datetime.datetime(2026, 11, 30, 2, tzinfo=UTC)
    for number, time in enumerate((early, late, early, late)):
        finished_at(store, number, time)
    store.delete(clip_of(1))  # row c, which is early
    read, read_bytes = [], Store.read_bytes
    monkeypatch.setattr(Store, "read_bytes", lambda self, path: read.append(path) or read_bytes(self, path))
    assert check(store, scope=CheckScope(since=late)) == (0, ["2 rows and 2 clips checked: all well"])
    assert [path for path in read if path.startswith("index/")] == parts(store)[1::2]
    assert check(store, scope=CheckScope(since=early))[0] == 1
    assert check(store, scope=CheckScope(since=late + datetime.timedelta(1)))[1] == [
        "0 rows and 0 clips checked: all well"
    ]


def test_a_share_of_the_rows_is_the_same_each_time(tmp_path, monkeypatch):
    rows = [(item, f"{item}") for item in range(200)]
    monkeypatch.setattr("tests.support.damaged_dataset.ITEMS", tuple(f"{item:032x}" for item in range(200)))
    store = build(Store(str(tmp_path)), tuple(rows))
    read = read_clips(monkeypatch)
    checked = []
    for fraction in (0.25, 0.25, 0.5, 1.0):
        read.clear()
        assert check(store, scope=CheckScope(fraction=fraction))[0] == 0
        checked.append(set(read))
    assert checked[0] == checked[1] < checked[2] < checked[3]
    assert [20 < len(checked[0]) < 80, 70 < len(checked[2]) < 130, len(checked[3])] == [True, True, 200]


def test_machines_that_share_the_parts_check_each_row_once(store, monkeypatch):
    whole = check(store)[1]
    assert whole == ["4 rows and 4 clips checked, 0 rows in failed/: all well"]
    store.write_bytes("failed/part-0badcafe-00000000.parquet", b"")
    store.write_bytes("failed/part-0badcafe-00000000.parquet", b"no Parquet")
    said = [check(store, scope=CheckScope(part=(number, 3))) for number in range(3)]
    assert [count for count, _ in said] == [1, 0, 0], "the first one checks the other tables"
    assert [lines[-1].partition(" checked")[0] for _, lines in said] == [
        "2 rows and 2 clips", "1 rows and 1 clips", "1 rows and 1 clips",
    ]  # fmt: skip


def test_a_sample_alone_is_checked_before_it_is_rendered(store, monkeypatch):
    """Of the others, neither clips nor whole rows are read."""
    monkeypatch.setattr("ltx_ray.cli.verify._render_again", lambda sampled, options, say: seen.extend(sampled) or ())
    read = read_clips(monkeypatch)
    sizes = {}
    for sample in (1, 2, 99):
        seen: list = []
        read.clear()
        count, said = check(store, sample=sample, options=lambda *paths: None)
        sizes[sample] = len({row["item_id"] for _, row in seen}), len(set(read))
        assert count == 0 and "rows in failed/" not in said[-1]
    assert sizes == {1: (1, 1), 2: (2, 2), 99: (3, 3)}
    seen = []
    check(store, sample=1, repair=True, options=lambda *paths: None)
    assert len(seen) == 1 and len(set(read)) == 3, "a repair checks everything"


def test_a_sample_of_some_rows(store, monkeypatch):
    monkeypatch.setattr("ltx_ray.cli.verify._render_again", lambda sampled, options, say: seen.extend(sampled) or ())
    seen: list = []
    check(store, sample=9, scope=CheckScope(ids=frozenset("bd")), options=lambda *paths: None)
    assert sorted(row["id"] for _, row in seen) == ["b", "d"]


def test_a_check_that_was_interrupted_goes_on(store, tmp_path, monkeypatch):
    resume = str(tmp_path / "checked")
    read = read_clips(monkeypatch)

    class Interrupted(Exception):
        pass

    def on_rows(done: int, total: int) -> None:
        if done == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        check(store, resume=resume, on_rows=on_rows)
    read.clear()
    count, said = check(store, resume=resume)
    assert count == 0 and said[0] == f"resuming: 2 parts were found well before ({resume})"
    assert said[-1] == "4 rows and 4 clips checked, 0 rows in failed/: all well"
    assert read == [clip_of(1), clip_of(2)]
    assert not (tmp_path / "checked").exists(), "the next check begins anew"


def test_a_part_with_a_problem_is_checked_again_and_one_that_changed_is_too(store, tmp_path):
    resume, missing = str(tmp_path / "checked"), clip_of(1)
    store.delete(missing)
    kept = tmp_path / "kept"
    finish = check_scope.CheckedParts.finish
    check_scope.CheckedParts.finish = lambda self: (tmp_path / "checked").rename(kept)  # as if the end was not reached
    try:
        assert check(store, resume=resume)[0] == 1
    finally:
        check_scope.CheckedParts.finish = finish
    lines = [json.loads(line) for line in kept.read_text().splitlines()[1:]]
    assert sorted(lines) == [[part.removeprefix("index/"), 1] for n, part in enumerate(parts(store)) if n != 2]
    kept.rename(tmp_path / "checked")
    with (tmp_path / "checked").open("a") as file:
        file.write('["part-cut')  # by a kill
    build(store, ((2, "d2"),))
    rows = read_part(store, parts(store)[-1])
    store.write_bytes(
        parts(store)[-2], encode_part(pa.concat_tables([read_part(store, parts(store)[-2]), rows]), "index")
    )
    count, said = check(store, resume=resume)
    assert count == 2 and "the row is in another part too" in "".join(said), "of a part that has another row now"


def test_a_row_that_is_in_two_parts_is_found_after_a_resume(store, tmp_path):
    resume = tmp_path / "checked"
    resume.write_text(
        "\n".join([
            json.dumps({"output": store.name, "scope": CheckScope().json()}),
            json.dumps([parts(store)[0].removeprefix("index/"), 1]),
        ]) + "\n"
    )  # fmt: skip
    store.write_bytes("index/part-0badcafe-00000099.parquet", store.read_bytes(parts(store)[0]))
    count, said = check(store, resume=str(resume))
    assert count == 1 and "the row is in another part too" in "".join(said)


@pytest.mark.parametrize("content", ["{}\n", "\x00\xff", '{"output": "elsewhere", "scope": "x"}\n'])
def test_a_file_of_another_check_is_refused(store, tmp_path, content):
    (tmp_path / "checked").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"--resume: .*checked"):
        check(store, resume=str(tmp_path / "checked"))
    with pytest.raises(ValueError, match=r"--resume: .*none/checked, cannot be read or written"):
        check(store, resume=str(tmp_path / "none" / "checked"))


# --- checksums of the store -----------------------------------------------------------------------


def test_clips_that_the_store_has_a_checksum_of_are_not_read(bucket, monkeypatch):
    store = Store(f"{bucket}/out")
    for number, item_id in enumerate(ITEMS[:2]):
        assert store.create(clip_of(number), boxes(item_id))
        assert store.stored_checksums(clip_of(number))[SHA256] == hashlib.sha256(boxes(item_id)).hexdigest()
    build(store, ROWS[3:])
    monkeypatch.setattr(Store, "write_bytes", lambda self, path, data: None)  # those clips are there
    build(store, ROWS[:3])
    monkeypatch.undo()
    read = read_clips(monkeypatch)
    assert check(store)[1] == ["4 rows and 4 clips checked, 0 rows in failed/: all well"]
    assert set(read) == {clip_of(2)}, "which was written without"
    read.clear()
    assert check(store, read_all=True)[0] == 0 and set(read) == set(map(clip_of, range(3)))
    store.delete(clip_of(0))
    assert store.create(clip_of(0), boxes(ITEMS[0]) + b"x")
    store.delete(clip_of(1))
    count, said = check(store)
    assert (
        count == 3
        and sum("has sha256" in line for line in said) == 2
        and sum("is missing" in line for line in said) == 1
    )


def test_a_disk_keeps_no_checksums(tmp_path):
    store = Store(str(tmp_path))
    store.create("a", b"x")
    assert store.stored_checksums("a") == {}


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--since", "2020-01-01"), "4 rows and 4 clips checked: all well"),
        (("--since", "2999-01-01T00:00+02:00"), "0 rows and 0 clips checked: all well"),
        (("--fraction", "0"), "0 rows and 0 clips checked: all well"),
        (("--part", "0/1"), "4 rows and 4 clips checked, 0 rows in failed/: all well"),
        (("--read-all",), "4 rows and 4 clips checked, 0 rows in failed/: all well"),
        (("--since", "soon"), "--since: 'soon', legal: a date such as 2026-11-30 or 2026-11-30T02:00"),
        (("--part", "2/2"), "--part: '2/2', legal: I/N with I from 0 to N-1"),
        (("--fraction", "2"), "--fraction: 2.0, legal: a part of the rows, from 0 to 1"),
    ],
)
def test_the_options(tmp_path, arguments, said):
    store = build(Store(str(tmp_path / "out")))
    result = CliRunner().invoke(app, ["verify", store.uri, *arguments])
    assert said in result.output and result.exit_code == (2 if "legal" in said else 0)


def test_ids_of_a_file(tmp_path):
    store = build(Store(str(tmp_path / "out")))
    (tmp_path / "ids").write_text("a\nc\n")
    result = CliRunner().invoke(app, ["verify", store.uri, "--ids", str(tmp_path / "ids")])
    assert result.output == "2 rows and 2 clips checked: all well\n"
