"""A private cluster outlives what stops its run, ends with the run, and takes nothing from where the run began."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ltx_ray.config import RequestedNumerics, RunLimits
from ltx_ray.engine.fake import open_gate
from ltx_ray.placement.sizing import ParallelConfig
from ltx_ray.run import Options
from tests.support.local_cluster import FAKE, HANGS_AFTER, MODEL, Dataset, Driver, rows, wait_for

pytestmark = pytest.mark.slow

SEPARATE = ParallelConfig(stage1=1, stage2=1)


class PrivateRun:
    """A run on a private cluster, into `out`."""

    def __init__(self, folder: Path):
        self.folder, self.out = folder, Dataset(folder / "out")
        self._drivers: list[Driver] = []

    def start(self, *prompts: str, **where) -> Driver:
        manifest = self.folder / "rows.jsonl"
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows(*prompts)))
        options = Options(
            str(manifest), str(self.out.folder), MODEL, RequestedNumerics(), SEPARATE, engines=FAKE,
            preflight=False, limits=RunLimits(grace=2 * HANGS_AFTER),
        )  # fmt: skip
        self._drivers.append(Driver(options, self.folder / f"driver-{len(self._drivers)}", **where))
        return self._drivers[-1]

    def until(self, condition: Callable[[], object], what: str) -> None:
        driver = self._drivers[-1]
        wait_for(lambda: condition() or not driver.running, lambda: f"{what}:\n{driver.log}")
        assert driver.running, driver.log

    def decodes(self) -> bool:
        """Whether a clip is in the decoder, at a gate."""
        return any(self.out.folder.glob("_fake/at-*-decode-*"))

    def open_gate(self, number: str) -> None:
        open_gate(str(self.out.folder), number)

    def close(self) -> None:
        for driver in self._drivers:
            driver.kill()


@pytest.fixture
def run(tmp_path) -> Iterator[PrivateRun]:
    run = PrivateRun(tmp_path)
    yield run
    run.close()


def runs(driver: Driver, name: str) -> bool:
    """Whether the run has started a process of this name or of this script."""
    found = b""
    for pid in driver.processes():
        with contextlib.suppress(OSError):
            found += Path(f"/proc/{pid}/cmdline").read_bytes()
    return name.encode() in found


def nothing_is_left(run: PrivateRun, driver: Driver) -> None:
    """Neither processes nor files that the next run would have to wait for."""
    wait_for(lambda: not driver.processes(), lambda: f"the end of {driver.processes()}")
    assert run.out.leftovers() == []


@pytest.mark.parametrize(
    ("send", "number"),
    [("signal_all", signal.SIGTERM), ("signal_group", signal.SIGHUP)],
)
def test_a_signal_to_everything_that_a_run_started_drains_it(run, send, number):
    """The decode pool finishes its clip, so that Ray's processes must outlive the signal."""
    driver = run.start("[[decode:gate:1]]", *["[[stage1:gate]]"] * 4)
    run.until(run.decodes, "a clip in the decoder")
    getattr(driver, send)(number)
    run.until(lambda: f"draining: {number.name}" in driver.log, "drain")
    run.open_gate("1")
    driver.ends(4)
    assert set(run.out.index()) == {"r0"}
    nothing_is_left(run, driver)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("process", ["private_head.py", "gcs_server"])
def test_a_signal_while_the_cluster_starts_ends_the_run_in_order(run, process, number):
    """Its head is launched before it is told what to start, and Ray's processes come once it has been."""
    driver = run.start("[[text:gate]]")
    run.until(lambda: run.out.events("run_started") and runs(driver, process), process)
    driver.signal_all(number)
    assert "drained: " in driver.ends(4)
    assert json.loads((run.out.folder / "run.json").read_text())["state"] == "drained"
    nothing_is_left(run, driver)


def test_a_second_signal_ends_the_private_cluster_too(run):
    driver = run.start(*["[[decode:gate]]"] * 2)
    run.until(run.decodes, "a clip in the decoder")
    driver.signal_group(signal.SIGTERM)
    run.until(lambda: "draining: SIGTERM" in driver.log, "drain")
    time.sleep(0.5)  # signals that come together are one
    driver.signal_group(signal.SIGTERM)
    assert driver.wait() == 128 + signal.SIGTERM
    wait_for(lambda: not driver.processes(), lambda: f"the end of {driver.processes()}")


def test_it_takes_nothing_from_where_it_began_and_leaves_nothing_at_home(run, tmp_path, monkeypatch):
    """Modules of the working directory reach no worker, nor does `uv run` have Ray pack that directory: workers that it
    did that for could not start here."""
    folder, home = tmp_path / "work", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    for name in ("av", "click", "grpc", "ltx_ray", "numpy", "psutil", "pyarrow", "ray", "torch", "yaml"):
        (folder / f"{name}.py").write_text("raise SystemExit('a module of the user')\n")
    # A process called "uv run", which is what Ray looks for.
    (folder / "run").write_text('"$@"\nexit $?\n')
    uv = folder / "uv"
    uv.symlink_to("/bin/bash")
    # Ray reads the mode when it is imported, and would write a token.
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("LTX_RAY_CACHE", os.environ.get("LTX_RAY_CACHE") or str(Path.home() / ".cache" / "ltx-ray"))
    monkeypatch.setenv("HOME", str(home))
    run.start("one", "two", cwd=folder, under=[str(uv), "run"]).ends(0)
    assert set(run.out.index()) == {"r0", "r1"}
    assert not list(home.iterdir())
