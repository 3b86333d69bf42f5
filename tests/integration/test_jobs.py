"""`ray job submit` of jobs/render.py on a real local head, as in the README."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ltx_ray.cli.status import status_lines
from ltx_ray.dataset.clip_rate import rate_text

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def test_submitted_job_renders_parquet_prompts(tmp_path):
    import pyarrow as pa

    rows = [
        {"id": f"p{n}", "prompt": f"prompt {n}", "height": 64, "width": 64 * (n + 1), "num_frames": 9, "seed": n}
        for n in range(2)
    ]
    rows = [{**row, "num_inference_steps": 2} for row in rows]
    rows.append({**rows[0], "id": "bad", "width": 100})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "prompts.parquet")
    out = tmp_path / "out"
    command = [
        str(ROOT / "cluster" / "local"), "--num-cpus", "6", "--",
        str(Path(sys.executable).parent / "ray"), "job", "submit", "--",
        sys.executable, str(ROOT / "jobs" / "render.py"), str(tmp_path / "prompts.parquet"),
        "--output", str(out), "--model", "toy", "--stage2-replicas", "0",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1200, env={**os.environ, "LTX_RAY_PYTHON": sys.executable}
    )
    log = done.stdout + done.stderr
    assert "prompts.parquet:3:width (bad): 100, legal: a positive multiple of 64" in log, log
    # Ray reports the job's exit code 3 as its own 1.
    assert done.returncode == 1 and "exit code 3" in log, log
    run = json.loads((out / "run.json").read_text())
    assert run["state"] == "finished"
    assert run["counts"] == {"rows": 3, "rendered": 2, "already_done": 0, "failed": 0, "illegal": 1}
    # The last line, `status` and the report say the rate of the record.
    began, ended = (datetime.fromisoformat(run[name]) for name in ("started_at", "finished_at"))
    assert run["clips"] == 2
    assert run["clips_per_hour"] == pytest.approx(2 / (ended - began).total_seconds() * 3600)
    rate = rate_text(run["clips_per_hour"])
    assert f"finished: 3 rows, 2 rendered ({rate}), 1 illegal" in log, log
    assert status_lines(str(out))[-1] == rate and rate in (out / "report.html").read_text()
    index = pq.read_table(out / "index").to_pylist()
    assert {row["id"] for row in index} == {"p0", "p1"}
    assert all((out / row["clip"]).stat().st_size > 1000 for row in index)
    assert "http://" not in (out / "report.html").read_text()
