"""`ltx-ray submit` with a cluster that is made up: what it submits, says and refuses."""

import json
import shlex
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from ltx_ray.cli import submit as module
from ltx_ray.cli.app import app

COUNTS = {"rendered": 2, "failed": 1}


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """Takes jobs, and ends those that are followed with `code`."""
    found = SimpleNamespace(jobs={}, code=0, status="RUNNING", drains=[], addresses=[], outputs=[])

    class Client:
        def get_job_status(self, job):
            if job not in found.jobs:
                raise RuntimeError(f"Job {job} does not exist.")
            return SimpleNamespace(value=found.status)

        def submit_job(self, *, submission_id, entrypoint, metadata):
            found.jobs[submission_id] = (entrypoint, metadata)

    def follow(client, job, drain, say, output):
        found.drains.append(drain)
        found.outputs.append(output)
        say(f"{job}: running")
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/run.json").write_text(json.dumps({"run_id": "r", "counts": COUNTS}))
        return found.code

    monkeypatch.setattr(module, "connect", lambda address: found.addresses.append(address) or Client())
    monkeypatch.setattr(module, "follow", follow)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://h:8265")
    return found


def submit(*words):
    found = CliRunner().invoke(app, ["submit", *map(str, words)])
    assert found.exception is None or isinstance(found.exception, SystemExit)
    return found.exit_code, found.stdout, found.stderr


def test_it_submits_the_arguments_of_render(cluster, tmp_path):
    words = ["/m n/p.jsonl", "--output", f"{tmp_path}/out", "--lora", "/l.safetensors", "--tp", "2"]
    code, out, err = submit("--", *words)
    ((job, (entrypoint, metadata)),) = cluster.jobs.items()
    assert (code, out, err) == (0, f"{job}: submitted\n", "") and job.startswith("render-")
    assert shlex.split(entrypoint) == ["ltx-ray", "render", *words]
    assert metadata == {"output": f"{tmp_path}/out"} and cluster.addresses == ["http://h:8265"] and not cluster.drains
    submit("--", *words)
    assert len(cluster.jobs) == 2, "each call without an id is a job of its own"


def test_an_id_is_submitted_once(cluster, tmp_path):
    words = ["--submission-id", "night-1", "--entrypoint", "python r.py", "--address", "https://x", "--", "/m.jsonl"]
    for outcome in ("submitted", "already there (running)"):
        assert submit(*words, "--output", "s3://b/out") == (0, f"night-1: {outcome}\n", "")
    assert cluster.jobs == {"night-1": ("python r.py /m.jsonl --output s3://b/out", {"output": "s3://b/out"})}
    assert cluster.addresses == ["https://x"] * 2
    cluster.status = "FAILED"
    code, _, err = submit("--attempts", "1", *words, "--output", "s3://b/out")
    assert code == 2 and "--attempts: 1, and 1 jobs of this submission have failed" in err and len(cluster.jobs) == 1


@pytest.mark.parametrize("code", [0, 3, 1, 2, 4, 143])
def test_json_is_one_line_and_has_the_counts_of_a_run_that_came_to_its_end(cluster, tmp_path, code):
    cluster.code = code
    words = ["--submission-id", "j", "--json", "--on-stop", "drain", "--", "/m.jsonl", "--output", f"{tmp_path}/out/"]
    found, out, err = submit("--wait", *words)
    assert found == code and out.count("\n") == 1 and err == "j: submitted\nj: running\n" and cluster.drains == [True]
    assert json.loads(out) == {
        "submission_id": "j", "exit_code": code, "counts": COUNTS if code in (0, 3) else None,
        "output": f"{tmp_path}/out",
    }  # fmt: skip
    found, out, _ = submit(*words)
    assert found == 0 and json.loads(out)["exit_code"] is None
    submit("--wait", *(word for word in words if word != "--json"))
    assert cluster.outputs == [None, f"{tmp_path}/out"], "progress would be more than one line"


def test_counts_that_cannot_be_read_from_here_are_null(cluster, tmp_path):
    _, out, _ = submit("--wait", "--json", "--", "/m.jsonl", "--output", f"{tmp_path}/elsewhere")
    assert json.loads(out)["counts"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--", "m.jsonl", "--output", "/o"], "error: MANIFEST: m.jsonl, legal: an absolute path that the head sees"),
        (["--", "/m.jsonl", "--output", "out"], "error: --output: out, legal: an absolute path that the head sees, or"),
        (["--", "/m.jsonl"], "Error: Missing option '--output'"),
        (["--", "/m.jsonl", "--output", "/o", "--tpp", "2"], "Error: No such option '--tpp'"),
        (["--", "/m.jsonl", "--output", "/o", "--tp", "x"], "error: --tp: 'x', legal: "),
        (["--address", "h:1", "--", "/m.jsonl", "--output", "/o"], "error: --address: 'h:1', legal: http://host:port"),
        (["--submission-id", "a/b", "--", "/m.jsonl", "--output", "/o"], "error: --submission-id: 'a/b', legal: up to"),
        (["--on-stop", "kill", "--", "/m.jsonl", "--output", "/o"], "error: --on-stop: 'kill', legal: leave or drain"),
        (["--", "s3://KEY:verySecret1@b/m", "--output", "/o"], "error: render: s3://***@b/m, legal: no credentials"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_submitted(cluster, words, message):
    code, out, err = submit(*words)
    assert code == 2 and message in " ".join(err.split()) and not out and not cluster.jobs and not cluster.addresses
    assert "verySecret1" not in err


def test_no_cluster_is_exit_1_with_its_address(monkeypatch):
    def connect(address):
        raise ConnectionError("refused")

    monkeypatch.setattr(module, "connect", connect)
    code, out, err = submit("--address", "http://h:1", "--json", "--", "/m.jsonl", "--output", "/o")
    assert (code, out, err) == (1, "", "error: http://h:1: refused\n")
