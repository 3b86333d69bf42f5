"""The tracker writes every row of the manifest once, whichever rows share its item and whenever it arrives."""

from __future__ import annotations

import io
import threading
from types import SimpleNamespace

import pytest

from ltx_ray.dataset.existing import list_existing
from ltx_ray.dataset.parts import read_rows
from ltx_ray.dataset.row_log import RowLog
from ltx_ray.dataset.writer import DatasetWriter, Failure
from ltx_ray.driver.events import EventLog
from ltx_ray.driver.illegal_rows import SHOWN
from ltx_ray.driver.progress import Progress
from ltx_ray.driver.publisher import Publisher
from ltx_ray.driver.tracker import RowTracker
from ltx_ray.manifest.reader import read_manifest
from ltx_ray.manifest.rules import RowRules
from ltx_ray.planning.identity import item_id
from ltx_ray.planning.plan import REPEATED, TODO, Plan
from ltx_ray.planning.row_images import ImageOutOfReach
from ltx_ray.records import CallReport, Clip, EngineFacts, NoiseLedger, Recipe, RenderRequest, WorkItem
from ltx_ray.stages import Stage
from ltx_ray.storage.store import Store
from tests.support.checkpoint_files import RELEASED
from tests.support.datasets import row_log
from tests.support.results import RENDERED
from tests.support.samples import recipe, write_jsonl

CLIP = Clip("clips/aa/a.mp4", "c" * 64, "d" * 64, (), "stage_1")
CRASH = Failure("stage2", 3, "infrastructure", "the gang died\nfor good", "Traceback")


class FakeBuilder:
    """Builds work items without the files of a model."""

    checkpoint = SimpleNamespace(transformer=RELEASED)
    run_recipe: Recipe = recipe()

    def item(self, request: RenderRequest) -> WorkItem:
        return WorkItem(item_id(request, self.run_recipe), request, self.run_recipe, "e" * 16)


class BuilderWithImages(FakeBuilder):
    """Reads the digests of images with `read`, which may find that their store does not answer."""

    def __init__(self, read):
        self.read = read

    def item(self, request: RenderRequest, digest=None) -> WorkItem:
        digests = tuple(map(self.read, (image.path for image in request.images)))
        return WorkItem(item_id(request, self.run_recipe, digests), request, self.run_recipe, "e" * 16, digests)


class GatedWriter(DatasetWriter):
    """Writes index rows only while `go` is set."""

    def __init__(self, log: RowLog):
        super().__init__(log)
        self.begun, self.go = threading.Event(), threading.Event()
        self.go.set()

    def write_index(self, *args):
        self.begun.set()
        assert self.go.wait(120)
        super().write_index(*args)


class Output:
    """A folder, a tracker that writes into it, and what is in it."""

    def __init__(self, tmp_path):
        self.folder, self.store = tmp_path, Store(str(tmp_path / "out"))
        self.said = io.StringIO()

    def open(self, rows: list[dict], **options) -> Output:
        manifest = write_jsonl(self.folder / "m.jsonl", rows)
        log = row_log(self.store)
        self.writer = GatedWriter(log)
        builder = options.pop("builder", FakeBuilder())
        plan = Plan(manifest, RowRules(), builder, log.existing, **options)  # type: ignore[arg-type]
        events = EventLog(self.store, "run")
        self.tracker = RowTracker(plan, self.writer, Publisher(log), events, Progress(self.said), "{}")
        self.rows = plan.open()
        return self

    def take(self, at_most: int = 100) -> list:
        return list(self.tracker.take(self.rows, at_most))

    def settle(self) -> None:
        while self.tracker.publisher.pending:
            self.tracker.publisher.poll(timeout=120, flush=True)

    def close(self) -> None:
        self.tracker.publisher.close(finish=True)
        self.writer.log.close()

    def rows_of(self, folder: str) -> list[dict]:
        """Rows in segments and in parts, each once."""
        self.writer.log.close()
        return list(read_rows(self.store, folder))

    def ids(self, folder: str) -> list[str]:
        return sorted(row["id"] for row in self.rows_of(folder))


@pytest.fixture
def output(tmp_path):
    output = Output(tmp_path)
    yield output
    output.writer.go.set()
    output.close()


def rows(*ids: str, prompt: str = "a cat") -> list[dict]:
    return [{"id": row_id, "prompt": prompt} for row_id in ids]


def test_rows_that_share_an_item_are_one_item_and_each_is_written(output):
    output.open([*rows("a", "b"), *rows("c", prompt="a dog")])
    cat, dog = output.take()
    assert [planned.id for planned in cat.rows] == ["a", "b"] and cat.name == "a"
    assert output.tracker.exhausted
    output.tracker.finish(cat, CLIP, "{}")
    output.tracker.fail(dog, CRASH)
    output.settle()
    assert output.ids("index") == ["a", "b"] and output.ids("failed") == ["c"]
    assert output.tracker.counts == {"rows": 3, "rendered": 2, "failed": 1}
    assert output.tracker.failures == {CRASH.error_class: 1}
    assert not output.tracker.items
    assert "c: failed in stage2: the gang died\n" in output.said.getvalue()


def test_a_clip_counts_once_when_it_is_published_and_copies_and_failures_do_not(output):
    output.open([*rows("a", "b"), *rows("c", prompt="a dog"), *rows("d"), {"id": "e", "prompt": " "}])
    cat, dog = output.take(3)
    output.writer.go.clear()
    output.tracker.finish(cat, CLIP, "{}")
    output.tracker.fail(dog, CRASH)
    assert output.tracker.rate.clips == 0, "it is not published yet"
    output.writer.go.set()
    output.settle()
    assert output.tracker.rate.clips == 1
    assert output.take() == []
    output.settle()
    assert output.tracker.counts == {"rows": 5, "rendered": 3, "failed": 1, "illegal": 1}
    assert output.tracker.rate.clips == 1
    output.open(rows("a", "b", "d", "f"))
    assert output.take() == []
    output.settle()
    assert output.tracker.counts == {"rows": 4, "already_done": 3, "rendered": 1}
    assert output.tracker.rate.clips == 0, "this run has made none"


def test_other_numerics_of_stage_1_are_recorded_with_those_of_the_run(output):
    output.open([*rows("a"), *rows("b", prompt="a dog")])
    cat, dog = output.take()
    cat.stage1_numerics = '{"attention":"cudnn"}'
    for tracked in (cat, dog):
        output.tracker.finish(tracked, CLIP, '{"attention":"fa3"}')
    output.settle()
    found = {row["id"]: row["numerics"] for row in output.rows_of("index")}
    assert found == {"a": '{"attention":"fa3","stage_1":{"attention":"cudnn"}}', "b": '{"attention":"fa3"}'}


def test_a_preview_of_stored_latents_is_recorded_with_how_those_were_made(output):
    output.open(rows("a"))
    (cat,) = output.take()
    made, stored = NoiseLedger(1, "cuda", "H100"), NoiseLedger(1, "cuda", "A100")
    cat.take_result(Stage.STAGE1, CallReport(1.0, 0.0, facts=EngineFacts("H100", noise_ledger=made)), None)
    cat.take_result(Stage.DECODE, CallReport(1.0, 0.0), None)
    assert (cat.noise_ledger, cat.stage1_numerics) == (made, None)
    facts = EngineFacts(noise_ledger=stored, stage1_numerics='{"tp":2}')
    cat.take_result(Stage.DECODE, CallReport(1.0, 0.0, facts=facts), None)
    assert (cat.noise_ledger, cat.stage1_numerics) == (stored, '{"tp":2}')


def test_rows_are_taken_a_few_at_a_time(output):
    output.open([{"id": f"r{n}", "prompt": f"clip {n}"} for n in range(5)])
    assert [tracked.name for tracked in output.take(3)] == ["r0", "r1", "r2"]
    assert not output.tracker.exhausted
    assert [tracked.name for tracked in output.take(3)] == ["r3", "r4"]
    assert output.tracker.exhausted


@pytest.mark.parametrize("outcome", ["rendered", "failed"])
def test_a_row_of_the_same_item_that_arrives_while_rows_are_being_written(output, outcome):
    output.open(rows("a", "b"))
    (tracked,) = output.take(1)
    output.writer.go.clear()
    if outcome == "rendered":
        output.tracker.finish(tracked, CLIP, "{}")
        output.tracker.publisher.poll(flush=True)
        assert output.writer.begun.wait(120)
    else:
        output.tracker.fail(tracked, CRASH)
    assert output.take() == [], "it is not a new item"
    output.writer.go.set()
    output.settle()
    assert output.ids("index" if outcome == "rendered" else "failed") == ["a", "b"]
    assert output.tracker.counts == {"rows": 2, outcome: 2} and not output.tracker.items


def test_a_row_of_the_same_item_that_arrives_when_the_clip_is_in_the_index_is_a_copy(output):
    output.open(rows("a", "b"))
    (tracked,) = output.take(1)
    output.tracker.finish(tracked, CLIP, "{}")
    output.settle()
    assert output.take() == []
    output.settle()
    assert output.ids("index") == ["a", "b"] and output.tracker.counts["rendered"] == 2


@pytest.mark.parametrize("has_preview", [False, True])
def test_a_run_of_previews_copies_the_row_of_a_finished_clip(output, has_preview):
    """The row has its clip, and needs no preview."""
    output.open(rows("a"))
    (tracked,) = output.take()
    output.tracker.finish(tracked, CLIP, "{}")
    output.settle()
    output.close()
    if has_preview:
        raw, request = tracked.rows[0].raw, tracked.item.request
        output.writer.write_preview(tracked.item.item_id, request, raw, RENDERED)
    output.open(rows("b"), latents_only=True)
    assert output.take() == []
    output.settle()
    assert output.ids("index") == ["a", "b"] and output.tracker.counts == {"rows": 1, "rendered": 1}


def test_a_row_of_the_same_item_that_arrives_while_latents_are_being_saved(output):
    output.open(rows("a", "b"))
    (tracked,) = output.take(1)
    tracked.failure = CRASH
    assert output.take() == []
    output.tracker.fail(tracked, tracked.failure)
    output.settle()
    assert output.ids("failed") == ["a", "b"] and output.ids("index") == []


def test_the_results_of_a_finished_item_are_dropped(output):
    output.open(rows("a"))
    (tracked,) = output.take()
    tracked.payloads["stage1"] = object()
    output.tracker.finish(tracked, CLIP, "{}")
    assert not tracked.payloads


def test_illegal_rows_are_on_record_and_forgotten_when_they_are_legal(output):
    output.open([{"id": "a", "prompt": ""}, *rows("b")])
    assert [tracked.name for tracked in output.take()] == ["b"]
    output.settle()
    output.tracker.close(complete=True)
    assert output.ids("failed") == ["a"] and output.tracker.counts["illegal"] == 1
    assert "m.jsonl:1:prompt" in output.said.getvalue()
    output.close()
    output.open(rows("a", "b"))
    output.take()
    output.tracker.close(complete=False)
    assert output.ids("failed") == ["a"], "the rest of the manifest is unknown"
    output.tracker.close(complete=True)
    assert output.ids("failed") == []


def test_an_illegal_row_that_is_corrected_at_its_place_leaves_failed_when_it_is_done(output):
    """Also in a run that does not take all rows of the manifest. One that is illegal still stays."""
    output.open([{"id": "a", "prompt": ""}, {"prompt": ""}, {"id": "c", "prompt": ""}])
    output.take()
    output.settle()
    output.close()
    output.open([*rows("a"), {"prompt": "b"}, {"id": "c", "prompt": ""}])
    for tracked in output.take(2):
        output.tracker.finish(tracked, CLIP, "{}")
    output.settle()
    output.tracker.close(complete=False)
    assert output.ids("failed") == ["c"]


def gone(path):
    raise ImageOutOfReach(path, "nobody answers")


def test_a_row_whose_image_is_out_of_reach_failed_because_of_the_infrastructure(output):
    """The same command renders it, and its failure is gone, also when the run ends before its manifest does."""

    row = {"id": "a", "prompt": "a cat", "images": [{"path": "a.png"}], "note": 1}
    output.open([row, *rows("b")], builder=BuilderWithImages(gone))
    assert [tracked.name for tracked in output.take()] == ["b"]
    output.settle()
    output.close()
    tracker = output.tracker
    assert tracker.counts["failed"] == 1 == tracker.failures["infrastructure"] and not tracker.counts["illegal"]
    assert "a: failed in plan: " in output.said.getvalue() and "(nobody answers)" in output.said.getvalue()
    (failed,) = output.rows_of("failed")
    assert (failed["stage"], failed["error_class"], failed["item_id"]) == ("plan", "infrastructure", None)
    existing = list_existing(output.store)
    assert existing.failed_kinds == {"unread": 1} and not existing.has_noise, "its latents are nowhere"
    (again,) = read_manifest(f"{output.store.root}/failed")
    assert again.values["height"] == 1088 and again.values["note"] == 1, "its defaults stand in the row"
    output.open([row], builder=BuilderWithImages(lambda path: "d" * 32))
    (tracked,) = output.take()
    output.tracker.finish(tracked, CLIP, "{}")
    output.settle()
    output.tracker.close(complete=False)
    assert output.ids("failed") == [] and output.ids("index") == ["a"]


def test_a_failed_row_whose_image_is_then_out_of_reach_has_two_failures_until_it_is_done(output):
    """One says what became of its item, which may be the row's own fault, the other that nobody can tell whether it is
    still that item. A retry takes the row once.
    """

    reads = BuilderWithImages(lambda path: "d" * 32)
    row = {"id": "a", "prompt": "a cat", "images": [{"path": "a.png"}]}
    output.open([row], builder=reads)
    output.tracker.fail(output.take()[0], CRASH)
    output.settle()
    output.close()
    output.open([row], builder=BuilderWithImages(gone))
    output.take()
    output.close()
    assert sorted(row["stage"] for row in output.rows_of("failed")) == ["plan", "stage2"]
    existing = list_existing(output.store)
    assert existing.has_noise, "the latents of its item may be on some node"
    again = Plan(f"{output.store.root}/failed", RowRules(), reads, existing, retry_failed=True)
    assert sorted(planned.status for planned in again.open()) == [REPEATED, TODO]
    output.open([row], builder=reads)
    output.tracker.finish(output.take()[0], CLIP, "{}")
    output.settle()
    output.close()
    assert output.ids("failed") == [] and output.ids("index") == ["a"]


def test_a_row_that_is_done_has_no_failure_left_of_a_run_that_could_not_read_its_image(output):
    """Without its image, that run could not know that it was done. This one does not take all rows."""

    reads = BuilderWithImages(lambda path: "d" * 32)
    row = {"id": "a", "prompt": "a cat", "images": [{"path": "a.png"}]}
    output.open([row], builder=reads)
    (tracked,) = output.take()
    output.tracker.finish(tracked, CLIP, "{}")
    output.settle()
    output.close()
    output.open([row], builder=BuilderWithImages(gone))
    assert output.take() == []
    output.settle()
    output.close()
    assert output.ids("failed") == ["a"]
    output.open([row], builder=reads)
    assert output.take() == [] and output.tracker.counts["already_done"] == 1
    output.settle()
    output.tracker.close(complete=False)
    assert output.ids("failed") == [] and output.ids("index") == ["a"]


def test_a_retry_of_a_row_whose_image_was_out_of_reach_asks_for_the_clip_that_it_asked_for(output):
    reads = BuilderWithImages(lambda path: "d" * 32)
    row = {"id": "a", "prompt": "a cat", "images": [{"path": "a.png"}]}
    output.open([row], builder=reads, samples=2)
    before = [tracked.item.item_id for tracked in output.take()]
    output.open([row], builder=BuilderWithImages(gone), samples=2)
    output.take()
    output.settle()
    output.close()
    plan = Plan(f"{output.store.root}/failed", RowRules(), reads, list_existing(output.store), retry_failed=True)
    assert [planned.item_id for planned in plan.open()] == before and len(before) == 2


def test_a_row_of_another_manifest_ends_no_failure_though_it_has_the_same_id(output, tmp_path):
    """It may be another row. `ltx-ray remove --failures-only` is for those that were corrected there."""
    output.open([*rows("a"), {"id": "b", "prompt": ""}])
    (tracked,) = output.take()
    output.tracker.fail(tracked, CRASH)
    output.settle()
    output.close()
    output.folder = tmp_path / "other"
    output.folder.mkdir()
    output.open([*rows("a", prompt="a dog"), *rows("b", prompt="an owl")])
    for tracked in output.take():
        output.tracker.finish(tracked, CLIP, "{}")
    output.settle()
    output.tracker.close(complete=True)
    assert output.ids("failed") == output.ids("index") == ["a", "b"]


def test_many_illegal_rows_are_said_by_their_commonest_reasons(output):
    many = [{"id": f"r{n}", "prompt": "a", "height": 1080 if n % 3 else 1081, "seed": -n} for n in range(SHOWN + 200)]
    output.open(many)
    assert output.take(1000) == []
    output.settle()
    output.tracker.close(complete=True)
    said = output.said.getvalue()
    assert said.count(":height (r") == SHOWN and f"{SHOWN + 200} rows are illegal, all of them in failed/" in said
    assert "the commonest reasons: 300 of height: legal: " in said and "; 299 of seed: legal: " in said
    output.tracker.events.flush()
    assert output.store.read_bytes("events.jsonl").count(b"row_illegal") == SHOWN
    assert len(output.ids("failed")) == SHOWN + 200 and output.tracker.counts["illegal"] == SHOWN + 200
    assert len(output.store.list_names("failed")) == 1


def test_a_row_that_was_edited_leaves_its_older_failure_behind(output):
    output.open(rows("a"))
    (tracked,) = output.take()
    output.tracker.fail(tracked, CRASH)
    output.close()
    output.open(rows("a", prompt="a dog"))
    (tracked,) = output.take()
    output.tracker.finish(tracked, CLIP, "{}")
    output.settle()
    assert output.ids("index") == ["a"] and output.ids("failed") == []


def test_finished_and_failed_rows_of_an_earlier_run_are_counted(output):
    output.open([*rows("a"), *rows("b", prompt="a dog")])
    cat, dog = output.take()
    output.tracker.finish(cat, CLIP, "{}")
    output.tracker.fail(dog, Failure("stage1", 1, "row", "not finite"))
    output.close()
    output.open([*rows("a", "a"), *rows("b", prompt="a dog")])
    assert output.take() == []
    assert output.tracker.counts == {"rows": 2, "already_done": 1, "failed": 1}


def test_no_row_is_half_written_when_the_publisher_closes_without_finishing(output):
    output.open(rows("a", "b", "c", "d"))
    (tracked,) = output.take()
    output.writer.go.clear()
    output.tracker.finish(tracked, CLIP, "{}")
    output.tracker.publisher.poll(flush=True)
    assert output.writer.begun.wait(120)
    closing = threading.Thread(target=output.tracker.publisher.close, args=(False,))
    closing.start()
    output.writer.go.set()
    closing.join(120)
    written = output.ids("index")
    assert 1 <= len(written) <= 4 and output.tracker.counts["rendered"] == 0
    output.open(rows("a", "b", "c", "d"))
    assert output.take() == [], "the rest are copies"
    output.settle()
    assert output.ids("index") == ["a", "b", "c", "d"]


def test_rows_whose_images_are_still_being_read_are_not_waited_for(output, monkeypatch):
    ready = True
    monkeypatch.setattr(Plan, "next_is_ready", property(lambda plan: ready))
    tracker = output.open(rows("a", "b", "c")).tracker
    assert len(output.take(1)) == 1 and not tracker.waits_for_images
    ready = False
    assert tracker.waits_for_images and list(tracker.take(output.rows, 2, wait=False)) == []
    assert [planned.id for planned in tracker.items[next(iter(tracker.items))].rows] == ["a"]
    assert output.take(5) == [], "the same item"
    assert [planned.id for planned in tracker.items[next(iter(tracker.items))].rows] == ["a", "b"], (
        "only one is waited for"
    )
    ready = True
    output.take(5)
    assert tracker.exhausted and not tracker.waits_for_images
