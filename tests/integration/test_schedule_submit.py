"""jobs/schedule.py and cluster/local on a real Ray head: a schedule that fires twice runs once.

All tests share one head. Their jobs are shell one-liners instead of a render, but for one.
"""

import ast
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.support.local_head import ENV, LOCAL, RAY, ROOT, LocalHead, processes_of, start, temp_dir

#: One replica of each stage, which imports for seconds: these tests are of how a render starts. test_jobs.py leaves
#: the numbers to the run.
FEW_RANKS = "--stage1-replicas 1 --stage2-replicas 0 --text-replicas 1 --decode-replicas 1".split()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for leftovers in /proc"),
]


@pytest.fixture(scope="module")
def head():
    """A head for the module. Also checks what it leaves: exit code, processes and files."""
    head = LocalHead()
    yield head
    head.close()


class Schedule:
    """One recipe in a folder, and calls of schedule.py for it."""

    def __init__(self, folder, head, name, script):
        self.folder, self.head, self.name = folder, head, name
        self.runs = folder / "runs"
        (folder / "recipe.yaml").write_text(f"name: {name}\noutput: {folder}/out\nprompts: [a fox]\n")
        wrapper = folder / "wrapper.sh"
        wrapper.write_text(f'echo "$@" >> {self.runs}\n{script}\n')
        self.entrypoint = f"bash {wrapper}"

    def start(self, *options):
        return subprocess.Popen(
            [
                *(sys.executable, str(ROOT / "jobs/schedule.py"), str(self.folder / "recipe.yaml")),
                *("--address", self.head.url, *(() if "--backfill" in options else ("--date", "2026-11-23"))),
                *("--entrypoint", self.entrypoint, *options),
            ],
            env={**ENV, **self.head.token},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def call(self, *options):
        process = self.start(*options)
        out, _ = process.communicate(timeout=600)
        return process.returncode, out

    def count(self):
        """How often the job's command ran. Also checks the arguments of the last run."""
        lines = self.runs.read_text().splitlines()
        manifest = f"{self.folder}/out/state/manifests/{self.name}-2026-11-23.jsonl"
        assert lines[-1] == f"{manifest} --output {self.folder}/out" and Path(manifest).is_file()
        return len(lines)


def test_twice_in_a_row_is_one_job(head, tmp_path):
    job = Schedule(tmp_path, head, "twice", f"sleep 1; python -c 'import sys; print(sys.prefix)' > {tmp_path}/prefix")
    code, out = job.call()
    assert code == 0 and ": submitted\n" in out, out
    code, out = job.call("--wait")
    assert code == 0 and ": already there (" in out, out
    code, out = job.call("--wait")
    assert code == 0 and ": already there (succeeded)" in out, out
    assert job.count() == 1
    assert len([name for name in head.jobs() if name.startswith("twice-2026-11-23-")]) == 1
    # The entrypoint's `python` is the one beside LTX_RAY_PYTHON, whether its environment is activated or not.
    assert (tmp_path / "prefix").read_text().strip() == sys.prefix


def test_at_once_is_one_job(head, tmp_path):
    job = Schedule(tmp_path, head, "once", "sleep 1")
    callers = [job.start("--wait") for _ in range(3)]
    outs = [caller.communicate(timeout=600)[0] for caller in callers]
    assert [caller.returncode for caller in callers] == [0, 0, 0], outs
    assert sum(": submitted\n" in out for out in outs) == 1, outs
    assert job.count() == 1
    assert len([name for name in head.jobs() if name.startswith("once-")]) == 1


def test_a_failed_job_is_submitted_again(head, tmp_path):
    # First some rows fail (3), then none. The file stands for what the second render finds done.
    job = Schedule(tmp_path, head, "failed", f"[ -e {tmp_path}/done ] || {{ touch {tmp_path}/done; exit 3; }}")
    code, out = job.call("--wait")
    assert code == 3, out
    code, out = job.call("--wait")
    assert code == 0 and "submitted again (previous job: failed)" in out, out
    assert job.count() == 2
    assert sorted(name.endswith("-2") for name in head.jobs() if name.startswith("failed-")) == [False, True]
    code, out = job.call("--wait")
    assert code == 0 and "-2: already there (succeeded)" in out and job.count() == 2, out


def test_a_stop_goes_on_to_the_job_and_the_next_call_resumes(head, tmp_path):
    """The first command waits for its SIGTERM, as a render does that drains; the second one finds nothing left."""
    drains = f"trap 'touch {tmp_path}/drained; exit 4' TERM; touch {tmp_path}/up; while :; do sleep 0.1; done"
    job = Schedule(tmp_path, head, "stopped", f"[ -e {tmp_path}/drained ] || {{ {drains}; }}")
    caller = job.start("--wait", "--on-stop", "drain")
    while not (tmp_path / "up").exists():
        assert caller.poll() is None, caller.communicate()
        time.sleep(0.05)
    caller.send_signal(signal.SIGTERM)
    out, _ = caller.communicate(timeout=600)
    assert caller.returncode == 4 and "told to stop" in out and "Traceback" not in out, out
    assert (tmp_path / "drained").exists()
    code, out = job.call("--wait")
    assert code == 0 and "submitted again (previous job: stopped)" in out and job.count() == 2, out


def test_a_backfill_is_a_job_for_each_date(head, tmp_path):
    job = Schedule(tmp_path, head, "fill", "true")
    code, out = job.call("--backfill", "2026-11-22..2026-11-23", "--wait")
    assert code == 0 and job.count() == 2, out
    assert sorted(name[5:15] for name in head.jobs() if name.startswith("fill-")) == ["2026-11-22", "2026-11-23"]


def test_a_job_may_be_a_schedule_that_submits_another(head, tmp_path):
    """As the entrypoint of cluster/raycronjob.yaml does: the token is in the environment of the head's jobs."""
    job = Schedule(tmp_path, head, "inner", "true")
    schedule = [sys.executable, str(ROOT / "jobs/schedule.py"), str(tmp_path / "recipe.yaml"), "--date", "2026-11-23"]
    schedule += ["--address", head.url, "--wait", "--on-stop", "drain", "--entrypoint", job.entrypoint]
    environment = head.environment
    done = subprocess.run(
        [RAY, "job", "submit", "--", *schedule], capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert job.count() == 1 and len([name for name in head.jobs() if name.startswith("inner-")]) == 1


def examples():
    """The arguments of the calls of `ltx-ray submit` in the documentation: of the shell, of Airflow and of Argo."""
    text = (ROOT / "docs/schedules.md").read_text()
    airflow = re.search(r"bash_command=\((.*?)\n    \)", text, re.DOTALL)[1]
    argo = re.search(r"source: \|\n(.*?)```", text, re.DOTALL)[1]
    shell = re.search(r"^ltx-ray submit .*$", text, re.MULTILINE)[0]
    calls = (shell, ast.literal_eval(f"({airflow})"), argo.replace("\\\n", " "))
    return [shlex.split(re.sub(r"\{\{.*?\}\}", "20261123", call))[2:] for call in calls]


@pytest.mark.parametrize("number", range(3))
def test_the_documented_calls_of_submit_render_and_say_what_came_of_it(head, tmp_path, number):
    """With the places of this machine, and two rows of which one is illegal; the first call renders."""
    words = [word for word in examples()[number] if word not in ("--address", "http://HEAD:8265")]
    place = words[words.index("--output") + 1]
    manifest = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a fox", "height": 64, "width": 64, "num_frames": 9}, {"prompt": "a fox", "height": 65}]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [str(manifest) if word.startswith("s3://") and word != place else word for word in words]
    words[words.index("--output") + 1] = str(tmp_path / "out")
    if number:  # A command in place of the render, which the first call tries.
        wrapper = tmp_path / "wrapper.sh"
        wrapper.write_text(f'echo "$@" > {tmp_path}/arguments; exit 3')
        words = ["--entrypoint", f"bash {wrapper}", *words]
        words[words.index("--submission-id") + 1] += f"-{number}"
    else:
        words += [*FEW_RANKS, "--allow-illegal", "--num-inference-steps", "2"]
    program = "import sys; from ltx_ray.cli import main; main(sys.argv[1:])"
    environment = {**head.environment, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, "submit", *words], capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 3, done.stdout + done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert found["submission_id"] in head.jobs()
    assert (found["exit_code"], found["output"]) == (3, str(tmp_path / "out"))
    if number:
        given = (tmp_path / "arguments").read_text().split()
        assert given == [str(manifest), "--output", str(tmp_path / "out"), "--model", "toy"] and found["counts"] is None
    else:
        assert found["counts"]["rendered"] == 1 and found["counts"]["illegal"] == 1


def test_without_the_token_is_exit_1(head, tmp_path, monkeypatch):
    job = Schedule(tmp_path, head, "stranger", "true")
    monkeypatch.setitem(head.token, "RAY_AUTH_TOKEN", "0" * 64)
    code, out = job.call()
    assert code == 1 and "token" in out and "Traceback" not in out, out


def test_a_clone_with_datasets_and_weights_in_it_is_submitted_without_them(head, tmp_path):
    """Ray refuses a working directory of more than 100 MB."""
    clone = tmp_path / "clone"
    for folder in ("ltx_ray", "jobs"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, clone / name)
    for name in ("out/clips/aa/x.mp4", "out/index/part-x.parquet", "trial/clips/aa/x.mp4", "model.safetensors"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).touch()
        os.truncate(clone / name, 2**30)
    out = tmp_path / "out"
    command = [
        RAY, "job", "submit", "--working-dir", ".", "--",
        "python", "jobs/render.py", "jobs/example.jsonl", "--output", str(out), "--model", "toy", "--limit", "1",
        *FEW_RANKS,
    ]  # fmt: skip
    environment = head.environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment, cwd=clone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((out / "clips").rglob("*.mp4"))) == 1


def test_no_cluster_is_exit_1_with_its_address(tmp_path):
    code, out = Schedule(tmp_path, SimpleNamespace(url="http://127.0.0.1:1", token={}), "none", "true").call()
    assert code == 1 and "http://127.0.0.1:1" in out and "Traceback" not in out


def test_a_second_head_comes_and_goes_on_sigterm(head):
    """It runs beside the first, forwards the signal to its command, and does not affect the first."""
    code = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(4)); "
        "print(os.environ['RAY_ADDRESS'], flush=True); time.sleep(3600)"
    )
    process = start([sys.executable, "-c", code])
    folder = temp_dir(process.stdout.readline().strip())
    process.send_signal(signal.SIGTERM)
    assert process.wait(600) == 4
    assert processes_of(folder) == [] and not Path(folder).exists()
    head.jobs()


def starts_a_head(process):
    """Whether a child of the process is a head that is there or is coming."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any("--head" in child.cmdline() for child in psutil.Process(process.pid).children())
    return False


def test_sigint_while_the_head_starts():
    process = start(["touch", "/nonexistent"])
    while not starts_a_head(process):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(600) == 130


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-cpus", "0", "--", "true"], "--num-cpus: '0'"),
        (["--num-cpus"], "--num-cpus: ''"),
        (["true"], "unknown argument 'true'"),
        (["--"], "no COMMAND"),
    ],
)
def test_wrong_usage_is_exit_2(argv, message):
    done = subprocess.run([LOCAL, *argv], env=ENV, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr
