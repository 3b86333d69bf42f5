"""cluster/slurm.sbatch with Ray itself, as Slurm runs it on one node.

`ray symmetric-run` ends with `ray stop`, which kills all of Ray that it sees. It therefore runs in a PID namespace.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
#: Bash sends the signal, because the script's number is another one outside of the namespace.
JOB = """
bash "$0" "$@" & job=$!
until [[ -e $HERE/limit ]]; do kill -0 $job || break; sleep 0.1; done
kill -USR1 $job
while :; do code=0; wait $job || code=$?; kill -0 $job 2>/dev/null || exit $code; done
"""


def can_isolate() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0
    )


@pytest.fixture
def short_folder() -> Iterator[str]:
    """For Ray's sockets, whose paths have a limit."""
    with tempfile.TemporaryDirectory(prefix="ltx.", dir="/tmp") as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.skipif(not can_isolate(), reason="needs a PID namespace")
def test_the_time_limit_drains_a_run_which_the_next_start_of_the_job_finishes(tmp_path, short_folder):
    for name, text in {
        "srun": 'while [[ $1 = -* ]]; do shift; done; exec "$@"',
        "scontrol": 'echo "$@" >"$HERE/scontrol"',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ, "HERE": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "12",
        "RAY_TMPDIR": short_folder,
    }  # fmt: skip
    rows = [
        {"id": f"row-{n}", "prompt": "a fox", "seed": n, "height": 64, "width": 64, "num_frames": 9} for n in range(30)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = [ROOT / "cluster/slurm.sbatch", tmp_path / "rows.jsonl", "--model", "toy", "--output", tmp_path / "out"]

    first = subprocess.Popen(
        [*NAMESPACE, "bash", "-c", JOB, *script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not list(tmp_path.glob("out/clips/*/*.mp4")):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.1)
    (tmp_path / "limit").touch()
    said, _ = first.communicate(timeout=600)
    assert first.returncode == 4, said
    assert (tmp_path / "scontrol").read_text() == f"requeue {os.getpid()}\n"

    second = subprocess.run([*NAMESPACE, "bash", *script], env=environment, capture_output=True, text=True, timeout=600)
    assert second.returncode == 0, second.stdout + second.stderr
    counts = json.loads((tmp_path / "out/run.json").read_text())["counts"]
    assert counts["already_done"] >= 1 and counts["rendered"] + counts["already_done"] == len(rows)
