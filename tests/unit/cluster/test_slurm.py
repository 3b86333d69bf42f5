"""cluster/slurm.sbatch with stand-ins for srun, scontrol and the run; `ray symmetric-run` reads its own arguments."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "cluster" / "slurm.sbatch"
#: Runs what stands behind its own options, as one task; how its nodes end says nothing about the run.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$HERE/srun"
while [[ $1 = -* ]]; do shift; done
"$@"
exit 9
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >>"$HERE/scontrol"
"""
#: Takes arguments as Ray does, and runs the entrypoint without Ray.
RAY = """
import json, os, subprocess, sys
from pathlib import Path
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args
at = sys.argv.index("--")
assert sys.argv[1] == "symmetric-run"
left = curate_and_validate_ray_start_args(sys.argv[2:at])
told = {"options": sys.argv[2:at], "start": left, "entrypoint": sys.argv[at + 1 :], "mode": os.environ["RAY_AUTH_MODE"],
        "token": os.environ["RAY_AUTH_TOKEN"]}
Path(os.environ["HERE"], "ray.json").write_text(json.dumps(told))
if os.environ["CODE"] == "no head":
    sys.exit(0)  # as symmetric-run does when Ray does not start
sys.exit(subprocess.run(sys.argv[at + 1 :]).returncode)
"""
#: A run that drains on SIGTERM, ends with $CODE otherwise, or waits for the signal.
RENDER = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$HERE/render"
trap 'exit 4' TERM
[[ $CODE = wait ]] || exit "$CODE"
touch "$HERE/ready"
while :; do sleep 0.05; done
"""


@pytest.fixture
def submitted(tmp_path) -> Callable[..., subprocess.Popen[str]]:
    """Starts the script as Slurm does, on the first node of a job."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    programs = {"srun": SRUN, "scontrol": SCONTROL, "ray": f"#!{sys.executable}{RAY}", "ltx-ray": RENDER}
    for name, text in programs.items():
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "123457", "SLURM_JOB_NUM_NODES": "3", "SLURM_CPUS_PER_TASK": "96"}

    def start(code: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
        environment = {**os.environ, **job, "HERE": str(tmp_path), "CODE": code, "TMPDIR": str(tmp_path), **more}
        environment["PATH"] = f"{bin_}:{environment['PATH']}"
        return subprocess.Popen(
            ["bash", SCRIPT, *arguments], env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )

    return start


def requeued(folder: Path) -> list[str]:
    return (folder / "scontrol").read_text().splitlines() if (folder / "scontrol").exists() else []


def directives() -> dict[str, str | None]:
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.MULTILINE)
    return {name: value or None for name, value in lines}


def test_directives_are_complete_and_leave_time_to_drain():
    text = SCRIPT.read_text()
    found = directives()
    assert len(found) == text.count("#SBATCH "), "each directive has the form --name or --name=value, once"
    before_code = text.partition("\nset -")[0]
    assert before_code.count("#SBATCH ") == len(found), "Slurm reads none behind the first command"
    told, _, seconds = found["signal"].partition("@")
    assert told == "B:USR1", "to the script alone, which tells it from the SIGTERM of scancel"
    assert int(seconds) >= 120 + 60, "--grace, Ray's end on the nodes, and Slurm's minute"
    assert found["ntasks-per-node"] == "1", "symmetric-run starts one Ray a node"
    assert {"requeue", "no-kill", "exclusive"} <= found.keys() and found["open-mode"] == "append"
    assert int(found["cpus-per-task"]) >= 8 * int(found["gpus-per-node"]), "x264 takes 8 beside each card"


def test_every_node_gets_the_same_command_and_the_jobs_own_token(submitted, tmp_path):
    tokens = []
    for _ in range(2):
        job = submitted("0", "a b.jsonl", "--output", "out dir")
        _, said = job.communicate(timeout=60)
        assert job.returncode == 0, said
        told = json.loads((tmp_path / "ray.json").read_text())
        tokens.append(told["token"])
        assert told["mode"] == "token" and len(told["token"]) == 64
    assert tokens[0] != tokens[1]
    options = dict(zip(told["options"][::2], told["options"][1::2], strict=False))
    host, port = options["--address"].rsplit(":", 1)
    assert options["--min-nodes"] == "3" and told["start"] == ["--num-cpus=96"]
    assert 20000 <= int(port) < 32768
    assert (tmp_path / "srun").read_text().splitlines()[:3] == [
        "--kill-on-bad-exit=0", "--no-kill", "--cpus-per-task=96"
    ]  # fmt: skip
    rendered = (tmp_path / "render").read_text().splitlines()
    assert rendered == ["render", "a b.jsonl", "--output", "out dir", "--ray-address", f"{host}:{port}"]


@pytest.mark.parametrize("code", ["0", "1", "2", "3", "4"])
def test_a_run_that_ends_by_itself_is_not_queued_again(submitted, tmp_path, code):
    """With 4 it has used up its --max-gpu-hours."""
    job = submitted(code, "prompts.jsonl")
    job.communicate(timeout=60)
    assert (job.returncode, requeued(tmp_path)) == (int(code), [])


def test_no_ray_is_exit_1(submitted, tmp_path):
    job = submitted("no head", "prompts.jsonl")
    job.communicate(timeout=60)
    assert (job.returncode, requeued(tmp_path)) == (1, [])


@pytest.mark.parametrize(
    ("sent", "again"), [(signal.SIGUSR1, ["requeue 123457"]), (signal.SIGTERM, [])], ids=["time limit", "scancel"]
)
def test_a_signal_drains_and_the_time_limit_queues_again(submitted, tmp_path, sent, again):
    job = submitted("wait", "prompts.jsonl")
    while not (tmp_path / "ready").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(sent)
    _, said = job.communicate(timeout=60)
    assert (job.returncode, requeued(tmp_path)) == (4, again), said
    assert list(tmp_path.glob("tmp.*")) == [], "its scratch folder is gone"


@pytest.mark.parametrize(
    ("before", "most", "again"),
    [("49", "", ["requeue 123457"]), ("50", "", []), ("2", "3", ["requeue 123457"]), ("3", "3", [])],
)
def test_the_time_limit_queues_again_so_many_times(submitted, tmp_path, before, most, again):
    counts = {"SLURM_RESTART_COUNT": before, **({"LTX_RAY_MAX_REQUEUES": most} if most else {})}
    job = submitted("wait", "prompts.jsonl", **counts)
    while not (tmp_path / "ready").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    _, said = job.communicate(timeout=60)
    assert (job.returncode, requeued(tmp_path)) == (4, again)
    assert (
        again or f"queued again {before} times before (LTX_RAY_MAX_REQUEUES: {before}); the same sbatch resumes" in said
    )


@pytest.mark.parametrize(
    ("before", "most", "message"),
    [
        ("51", "50", "queued again 51 times (LTX_RAY_MAX_REQUEUES: 50)"),
        ("0", "some", "LTX_RAY_MAX_REQUEUES: some; legal: a whole number"),
    ],
)
def test_lost_nodes_queue_a_job_again_so_many_times(submitted, tmp_path, before, most, message):
    """Slurm itself queues it, when the first node is lost."""
    job = submitted("0", "prompts.jsonl", SLURM_RESTART_COUNT=before, LTX_RAY_MAX_REQUEUES=most)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 2 and message in said and not (tmp_path / "ray.json").exists()


def test_a_time_limit_before_the_driver_has_begun_queues_again(submitted, tmp_path):
    """The signal comes while nodes start."""
    srun = tmp_path / "bin" / "srun"
    srun.write_text(
        SRUN.replace('"$@"\nexit', 'touch "$HERE/ready"; until [[ -e $HERE/go ]]; do sleep 0.02; done\n"$@"\nexit')
    )
    job = submitted("wait", "prompts.jsonl")
    while not (tmp_path / "ready").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    while not list(tmp_path.glob("tmp.*/stop")):
        assert job.poll() is None
        time.sleep(0.02)
    (tmp_path / "go").touch()
    _, said = job.communicate(timeout=60)
    assert job.returncode in (4, 143) and requeued(tmp_path) == ["requeue 123457"], said


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [(None, [], "no arguments; legal: those of ltx-ray render"), ("scontrol", ["a.jsonl"], "no 'scontrol' in PATH")],
)
def test_wrong_usage_is_exit_2(submitted, tmp_path, missing, arguments, message):
    if missing:
        (tmp_path / "bin" / missing).unlink()
    job = submitted("0", *arguments)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 2 and message in said


def test_ray_refuses_what_symmetric_run_sets_itself():
    """The stand-in's check can fail."""
    with pytest.raises(click.ClickException):
        curate_and_validate_ray_start_args(["--address", "a:1", "--head"])
