"""`ray job submit` of jobs/render.py on a real local head, as in the README, and of a render that is killed."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from datetime import datetime

import pyarrow.parquet as pq
import pytest

from ltx_ray.cli.status import status_lines
from ltx_ray.config import RequestedNumerics
from ltx_ray.dataset.clip_rate import rate_text
from ltx_ray.placement.sizing import ParallelConfig
from ltx_ray.run import Options
from tests.support.local_cluster import DRIVER, FAKE, MODEL, Job, rows, undisturbed, wait_for
from tests.support.local_head import RAY, ROOT, LocalHead

pytestmark = pytest.mark.slow


def test_submitted_job_renders_parquet_prompts(tmp_path):
    import pyarrow as pa

    prompts = [
        {"id": f"p{n}", "prompt": f"prompt {n}", "height": 64, "width": 64 * (n + 1), "num_frames": 9, "seed": n}
        for n in range(2)
    ]
    prompts = [{**row, "num_inference_steps": 2} for row in prompts]
    prompts.append({**prompts[0], "id": "bad", "width": 100})
    pq.write_table(pa.Table.from_pylist(prompts), tmp_path / "prompts.parquet")
    out = tmp_path / "out"
    command = [
        str(ROOT / "cluster" / "local"), "--num-cpus", "6", "--",
        RAY, "job", "submit", "--",
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


@pytest.mark.parametrize("token", ["with a token", "without a token"])
def test_a_render_that_is_killed_and_submitted_again_loses_and_doubles_nothing(token, tmp_path):
    head = LocalHead(**({} if token == "with a token" else {"RAY_AUTH_MODE": "disabled"}))
    job = Job(head, tmp_path)
    manifest = rows("first", "[[stage2:gate]] second", "[[stage1:gate]] third")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in manifest))
    options = Options(
        str(tmp_path / "rows.jsonl"), str(job.out.folder), MODEL, RequestedNumerics(),
        ParallelConfig(stage1=1, stage2=1, text=1, decode=1), preflight=False, engines=FAKE,
    )  # fmt: skip
    (tmp_path / "options.pickle").write_bytes(pickle.dumps(options))
    write_pid = f"import os, pathlib; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))"
    (tmp_path / "driver.py").write_text(f"{write_pid}\n{DRIVER}")
    submit = [RAY, "job", "submit", "--", sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "options.pickle")]

    def start():
        environment = {**head.environment, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(submit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    try:
        assert bool(head.token.get("RAY_AUTH_TOKEN")) == (token == "with a token")
        killed = start()
        wait_for(
            lambda: (
                killed.poll() is not None
                or ("r0" in job.out.index() and job.at_gate("stage1") and job.at_gate("stage2"))
            ),
            "a row that is done and one at each gate",
        )
        assert killed.poll() is None, killed.communicate()[0]
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        assert killed.wait(600) != 0
        job.open_gate()
        again = start()
        log, _ = again.communicate(timeout=600)
        assert again.returncode == 0, log
        assert "finished: 3 rows, 2 rendered" in log and "1 done before" in log, log
        names = [row["id"] for row in manifest]
        assert sorted(job.out.read()) == names
        assert job.check(names, undisturbed(job.out.index(), tmp_path)) == []
    finally:
        head.close()
