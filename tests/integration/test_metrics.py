"""Prometheus' endpoint of a real node, read while a real run goes on."""

from __future__ import annotations

import json
import threading

import pytest

from tests.support.local_cluster import wait_for
from tests.support.runner import Runner
from tests.support.scraped_metrics import values

pytestmark = pytest.mark.slow


def test_the_endpoint_says_what_the_run_does(runner: Runner):
    seen: list[dict[tuple[str, ...], float]] = []
    ended = threading.Event()

    def run_id() -> str:
        record = runner.output / "run.json"
        return json.loads(record.read_text())["run_id"] if record.exists() else ""

    def scrape() -> None:
        while not ended.wait(1.0):
            seen.append(values(run_id()))

    rows = [{"id": f"r{n}", "prompt": f"[[stage1:slow:8]] {n}", "seed": n, "height": 64, "width": 64, "num_frames": 9}
            for n in range(3)]  # fmt: skip
    rows.append({**rows[0], "id": "bad", "width": 100})
    scraping = threading.Thread(target=scrape)
    scraping.start()
    try:
        assert runner.render(rows, stage1=1, stage2=1) == 3
    finally:
        ended.set()
        scraping.join()
    during = [found for found in seen if found.get(("ltx_ray_replicas", "stage1", "busy")) == 1.0]
    assert during and during[0]["ltx_ray_rows", "illegal"] == 1.0, "the run is seen while it goes on"
    run, last = json.loads((runner.output / "run.json").read_text()), {}

    def all_there() -> bool:
        last.update(values(run["run_id"]))
        return last.get(("ltx_ray_clips_total",)) == run["clips"] == 3

    wait_for(all_there, lambda: f"three clips in {last}", 60)
    assert last["ltx_ray_rows", "rendered"] == 3.0 and last["ltx_ray_rows", "illegal"] == 1.0
    assert last["ltx_ray_stage_calls_total", "stage1", "true"] == 3.0, "the preflight clip does not count"
    calls = [event for event in runner.events() if event["event"] == "call" and event["stage"] == "stage1"]
    assert last["ltx_ray_stage_seconds_total", "stage1", "true"] == pytest.approx(
        sum(c["seconds"] for c in calls), abs=0.01
    )
    buckets = {
        float(bound): n for (name, *labels), n in last.items() if name.endswith("call_seconds_bucket")
        for stage, bound in [labels] if stage == "stage1"
    }  # fmt: skip
    shortest = min(c["seconds"] for c in calls)
    assert buckets[float("inf")] == 3.0 and max(bound for bound, n in buckets.items() if n == 0) <= shortest
    assert min(bound for bound, n in buckets.items() if n == 3) < 1.27 * max(c["seconds"] for c in calls)
    assert last["ltx_ray_events_total", "item_finished"] == 3.0
    assert last["ltx_ray_driver_busy_seconds_total",] > 0
    assert 0 < last["ltx_ray_driver_memory_bytes",] < last["ltx_ray_driver_memory_limit_bytes",]
