"""A driver killed, a driver asked to stop, a rank killed: nothing is lost and nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DRIVER = """
import sys
from ltx_ray.config import ModelFiles
from ltx_ray.pools.pool import Wanted
from ltx_ray.run import Options, render
fake = {name: "ltx_ray.engine.fake:FakeEngine" for name in ("text", "diffusion", "decode")}
model = ModelFiles("", "", "", provider="ltx_ray.toy:ensure_toy_model")
sys.exit(render(Options(sys.argv[1], sys.argv[2], model, wanted=Wanted(stage1=1, stage2=0), engines=fake)))
"""
COUNT = 8


@pytest.fixture
def job(tmp_path):
    rows = [
        {"id": f"r{n}", "prompt": "[[stage1:slow:0.5]]", "seed": n, "height": 64, "width": 64, "num_frames": 9}
        for n in range(COUNT)
    ]
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    started = []

    def start() -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(manifest), str(tmp_path / "out")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start, tmp_path / "out"
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def events(out: Path, kind: str) -> list[dict]:
    try:
        lines = (out / "events.jsonl").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # cut off by the kill
        if event["event"] == kind:
            found.append(event)
    return found


def index(out: Path) -> dict[str, dict]:
    rows = [pq.read_table(p).to_pylist()[0] for p in (out / "index").glob("part-*.parquet")]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def wait_for(condition, seconds: float = 90):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)
    return value


def finish(process: subprocess.Popen, code: int) -> str:
    log = process.communicate(timeout=120)[0]
    assert process.returncode == code, log
    return log


def test_a_killed_driver_is_followed_by_one_that_goes_on(job):
    start, out = job
    first = start()
    wait_for(lambda: (out / "index").is_dir() and len(list((out / "index").glob("part-*"))) >= 3)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = index(out)
    assert 3 <= len(before) < COUNT
    finish(start(), 0)
    after = index(out)
    assert set(after) == {f"r{n}" for n in range(COUNT)}
    assert {name: after[name]["finished_at"] for name in before} == {n: r["finished_at"] for n, r in before.items()}
    assert not {e["id"] for e in events(out, "call")} & set(before)
    assert [p.name for p in out.glob("clips/*/.*")] == []


def test_a_sigterm_drains_and_the_same_command_goes_on(job):
    start, out = job
    first = start()
    wait_for(lambda: len(events(out, "item_finished")) >= 2)
    first.send_signal(signal.SIGTERM)
    assert "draining: SIGTERM" in finish(first, 4)
    assert json.loads((out / "run.json").read_text())["state"] == "drained"
    before = index(out)
    assert 2 <= len(before) < COUNT
    assert not (out / "_lease.json").exists()
    finish(start(), 0)
    assert len(index(out)) == COUNT
    assert len(list((out / "runs").iterdir())) == 1


def test_a_killed_rank_is_replaced(job):
    start, out = job
    first = start()
    gang = wait_for(lambda: [e for e in events(out, "gang_started") if e["role"] == "diffusion"])[0]
    wait_for(lambda: len(events(out, "item_finished")) >= 1)
    os.kill(gang["ranks"][0]["pid"], signal.SIGKILL)
    finish(first, 0)
    rows = index(out)
    assert len(rows) == COUNT
    assert {row["stage1_replica"] for row in rows.values()} >= {"diffusion-1"}
    assert [e["replica"] for e in events(out, "gang_lost")] == ["diffusion-0"]
    assert sum(row["attempts"] - 1 for row in rows.values()) <= 1


def test_two_drivers_on_one_output_take_turns(job):
    start, out = job
    first, second = start(), start()
    logs = [finish(first, 0), finish(second, 0)]
    assert len(index(out)) == COUNT
    assert sum("is in use by run" in log for log in logs) == 1
    assert any(f"0 rendered, {COUNT} done before" in log for log in logs)
