"""docs/failure-model.md: its tests and exit codes exist. Also tests of failures that no other file covers."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ltx_ray import run as runs
from ltx_ray.config import EngineSpec, ModelFiles, Numerics, PoolSpec
from ltx_ray.dataset.thumbnails import FrameSheet
from ltx_ray.driver import signals
from ltx_ray.driver.calls_under_way import CallsUnderWay
from ltx_ray.driver.last_report import write_last_report
from ltx_ray.driver.progress import Progress
from ltx_ray.driver.publisher import Publisher
from ltx_ray.engine import codec
from ltx_ray.engine.base import Rank
from ltx_ray.engine.decode import DecodeEngine
from ltx_ray.engine.diffusion import DiffusionEngine
from ltx_ray.engine.frames import PictureCheck
from ltx_ray.engine.tiling import LADDER
from ltx_ray.parallel.mesh import Mesh
from ltx_ray.pools.gang import Call, Gang, GangState
from ltx_ray.pools.pool import StartFailed
from ltx_ray.pools.protocol import RankInfo
from ltx_ray.records import (
    AV,
    CallError,
    CallReport,
    EngineFacts,
    ErrorKind,
    NoiseLedger,
    RenderError,
    RowError,
    StageLatents,
)
from ltx_ray.shapes import AUDIO_SAMPLE_RATE
from ltx_ray.stages import Stage
from ltx_ray.storage.store import Store
from tests.support.datasets import rows_in
from tests.support.schedules import SECONDS, SPEC, Stages, WatchedReplicas
from tests.support.simulated_runs import pools, rows, run

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "failure-model.md").read_text()
REFERENCE = re.compile(r"`([\w/]+\.py)::(\w+)`")


def tables() -> list[list[str]]:
    """The cells of every row, without the heads of the tables."""
    lines = [line for line in TEXT.splitlines() if line.startswith("|")]
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [cells for cells in found if cells[-1] not in ("test", "what to do") and set(cells[0]) != {"-", " "}]


def test_every_event_names_its_tests_or_says_that_it_has_none():
    events = [cells for cells in tables() if not re.match(r"\d", cells[0]) and "---" not in cells[0]]
    assert len(events) > 70 and all(len(cells) == 3 for cells in events)
    for *_, tests in events:
        assert tests == "no test" or ", ".join(f"`{a}::{b}`" for a, b in REFERENCE.findall(tests)) == tests


@pytest.mark.parametrize("file", sorted({file for file, _ in REFERENCE.findall(TEXT)}))
def test_the_tests_are_there(file):
    tree = ast.parse((ROOT / "tests" / file).read_text())
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert {name for path, name in REFERENCE.findall(TEXT) if path == file} <= defined


def test_exit_codes_are_the_codes():
    codes = set(runs.ExitCode)
    section = TEXT.partition("## Exit codes")[2]
    assert {int(code) for code in re.findall(r"^\| (\d) \|", section, re.MULTILINE)} == codes == set(range(5))
    assert "os._exit(128 + number)" in Path(signals.__file__).read_text()


# --- failures that no other file covers ------------------------------------------------------------------------


def stage(video: torch.Tensor) -> StageLatents:
    return StageLatents(AV(video, torch.zeros(2)), NoiseLedger(0, "cpu", "cpu"))


def test_latents_that_are_not_finite_are_the_rows_fault():
    engine = object.__new__(DiffusionEngine)
    engine.mesh = Mesh()
    engine._stage1 = lambda item, conditions: stage(torch.tensor([0.0, float("nan"), float("inf")]))
    with pytest.raises(RowError, match="2 of 3 video latents are not finite"):
        engine.run("stage1", None, None)


@pytest.fixture
def decoder(monkeypatch) -> DecodeEngine:
    engine = DecodeEngine(EngineSpec("", ModelFiles("", "", ""), Numerics(dtype="float32"), ""), Rank())
    engine.audio_vae = engine.vocoder = engine.video_vae = None
    monkeypatch.setattr("ltx_ray.engine.decode.write_mp4", lambda target, frames, **rest: list(frames))
    return engine


def test_frames_that_are_not_finite_are_the_rows_fault(decoder, monkeypatch):
    chunk = torch.full((1, 3, 2, 4, 4), float("nan"))
    monkeypatch.setattr("ltx_ray.engine.decode.decode_tiled", lambda *_: iter([chunk]))
    with pytest.raises(RowError, match="decoded frames are not finite"):
        list(decoder._frames(torch.zeros(1), LADDER[0], PictureCheck(), FrameSheet(9)))


def test_sound_that_is_not_finite_is_the_rows_fault(decoder, monkeypatch):
    monkeypatch.setattr(codec, "decode_audio", lambda *_: (torch.full((2, 9), float("nan")), AUDIO_SAMPLE_RATE))
    with pytest.raises(RowError, match="the decoded sound is not finite"):
        decoder._sound(torch.zeros(1), 9)


def test_a_prompt_that_was_cut_is_flagged(tmp_path):
    class Cut(WatchedReplicas):
        def wait(self, timeout):
            events = super().wait(timeout)
            for at, event in enumerate(events):
                if self.driver.policy.items_of(event.replica) and event.report.ok:
                    facts = EngineFacts(prompt_truncated=True)
                    events[at] = replace(event, report=replace(event.report, facts=facts))
            return events

    driver, store = run(tmp_path, rows(1), Cut)
    driver.run(driver.tracker.plan.open())
    assert [row["flags"] for row in table(store, "index")] == [["prompt_truncated"]]


def table(store: Store, folder: str) -> list[dict]:
    import pyarrow.parquet as pq

    return [
        row for name in store.list_names(folder) for row in pq.read_table(store.path(f"{folder}/{name}")).to_pylist()
    ]


def events(store: Store, kind: str) -> list[dict]:
    lines = map(json.loads, store.read_bytes("events.jsonl").decode().splitlines())
    return [event for event in lines if event["event"] == kind]


def test_a_rank_that_failed_alone_is_not_waited_for():
    gang = object.__new__(Gang)
    gang.state, gang.ranks = GangState.READY, [RankInfo(n, address="1.2.3.4", device="cpu") for n in range(2)]
    failed = CallReport(0.0, 0.0, error=CallError(ErrorKind.UNKNOWN, "RuntimeError", "no kernel"))
    call = Call(
        Stage.STAGE1, None, [], timeout=1000.0, reports=[None, None], started=100.0, done={1: failed}, failed_at=105.0
    )
    gang.calls, gang._pings = [call], []
    assert gang.overdue(114.0, 1.0) is None
    lost = gang.overdue(116.0, 1.0)
    assert str(lost) == "rank 1 on node 1.2.3.4 (cpu) failed alone during stage1: RuntimeError: no kernel"


def test_a_placed_gang_has_so_long_to_start():
    gang = object.__new__(Gang)
    gang.state, gang._placed = GangState.LOADING, 100.0
    assert gang.overdue(109.0, 10.0) is None
    assert str(gang.overdue(111.0, 10.0)) == "not ready after 10 s (loading)"
    gang.state = GangState.PLACING
    assert gang.overdue(9999.0, 10.0) is None, "finding a place is the cluster's doing"


class BrokenProcess(RenderError):
    kind = ErrorKind.PROCESS


def test_a_gang_is_replaced_after_an_error_that_leaves_its_state_unknown(tmp_path):
    """tests/unit/engine/test_base.py says which errors do."""
    driver, store = run(tmp_path, rows(1))
    stages, fail = Stages(store), [True]

    def make(stage, item, *inputs):
        if stage == "stage1" and fail:
            fail.clear()
            raise BrokenProcess("told to fail")
        return stages(stage, item, *inputs)

    driver._join_cluster().replicas.make = make
    driver.run(driver.tracker.plan.open())
    driver.events.flush()
    (row,) = table(store, "index")
    assert row["attempts"] == 2 and row["stage1_replica"] == "stage1-1"
    (lost,) = events(store, "gang_lost")
    assert "BrokenProcess: told to fail" in lost["reason"]


def test_an_index_that_cannot_be_written_ends_the_run(tmp_path):
    """It ends once the retries are used up; rows that are finished and published stay."""
    driver, store = run(tmp_path, rows(1))
    driver.tracker.writer.write_index = lambda *_: (_ for _ in ()).throw(OSError("the store cannot be reached"))
    with pytest.raises(OSError, match="the store cannot be reached"):
        driver.run(driver.tracker.plan.open())
    assert len(store.list_names("clips", recursive=True)) == 1 and not rows_in(store, "index")
    assert runs._OUTPUT_RETRY_SECONDS == 600


def test_a_report_that_fails_costs_no_exit_code(tmp_path, monkeypatch, capsys):
    def fails(place):
        raise RuntimeError("no pictures")

    monkeypatch.setattr("ltx_ray.dataset.report.write_report", fails)
    write_last_report(Store(str(tmp_path)), 1, Progress().say)
    assert "report.html was not written: no pictures" in capsys.readouterr().err


def test_a_run_that_lost_its_lease_drains(tmp_path):
    decoded = []

    class Watched(WatchedReplicas):
        def submit(self, replica, stage, item, inputs, timeout):
            super().submit(replica, stage, item, inputs, timeout)
            if stage == "decode":
                decoded.append(item)

    driver, store = run(tmp_path, rows(30), Watched, queue_depth=1)
    driver._should_stop = lambda: "another run has taken over" if len(decoded) > 2 else None
    assert driver.run(driver.tracker.plan.open())
    assert 3 <= len(rows_in(store, "index")) == len(decoded) < 10 and not rows_in(store, "failed")


def test_a_drain_that_leaves_nothing_is_a_finished_run(tmp_path):
    class Last(WatchedReplicas):
        def submit(self, replica, stage, item, inputs, timeout):
            super().submit(replica, stage, item, inputs, timeout)
            if stage == "decode":
                self.driver.request_drain("SIGTERM")

    driver, store = run(tmp_path, rows(1), Last)
    assert not driver.run(driver.tracker.plan.open())
    assert len(rows_in(store, "index")) == 1


def test_no_rows_are_taken_while_too_many_are_being_written(tmp_path):
    driver, _ = run(tmp_path, rows(3))
    for pending, taken in ((Publisher.FULL, 0), (Publisher.FULL - 1, 3)):
        driver.tracker.publisher = SimpleNamespace(pending=pending)
        driver._admit(driver.tracker.plan.open())
        assert driver.policy.in_flight == taken


def test_gpu_hours_that_are_used_up_drain_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LTX_RAY_FINAL_FILE", str(tmp_path / "final"))
    cards = [PoolSpec(p.name, p.roles, p.replicas, p.ranks, SPEC, gpus_per_rank=1.0) for p in pools()]
    driver, store = run(tmp_path, rows(30), the_pools=cards, max_gpu_hours=0.1)
    assert driver.run(driver.tracker.plan.open())
    # 65 s per clip; what was under way is finished as far as the decode pool had it
    assert 1 <= len(rows_in(store, "index")) <= 6 and not rows_in(store, "failed")
    driver.events.flush()
    (drain,) = events(store, "drain")
    assert drain["reason"].endswith("GPU hours reserved, 0.00 of them by earlier runs (--max-gpu-hours)")
    assert (tmp_path / "final").read_text() == drain["reason"], "for ltx-ray supervise"
    assert not events(store, "gang_given_back")


def test_a_row_has_the_gpu_seconds_of_calls_that_never_came_back(tmp_path):
    cards = [PoolSpec(p.name, p.roles, p.replicas, 2, SPEC, gpus_per_rank=0.5) for p in pools()]

    lost = []

    class CrashesOnce(WatchedReplicas):
        def fault(self, stage, item):
            return "crash" if stage == "stage2" and not lost else None

        def submit(self, replica, stage, item, inputs, timeout):
            self.submitted = self.now
            super().submit(replica, stage, item, inputs, timeout)

        def _gone(self, *call, **how):
            lost.append(self.now - self.submitted)
            return super()._gone(*call, **how)

    driver, store = run(tmp_path, rows(1), CrashesOnce, the_pools=cards)
    driver._calls = CallsUnderWay(lambda: driver._replicas.now)
    assert not driver.run(driver.tracker.plan.open())
    (row,) = rows_in(store, "index")
    calls = sum(SECONDS[stage] for stage in ("text", "stage1", "stage2", "decode"))
    assert row["attempts"] == 2 and len(lost) == 1 and lost[0] > 0
    assert row["gpu_seconds"] == pytest.approx(calls + lost[0])


def test_gpu_hours_of_earlier_runs_count(tmp_path):
    driver, store = run(tmp_path, rows(3), max_gpu_hours=0.1)
    driver._gpu_seconds_before = 400.0
    assert driver.run(driver.tracker.plan.open()) and not rows_in(store, "index")
    driver.events.flush()
    (drain,) = events(store, "drain")
    assert drain["reason"] == "0.11 GPU hours reserved, 0.11 of them by earlier runs (--max-gpu-hours)"


def test_a_call_has_a_multiple_of_the_time_that_such_calls_take(tmp_path):
    """The first ones have --call-timeout, since nothing is known yet."""
    seen = []

    class Watched(WatchedReplicas):
        def submit(self, replica, stage, item, inputs, timeout):
            seen.append((str(stage), timeout))
            super().submit(replica, stage, item, inputs, timeout)

    driver, _ = run(tmp_path, rows(6), Watched, call_timeout=7000.0)
    driver.run(driver.tracker.plan.open())
    timeouts = [timeout for stage, timeout in seen if stage == "stage1"]
    assert timeouts[:2] == [7000.0, 7000.0] and timeouts[-1] == pytest.approx(8 * SECONDS["stage1"])
    assert {timeout for stage, timeout in seen if stage == "text"} == {7000.0, 300.0}, "at least five minutes"


def test_a_preflight_that_fails_ends_the_run(tmp_path):
    preflight = {"prompt": "[[stage2:crash]]"}
    driver, store = run(tmp_path, rows(3), preflight=preflight, the_pools=pools(2), max_attempts=2)
    with pytest.raises(StartFailed, match="preflight: stage2: rank 0 died"):
        driver.run(driver.tracker.plan.open())
    assert not rows_in(store, "failed")


def test_the_bound_on_results_in_flight_follows_the_cluster(tmp_path):
    driver, _ = run(tmp_path, rows(1))
    now, size = [0.0], [100.0]
    driver._clock = lambda: now[0]
    driver._cluster = SimpleNamespace(max_bytes=lambda: size[0])
    seen = []
    for second, size[0] in ((0.0, 100.0), (20.0, 200.0), (31.0, 300.0)):
        now[0] = second
        driver._follow_memory()
        seen.append(driver.policy.max_bytes)
    assert seen == [100.0, 100.0, 300.0]
