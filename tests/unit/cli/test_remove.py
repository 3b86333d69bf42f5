"""`ltx-ray remove`: what is gone afterwards, what stays, and that no plan has it again."""

from __future__ import annotations

import json

import pyarrow.dataset as pads
import pytest

from ltx_ray.cli.app import main
from ltx_ray.cli.remove import remove, remove_failures
from ltx_ray.cli.status import status_lines
from ltx_ray.config import ModelFiles, RecipeNumerics
from ltx_ray.dataset import layout, removal
from ltx_ray.dataset.existing import list_existing
from ltx_ray.dataset.fold import fold_output
from ltx_ray.dataset.parts import list_segments
from ltx_ray.dataset.writer import DatasetWriter
from ltx_ray.manifest.raw import RawRow
from ltx_ray.manifest.reader import read_manifest
from ltx_ray.manifest.rules import RowRules
from ltx_ray.planning.plan import ItemBuilder, Plan
from ltx_ray.storage.store import Store
from tests.support.damaged_dataset import ITEMS, as_one_row_parts, build, clip_of
from tests.support.datasets import dataset_writer, finish, row_log, rows_in
from tests.support.results import CRASH, NAN, RENDERED
from tests.support.samples import request, write_jsonl

#: The rows that `build` makes: two of the first item, and one of each other.
FIRST, SECOND, THIRD = ITEMS


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def store(request, tmp_path) -> Store:
    return Store(str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("bucket"))


@pytest.fixture
def cmd(capfd, tmp_path):
    def call(store: Store, *ids: str, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
        file = tmp_path / "ids.txt"
        file.write_text("".join(f"{row_id}\n" for row_id in ids))
        with pytest.raises(SystemExit) as caught:
            main(["remove", store.uri, "--ids", str(file), *options])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return caught.value.code, out, err

    return call


def taken_down(store: Store, *ids: str):
    return remove(store, frozenset(ids), lambda message: None, lambda done, total: None)


def everything(store: Store) -> str:
    """The names and contents of all files but the records of takedowns."""
    names = [name for name in store.names("") if not name.startswith(layout.REMOVED)]
    return "\n".join(name + repr(store.read_bytes(name)) for name in names)


def ids_in(store: Store, folder: str = layout.INDEX) -> list[str]:
    return sorted(row["id"] for row in rows_in(store, folder))


def test_a_row_goes_with_its_files_and_with_the_rows_that_share_its_clip(store, cmd):
    build(store)
    for path in (layout.latents_path(FIRST), layout.thumb_path(FIRST), layout.preview_path(FIRST), layout.REPORT):
        store.write_bytes(path, b"something")
    store.write_bytes(layout.older_record("run0", layout.REPORT), b"something")
    store.write_bytes(layout.thumb_path(SECOND), b"another")
    code, out, _ = cmd(store, "a")
    assert (code, out) == (0, "2 rows of 1 clips removed; they are not rendered again\n")
    assert ids_in(store) == ["c", "d"]
    assert FIRST not in everything(store) and "something" not in everything(store)
    assert store.exists(clip_of(1)) and store.exists(layout.thumb_path(SECOND))


def test_an_item_id_names_a_clip(store, cmd):
    build(store)
    assert cmd(store, SECOND)[0] == 0
    assert ids_in(store) == ["a", "b", "d"]


def test_previews_failures_and_rows_of_a_killed_run_go_too(store):
    writer = dataset_writer(store)
    raw = RawRow("m.jsonl", 1, {"id": "bad", "prompt": ""})
    writer.write_preview(FIRST, request(id="a"), raw, RENDERED)
    writer.write_failed(SECOND, request(id="b"), raw, CRASH)
    writer.write_failed(THIRD, request(id="c"), raw, NAN)
    writer.write_illegal(raw, ["prompt is empty"])
    writer.write_illegal(RawRow("m.jsonl", 2, {"id": "worse", "prompt": ""}), ["prompt is empty"])
    writer.log.commit()
    assert taken_down(store, "a", "b", "bad").unknown == frozenset()
    assert not list_segments(store)
    assert (ids_in(store, layout.PREVIEWS), ids_in(store, layout.FAILED)) == ([], ["c", "worse"])
    assert FIRST not in everything(store) and SECOND not in everything(store)


def test_failures_alone_are_named_by_id_item_or_place_and_may_be_rendered_again(store, cmd):
    """The rows were corrected in a manifest of another name, under the same id or another: both are done."""
    build(store, rows=((0, "a"), (1, "b")))
    writer = dataset_writer(store)
    raw = RawRow("old.jsonl", 7, {"id": "a", "prompt": ""})
    writer.write_illegal(raw, ["prompt is empty"])
    writer.write_illegal(RawRow("old rows.jsonl", 8, {"prompt": ""}), ["prompt is empty"])
    for item, row_id in ((SECOND, "x"), (THIRD, "c"), (THIRD, "d")):
        writer.write_failed(item, request(id=row_id), raw, CRASH)
    writer.log.commit()
    before = {name: store.read_bytes(name) for name in store.names("") if name.startswith(("clips/", "index/"))}
    code, out, err = cmd(store, "a", SECOND, "old rows.jsonl:8", "c", "nobody", options=("--failures-only",))
    assert (code, out) == (3, "4 rows taken out of failed/; clips and other rows are as they were\n")
    assert f"1 names have no row in {store.name}/failed, such as nobody" in err
    assert ids_in(store, layout.FAILED) == ["d"] and ids_in(store) == ["a", "b"]
    assert before == {name: store.read_bytes(name) for name in before}
    assert not list_existing(store).removed, "nothing is barred"
    assert cmd(store, "d", options=("--failures-only",))[0] == 0
    assert list_existing(store).failed_count == 0


def test_a_place_is_named_as_the_manifest_is_for_render(tmp_path, monkeypatch, cmd):
    """Relative to the working directory: what failed/ has of it is absolute."""
    store = Store(str(tmp_path / "out"))
    manifest = write_jsonl(tmp_path / "my prompts.jsonl", [{"prompt": ""}, {"prompt": ""}])
    writer = dataset_writer(store)
    for raw in read_manifest(manifest):
        writer.write_illegal(raw, ["prompt is empty"])
    writer.log.commit()
    monkeypatch.chdir(tmp_path)
    assert cmd(store, "my prompts.jsonl:2", "s3://no//place:1", options=("--failures-only",))[0] == 3
    assert [row["source"] for row in rows_in(store, layout.FAILED)] == [f"{manifest}:1"]
    assert cmd(store, f"{manifest}:1", options=("--failures-only",))[0] == 0


def test_failures_of_earlier_versions_parts_can_be_taken_out_alone(store):
    path = f"{layout.FAILED}/part-row-{SECOND}-{layout.row_key('x')}.parquet"
    writer = dataset_writer(store)
    writer.write_failed(SECOND, request(id="x"), RawRow("m.jsonl", 1, {}), NAN)
    finish(writer)
    [part] = store.list_names(layout.FAILED)
    store.write_bytes(path, store.read_bytes(f"{layout.FAILED}/{part}"))
    store.delete(f"{layout.FAILED}/{part}")
    assert list_existing(store).failed_count == 1
    assert remove_failures(store, frozenset({"x"}), pytest.fail, lambda done, total: None).rows == 1
    assert store.list_names(layout.FAILED) == []


def test_what_repair_has_set_aside_goes_too(store):
    build(store)
    store.write_bytes(f"{layout.ASIDE}/{clip_of(0)}", b"clip")
    store.write_bytes(f"{layout.ASIDE}/{clip_of(1)}", b"clip")
    [name] = store.list_names(layout.INDEX)
    store.write_bytes(f"{layout.ASIDE}/index/{name}", store.read_bytes(f"index/{name}"))
    taken_down(store, "a")
    assert list(store.names(layout.ASIDE)) == [clip_of(1)]


def test_parts_of_one_row_are_deleted_and_a_numbered_part_keeps_its_number(store):
    build(store, rows=((0, "a"),))
    taken_down(store, "a")
    assert (ids_in(store), len(store.list_names(layout.INDEX))) == ([], 1)
    build(store, rows=((1, "c"),))
    assert [name[14:22] for name in store.list_names(layout.INDEX)] == ["00000000", "00000001"]
    as_one_row_parts(store)
    taken_down(store, "c")
    assert store.list_names(layout.INDEX) == []


def test_an_empty_part_troubles_nobody(store, capfd):
    build(store, rows=((0, "a"), (0, "b")))
    taken_down(store, "a")
    assert pads.dataset(store.path(layout.INDEX), filesystem=store.fs).to_table().num_rows == 0
    for command in ("verify", "report"):
        with pytest.raises(SystemExit) as caught:
            main([command, store.uri])
        assert caught.value.code == 0, capfd.readouterr()
    assert "0 rows and 0 clips checked" in capfd.readouterr().out
    assert list_existing(store).row_count == 0


def test_status_says_how_many_clips_were_taken_down(store):
    build(store)
    taken_down(store, "a", "c")
    store.write_bytes("run.json", b'{"run_id": "r"}')
    assert any("1 rows in the index, 0 in failed/, 2 clips taken down" in line for line in status_lines(store.uri))


def test_ids_without_a_row_are_named_and_never_rendered(store, cmd):
    build(store)
    code, out, err = cmd(store, "d", "nobody")
    assert code == 3 and "1 rows of 1 clips" in out
    assert "1 ids have no row" in err and "nobody" in err
    assert list_existing(store).removed.has_row(None, "nobody")
    code, out, _ = cmd(store, "d", "nobody")
    assert (code, out) == (0, "0 rows of 0 clips removed; they are not rendered again\n")


def test_no_ids_are_refused(store, cmd):
    build(store)
    assert cmd(store)[0] == 2


def test_a_record_holds_neither_ids_nor_prompts(store):
    build(store)
    taken_down(store, "a")
    [record] = [name for name in store.names(layout.REMOVED) if name.endswith(".json")]
    assert set(json.loads(store.read_bytes(f"{layout.REMOVED}/{record}"))) == {"format", "items", "ids"}
    assert b'"a"' not in store.read_bytes(f"{layout.REMOVED}/{record}")


def test_a_damaged_record_is_named_and_is_not_passed_over(store):
    build(store)
    store.write_bytes(f"{layout.REMOVED}/00000000.json", b"{")
    with pytest.raises(OSError, match="says what was taken down, is damaged; delete it"):
        list_existing(store)


def test_an_interrupted_removal_is_finished_by_the_next_fold(store, monkeypatch):
    build(store)
    monkeypatch.setattr(removal, "_rewrite", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        taken_down(store, "a")
    monkeypatch.undo()
    said: list[str] = []
    fold_output(store, said.append)
    assert any("what was taken down was still there in part" in line for line in said)
    assert (ids_in(store), store.exists(clip_of(0))) == (["c", "d"], False)
    assert not list_existing(store).removed.unfinished


def test_rows_of_a_run_that_had_lost_its_lease_do_not_come_back(store):
    build(store)
    late = DatasetWriter(row_log(store, "late"))
    taken_down(store, "a")
    late.write_index(FIRST, request(id="x"), RENDERED)
    finish(late)
    assert ids_in(store) == ["c", "d", "x"], "it does not know"
    late.write_index(FIRST, request(id="y"), RENDERED)
    late.log.commit()
    fold_output(store, lambda message: None)
    assert ids_in(store) == ["c", "d"]


def test_a_plan_leaves_out_what_was_removed(tmp_path, toy):
    rows = [{"prompt": "a cat", "id": "a"}, {"prompt": "a cat", "id": "same"}, {"prompt": "a dog", "id": "b"},
            {"prompt": "", "id": "illegal"}, {"prompt": "", "id": "left"}]  # fmt: skip
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = Store(str(tmp_path / "out"))
    builder = ItemBuilder(ModelFiles(**toy), RecipeNumerics())
    plan = Plan(manifest=str(manifest), rules=RowRules(), builder=builder)
    item = next(iter(plan.open())).item_id
    writer = dataset_writer(store)
    writer.write_index(item, request(id="a"), RENDERED)
    finish(writer)
    taken_down(store, "a", "illegal")
    plan = plan.against(list_existing(store))
    assert [row.status for row in plan.open()] == ["removed", "removed", "todo", "illegal"]
    assert plan.counts == {"rows": 4, "removed": 3, "todo": 1, "illegal": 1, "clips": 1}
