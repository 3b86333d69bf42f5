"""A run's metrics say what its counts, queues and pools say, and count nothing twice."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from ltx_ray.config import Selection
from ltx_ray.dataset import layout
from ltx_ray.dataset.existing import list_existing
from ltx_ray.dataset.writer import Failure
from ltx_ray.driver.run_gauges import replica_states, row_states, tflop_left
from ltx_ray.driver.run_metrics import METRICS
from ltx_ray.manifest.rules import RowProblem, RowRules
from ltx_ray.planning.plan import Plan
from ltx_ray.planning.promotion import promoted
from ltx_ray.pools.pool import Pool, StartFailed
from ltx_ray.storage.requests import REQUESTS
from tests.support.checkpoint_files import RELEASED
from tests.support.metrics_of_runs import RecordedMetrics
from tests.support.samples import request
from tests.support.schedules import SECONDS, HashingBuilder, WatchedReplicas
from tests.support.simulated_runs import pools, rows, run


def told(driver) -> dict[tuple[str, ...], float]:
    return driver.tracker.metrics.values


def test_metrics_of_a_whole_run(tmp_path):
    bad = {"id": "bad", "prompt": "x", "width": 100}
    lost = {"id": "lost", "prompt": "a [[stage2:error]]"}
    twin = {**rows(1)[0], "id": "twin"}
    driver, _ = run(tmp_path, [*rows(4), twin, bad, lost])
    assert not driver.run(driver.tracker.plan.open())
    values, counts = told(driver), driver.counts
    assert counts == {"rows": 7, "rendered": 5, "failed": 1, "illegal": 1}
    states = {state: n for (name, *labels), n in values.items() if name == "ltx_ray_rows" for state in labels}
    assert states == {
        "rendered": 5, "done_before": 0, "failed_row": 1, "failed_infrastructure": 0, "failed_before": 0, "illegal": 1,
        "removed": 0, "expected": 7,
    }  # fmt: skip
    assert values["ltx_ray_clips",] == 4, "rows that share a clip have one"
    assert values["ltx_ray_stage_calls", "decode", "true"] == 4
    assert values["ltx_ray_stage_seconds", "stage1", "true"] == pytest.approx(5 * SECONDS["stage1"])
    assert values["ltx_ray_stage_calls", "stage2", "false"] == 3, "the attempts at the row that fails"
    assert values["ltx_ray_call_seconds", "decode"] == 4 and values["ltx_ray_call_seconds", "stage2"] == 4
    assert values["ltx_ray_events", "item_finished"] == 5 and values["ltx_ray_events", "row_illegal"] == 1
    assert {values["ltx_ray_queue", stage] for stage in ("text", "stage1", "stage2", "decode")} == {0}
    assert values["ltx_ray_inflight_bytes",] == 0 == values["ltx_ray_publish_backlog",]
    assert values["ltx_ray_tflop_left",] == pytest.approx(0, abs=1e-6) and values["ltx_ray_tflop_done",] > 0
    assert 0 < values["ltx_ray_driver_memory_bytes",] < values["ltx_ray_driver_memory_limit_bytes",]


def test_every_metric_has_its_labels_and_is_told(tmp_path):
    driver, _ = run(tmp_path, rows(3), max_gpu_hours=5.0)
    driver.run(driver.tracker.plan.open())
    found = {name for name, *_ in told(driver)}
    # Nothing waits, is lost, has a GPU or asks an object store here, and the time that is left is not known.
    missing = METRICS.keys() - found
    assert missing <= {"ltx_ray_waited_seconds", "ltx_ray_gpu_busy_seconds", "ltx_ray_gpu_reserved_seconds",
                       "ltx_ray_gangs_lost", "ltx_ray_store_requests", "ltx_ray_seconds_left"}  # fmt: skip


def test_lost_replicas_are_told_by_what_has_ended_them(tmp_path):
    faults = {"stage1": "out_of_memory", "stage2": "hang", "decode": "crash"}
    rendered = [{"id": stage, "prompt": f"a [[{stage}:{fault}]]"} for stage, fault in faults.items()]
    driver, store = run(tmp_path, rendered, max_attempts=2)
    driver.run(driver.tracker.plan.open())
    lost = {tuple(labels): n for (name, *labels), n in told(driver).items() if name == "ltx_ray_gangs_lost"}
    assert lost == {("stage1", "oom"): 2, ("stage2", "timeout"): 2, ("decode", "rank"): 2}
    events = [json.loads(line) for line in store.read_bytes("events.jsonl").splitlines()]
    assert Counter((e["role"], e["cause"]) for e in events if e["event"] == "gang_lost") == lost


def test_cards_are_told_by_pool(tmp_path):
    on_cards = [replace(spec, gpus_per_rank=0.5 * (spec.name != "text")) for spec in pools()]
    driver, _ = run(tmp_path, rows(3), the_pools=on_cards)
    driver.run(driver.tracker.plan.open())
    by_pool = {labels[0]: n for (name, *labels), n in told(driver).items() if name == "ltx_ray_gpu_reserved_seconds"}
    assert by_pool.keys() == {"stage1", "stage2", "decode"}
    assert sum(by_pool.values()) == pytest.approx(driver.gpu_seconds()) and min(by_pool.values()) > 0


def test_calls_are_told_however_the_run_ends(tmp_path):
    class Fails(WatchedReplicas):
        def wait(self, timeout):
            if self.now > 100:
                raise StartFailed("no replica starts any more")
            return super().wait(timeout)

    driver, _ = run(tmp_path, rows(9), Fails)
    with pytest.raises(StartFailed):
        driver.run(driver.tracker.plan.open())
    values = told(driver)
    assert values["ltx_ray_stage_calls", "stage1", "true"] == values["ltx_ray_call_seconds", "stage1"] > 0


def test_a_run_that_ends_as_it_joins_its_cluster_has_its_gpu_time_in_the_record(tmp_path):
    driver, _ = run(tmp_path, rows(1))
    joined = driver._join_cluster()

    def gone() -> float:
        raise OSError("the cluster does not answer")

    driver._join_cluster = lambda: replace(joined, max_bytes=gone)
    with pytest.raises(OSError, match="does not answer"):
        driver.run(driver.tracker.plan.open())
    assert driver.gpu_seconds() == joined.replicas.gpu_seconds()


def test_requests_to_stores_are_told_once(tmp_path):
    """Those of this process, and of ranks whose reports have arrived."""
    driver, _ = run(tmp_path, rows(3))
    REQUESTS.take()
    REQUESTS.count("writing", "error")
    REQUESTS.add([("writing", "ok", 5), ("looking up", "missing", 2)])
    driver.run(driver.tracker.plan.open())
    found = {tuple(labels): n for (name, *labels), n in told(driver).items() if name == "ltx_ray_store_requests"}
    assert found == {("writing", "error"): 1, ("writing", "ok"): 5, ("looking up", "missing"): 2}


def test_a_counter_grows_by_what_was_added_elsewhere_and_never_falls():
    metrics = RecordedMetrics()
    for total in (0, 3, 3, 2, 5):
        metrics.reach("ltx_ray_clips", total)
    assert metrics.values == {("ltx_ray_clips",): 5}


def test_replicas_by_state():
    pool = Pool(pools(4)[1], max_failures=3)
    names = pool.missing()
    pool.started(names[0])
    pool.started(names[1])
    found = replica_states(pool, placing={names[3]: 1.0}, busy={names[1]})
    assert found == Counter({"idle": 1, "busy": 1, "starting": 1, "placing": 1})


def test_rows_that_are_not_read_yet_are_left(tmp_path):
    driver, _ = run(tmp_path, rows(10))
    tracker = driver.tracker
    planned = tracker.plan.open()
    assert tflop_left(tracker) is None
    list(tracker.take(planned, 4))
    each = tracker.plan.work.total.tflop / tracker.plan.counts["clips"]
    assert tflop_left(tracker) is None, "nobody knows how many rows there are"
    tracker.plan.manifest_rows = 10
    assert tflop_left(tracker) == pytest.approx(tracker.plan.work.total.tflop + 6 * each)
    assert row_states(tracker)["expected"] == 10


def test_previews_that_a_promotion_leaves_out_or_refuses_are_no_work(tmp_path):
    wanted = []
    for row in ({"id": "a", "prompt": "old"}, {"id": "a", "prompt": "new"}, {"id": "b", "prompt": "no latents"}):
        driver, store = run(tmp_path, [row], latents_only=True)
        driver.run(driver.tracker.plan.open())
        wanted.append(HashingBuilder().item(request(**row)).item_id)
    store.write_bytes(layout.latents_path(wanted[1]), b"")
    plan = Plan(
        f"{store.root}/previews", RowRules(), HashingBuilder(), list_existing(store),
        selection=Selection(ids=frozenset({"a", "b"})), promote=frozenset(wanted[1:]),
    )  # fmt: skip
    tracker = run(tmp_path, [])[0].tracker
    tracker.plan = plan
    [taken] = tracker.take(promoted(plan.open(), plan), 10)
    assert taken.item.item_id == wanted[1] and tracker.counts == {"rows": 2, "illegal": 1}
    assert tflop_left(tracker) == pytest.approx(taken.rows[0].estimate(RELEASED).tflop)


def test_a_clip_that_is_given_up_is_left_no_more_however_many_rows_ask_for_it(tmp_path):
    """Nor is one that the run's cards cannot hold. Clips of another size cost what they cost."""
    twins = [{"id": f"t{n}", "prompt": "twins", "num_frames": 9} for n in range(3)]
    driver, _ = run(tmp_path, [*twins, *rows(2), {"id": "huge", "prompt": "huge"}])
    tracker = driver.tracker
    small, first, _, huge = tracker.take(tracker.plan.open(), 10)
    assert next(tracker.take(iter(()), 1), None) is None and tracker.exhausted
    each = first.rows[0].estimate(RELEASED).tflop
    assert 0 < small.rows[0].estimate(RELEASED).tflop < each
    tracker.fail(small, Failure("stage2", 3, "row", "no"))
    tracker.refuse(huge, RowProblem("num_frames", 121, "fewer"))
    tracker.publisher.close(finish=True)
    assert tracker.failures == {"row": 3}
    assert tflop_left(tracker) == pytest.approx(2 * each)
