"""The driver's books: every manifest row is written once, whatever it shares its item with and whenever it comes."""

from __future__ import annotations

import io
import threading
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from ltx_ray.dataset.existing import list_existing
from ltx_ray.dataset.writer import DatasetWriter, Failure
from ltx_ray.driver.events import EventLog
from ltx_ray.driver.progress import Progress
from ltx_ray.driver.publisher import Publisher
from ltx_ray.driver.tracker import RowTracker
from ltx_ray.manifest.rules import RowRules
from ltx_ray.planning.identity import item_id
from ltx_ray.planning.plan import Plan
from ltx_ray.records import Clip, Recipe, RenderRequest, WorkItem
from ltx_ray.storage.store import Store
from tests.support.checkpoint_files import RELEASED
from tests.support.samples import recipe, write_jsonl

CLIP = Clip("clips/aa/a.mp4", "c" * 64, "d" * 64, (), "stage_1")
CRASH = Failure("stage2", 3, "infrastructure", "the gang died\nfor good", "Traceback")


class Book:
    """Work items without a model's files."""

    checkpoint = SimpleNamespace(transformer=RELEASED)
    made_with: Recipe = recipe()

    def item(self, request: RenderRequest) -> WorkItem:
        return WorkItem(item_id(request, self.made_with), request, self.made_with, "e" * 16)


class GatedWriter(DatasetWriter):
    """Holds index rows back until `go` is set."""

    def __init__(self, store: Store):
        super().__init__(store)
        self.begun, self.go = threading.Event(), threading.Event()
        self.go.set()

    def write_index(self, *args):
        self.begun.set()
        assert self.go.wait(10)
        super().write_index(*args)


class Desk:
    """Books over a folder, and what is in it."""

    def __init__(self, tmp_path):
        self.folder, self.store = tmp_path, Store(str(tmp_path / "out"))
        self.said = io.StringIO()

    def open(self, rows: list[dict], **options) -> Desk:
        manifest = write_jsonl(self.folder / "m.jsonl", rows)
        self.writer = GatedWriter(self.store)
        plan = Plan(manifest, RowRules(), Book(), list_existing(self.store), **options)  # type: ignore[arg-type]
        self.tracker = RowTracker(plan, self.writer, Publisher(2), EventLog(self.store), Progress(self.said), "{}")
        self.counted: list[str] = []
        self.tracker.metrics = SimpleNamespace(item=self.counted.append)  # type: ignore[assignment]
        self.rows = plan.open()
        return self

    def take(self, at_most: int = 100) -> list:
        return list(self.tracker.take(self.rows, at_most))

    def settle(self) -> None:
        while self.tracker.publisher.pending:
            self.tracker.publisher.poll(timeout=10)

    def close(self) -> None:
        self.tracker.publisher.close(finish=True)

    def ids(self, folder: str) -> list[str]:
        names = [f"{folder}/{name}" for name in self.store.list(folder)]
        return sorted(pq.read_table(io.BytesIO(self.store.read_bytes(n)))["id"][0].as_py() for n in names)


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    yield desk
    desk.writer.go.set()
    desk.close()


def rows(*ids: str, prompt: str = "a cat") -> list[dict]:
    return [{"id": row_id, "prompt": prompt} for row_id in ids]


def test_rows_that_share_an_item_are_one_work_and_each_is_written(desk):
    desk.open([*rows("a", "b"), *rows("c", prompt="a dog")])
    cat, dog = desk.take()
    assert [planned.id for planned in cat.rows] == ["a", "b"] and cat.name == "a"
    assert desk.tracker.exhausted
    desk.tracker.finish(cat, CLIP, "{}")
    desk.tracker.fail(dog, CRASH)
    desk.settle()
    assert desk.ids("index") == ["a", "b"] and desk.ids("failed") == ["c"]
    assert desk.tracker.counts == {"rows": 3, "rendered": 2, "failed": 1}
    assert sorted(desk.counted) == ["failed", "rendered", "rendered"]
    assert not desk.tracker.items
    assert "c: failed in stage2: the gang died\n" in desk.said.getvalue()


def test_a_stage_1_of_other_numerics_stands_beside_those_of_the_run(desk):
    desk.open([*rows("a"), *rows("b", prompt="a dog")])
    cat, dog = desk.take()
    cat.stage_1_numerics = '{"attention":"cudnn"}'
    for work in (cat, dog):
        desk.tracker.finish(work, CLIP, '{"attention":"fa3"}')
    desk.settle()
    parts = [desk.store.read_bytes(f"index/{name}") for name in desk.store.list("index")]
    found = {row["id"]: row["numerics"] for part in parts for row in pq.read_table(io.BytesIO(part)).to_pylist()}
    assert found == {"a": '{"attention":"fa3","stage_1":{"attention":"cudnn"}}', "b": '{"attention":"fa3"}'}


def test_rows_are_taken_a_few_at_a_time(desk):
    desk.open([{"id": f"r{n}", "prompt": f"clip {n}"} for n in range(5)])
    assert [work.name for work in desk.take(3)] == ["r0", "r1", "r2"]
    assert not desk.tracker.exhausted
    assert [work.name for work in desk.take(3)] == ["r3", "r4"]
    assert desk.tracker.exhausted


@pytest.mark.parametrize("outcome", ["rendered", "failed"])
def test_a_twin_that_comes_while_the_rows_are_being_written(desk, outcome):
    desk.open(rows("a", "b"))
    (work,) = desk.take(1)
    desk.writer.go.clear()
    if outcome == "rendered":
        desk.tracker.finish(work, CLIP, "{}")
        assert desk.writer.begun.wait(10)
    else:
        desk.tracker.fail(work, CRASH)
    assert desk.take() == [], "it is no new work"
    desk.writer.go.set()
    desk.settle()
    assert desk.ids("index" if outcome == "rendered" else "failed") == ["a", "b"]
    assert desk.tracker.counts == {"rows": 2, outcome: 2} and not desk.tracker.items


def test_a_twin_that_comes_when_the_clip_is_in_the_index_is_a_copy(desk):
    desk.open(rows("a", "b"))
    (work,) = desk.take(1)
    desk.tracker.finish(work, CLIP, "{}")
    desk.settle()
    assert desk.take() == []
    desk.settle()
    assert desk.ids("index") == ["a", "b"] and desk.tracker.counts["rendered"] == 2


def test_a_twin_that_comes_while_the_latents_are_being_kept(desk):
    desk.open(rows("a", "b"))
    (work,) = desk.take(1)
    work.failure = CRASH
    assert desk.take() == []
    desk.tracker.fail(work, work.failure)
    desk.settle()
    assert desk.ids("failed") == ["a", "b"] and desk.ids("index") == []


def test_what_an_item_held_is_let_go(desk):
    desk.open(rows("a"))
    (work,) = desk.take()
    work.payloads["stage1"] = object()
    desk.tracker.finish(work, CLIP, "{}")
    assert not work.payloads


def test_illegal_rows_are_on_record_and_forgotten_when_they_are_legal(desk):
    desk.open([{"id": "a", "prompt": ""}, *rows("b")])
    assert [work.name for work in desk.take()] == ["b"]
    desk.settle()
    desk.tracker.close(complete=True)
    assert desk.ids("failed") == ["a"] and desk.tracker.counts["illegal"] == 1
    assert "m.jsonl:1:prompt" in desk.said.getvalue()
    desk.close()
    desk.open(rows("a", "b"))
    desk.take()
    desk.tracker.close(complete=False)
    assert desk.ids("failed") == ["a"], "who knows what the rest of the manifest says"
    desk.tracker.close(complete=True)
    assert desk.ids("failed") == []


def test_a_row_that_was_edited_leaves_its_older_failure_behind(desk):
    desk.open(rows("a"))
    (work,) = desk.take()
    desk.tracker.fail(work, CRASH)
    desk.close()
    desk.open(rows("a", prompt="a dog"))
    (work,) = desk.take()
    desk.tracker.finish(work, CLIP, "{}")
    desk.settle()
    assert desk.ids("index") == ["a"] and desk.ids("failed") == []


def test_finished_and_failed_rows_of_an_earlier_run_are_counted(desk):
    desk.open([*rows("a"), *rows("b", prompt="a dog")])
    cat, dog = desk.take()
    desk.tracker.finish(cat, CLIP, "{}")
    desk.tracker.fail(dog, Failure("stage1", 1, "row", "not finite"))
    desk.close()
    desk.open([*rows("a", "a"), *rows("b", prompt="a dog")])
    assert desk.take() == []
    assert desk.tracker.counts == {"rows": 2, "already_done": 1, "failed": 1}


def test_closed_without_finishing_a_row_is_not_half_there(desk):
    desk.open(rows("a", "b", "c", "d"))
    (work,) = desk.take()
    desk.writer.go.clear()
    desk.tracker.finish(work, CLIP, "{}")
    assert desk.writer.begun.wait(10)
    closing = threading.Thread(target=desk.tracker.publisher.close, args=(False,))
    closing.start()
    desk.writer.go.set()
    closing.join(10)
    written = desk.ids("index")
    assert 1 <= len(written) <= 4 and desk.tracker.counts["rendered"] == 0
    desk.open(rows("a", "b", "c", "d"))
    assert desk.take() == [], "the rest are copies"
    desk.settle()
    assert desk.ids("index") == ["a", "b", "c", "d"]
