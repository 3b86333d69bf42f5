"""Following a job of a cluster: its exit code, and what signals do."""

import json
import os
import signal
from types import SimpleNamespace

import pytest

from ltx_ray.cli import cluster_jobs
from ltx_ray.cli.cluster_jobs import follow, run_progress

pytestmark = pytest.mark.usefixtures("heard_hangups")


class FakeJob:
    """A job whose status is asked for: `script` says what happens at each request, and the last entry stays."""

    def __init__(self, *script, code=None, stopped="STOPPED"):
        self.script, self.code, self.stopped, self.stops = list(script), code, stopped, 0

    def get_job_info(self, job):
        entry = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(entry, Exception):
            raise entry
        if isinstance(entry, signal.Signals):
            os.kill(os.getpid(), entry)
            entry = "RUNNING"
        ended = entry in ("SUCCEEDED", "FAILED", "STOPPED")
        status = SimpleNamespace(value=entry, is_terminal=lambda: ended)
        return SimpleNamespace(status=status, message="the message", driver_exit_code=self.code)

    def stop_job(self, job):
        self.stops += 1
        self.script = ["RUNNING", self.stopped]

    def get_job_logs(self, job):
        return "\n".join(map(str, range(30)))


@pytest.fixture(autouse=True)
def no_time(monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def sleep(seconds):
        clock.now += seconds

    monkeypatch.setattr(cluster_jobs, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", None, 1), ("FAILED", -9, 1), ("STOPPED", None, 1)],
)
def test_the_exit_code_is_that_of_the_command(status, driver, code, capsys):
    said = []
    assert follow(FakeJob("PENDING", "RUNNING", "RUNNING", status, code=driver), "j", False, said.append) == code
    assert said == ["j: pending", "j: running", f"j: {status.lower()}"]
    assert capsys.readouterr().err == (
        "" if code == 0 else "".join(f"{n}\n" for n in range(10, 30)) + "j: the message\n"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_the_job_or_drains_it(number):
    before = signal.getsignal(number)
    job, said = FakeJob("RUNNING", number), []
    assert follow(job, "j", False, said.append) == 128 + number
    assert job.stops == 0 and said == ["j: running", "j: goes on, and is followed no longer"]

    job, said = FakeJob("RUNNING", number), []
    assert follow(job, "j", True, said.append) == 4
    assert job.stops == 1 and said[1].startswith("j: told to stop; it drains") and said[-1] == "j: stopped"
    assert signal.getsignal(number) == before


def test_a_job_that_finishes_as_it_is_told_to_stop_has_its_own_code():
    assert follow(FakeJob(signal.SIGTERM, stopped="SUCCEEDED"), "j", True, print) == 0
    assert follow(FakeJob(signal.SIGTERM, stopped="FAILED", code=3), "j", True, print) == 3


def test_a_second_signal_ends_the_wait_for_a_drain():
    job = FakeJob(signal.SIGTERM)
    stop = job.stop_job

    def stop_job(name):
        stop(name)
        job.script = [signal.SIGINT]

    job.stop_job = stop_job
    assert follow(job, "j", True, print) == 130 and job.stops == 1


def test_a_stop_that_the_cluster_did_not_hear_is_told_again():
    job, fails = FakeJob(signal.SIGTERM), [ConnectionError("no"), RuntimeError("no")]
    stop = job.stop_job
    job.stop_job = lambda name: (_ for _ in ()).throw(fails.pop()) if fails else stop(name)
    assert follow(job, "j", True, print) == 4 and job.stops == 1 and not fails


def test_a_silent_cluster_is_waited_for_so_long():
    said, silent = [], [ConnectionError("silent")]
    assert follow(FakeJob(*silent * 50, "RUNNING", *silent * 50, "SUCCEEDED"), "j", False, said.append) == 0
    told = "j: the cluster does not answer, and is asked again for 600 s"
    assert said == [told, "j: running", told, "j: succeeded"]
    with pytest.raises(ConnectionError, match="no answer for 600 s: silent"):
        follow(FakeJob(ConnectionError("silent")), "j", False, print)
    with pytest.raises(RuntimeError, match="does not exist"):
        follow(FakeJob(RuntimeError("Job j does not exist.")), "j", False, print)


RUNNING = {
    "state": "running",
    "counts": {"rows": 43, "rendered": 30, "already_done": 10, "failed": 2, "illegal": 1},
    "expected_rows": 1200,
    "summary": {"clips_per_hour": 118.2},
}


def test_whoever_waits_is_told_now_and_then_how_far_the_job_is(tmp_path):
    """The clock moves by the sleeps alone, so that lines come at the same requests always."""
    (tmp_path / "run.json").write_text(json.dumps(RUNNING))
    script, said = ["RUNNING"] * 40 + ["SUCCEEDED"], []
    assert follow(FakeJob(*script), "j", False, said.append, str(tmp_path)) == 0
    assert said[0] == "j: running" and said[-1] == "j: succeeded"
    assert set(said[1:-1]) == {"j: running, 40 of 1,200 rows done, 3 failed, 118 clips/h"} and 2 <= len(said[1:-1]) <= 4
    said.clear()
    assert follow(FakeJob(*script), "j", False, said.append) == 0
    assert said == ["j: running", "j: succeeded"], "silent without the output"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"expected_rows": None, "counts": {"rendered": 4}, "summary": None}, "4 rows done"),
        ({"counts": {}}, "0 of 1,200 rows done, 118 clips/h"),
        ({"state": "finished"}, ""),
        ({"state": None}, ""),
    ],
)
def test_how_far_a_run_is(tmp_path, changes, line):
    (tmp_path / "run.json").write_text(json.dumps({**RUNNING, **changes}))
    assert run_progress(str(tmp_path)) == line


@pytest.mark.parametrize("content", [None, "", "[1]", "{"])
def test_an_output_that_cannot_be_read_from_here_ends_no_wait(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    said = []
    assert follow(FakeJob(*["RUNNING"] * 40, "SUCCEEDED"), "j", False, said.append, str(tmp_path)) == 0
    assert set(said) == {"j: running", "j: succeeded"} and len(said) > 3, "it goes on is all that is known"


def test_a_signal_that_is_ignored_stays_so():
    """As SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert follow(FakeJob(signal.SIGHUP, "SUCCEEDED"), "j", False, print) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
