"""A private cluster's temporary files go where there is room for them, or a variable is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile

import pytest

from ltx_ray.checkpoints.checkpoint import Checkpoint
from ltx_ray.config import ModelFiles, RequestedNumerics
from ltx_ray.driver.signals import Stopped
from ltx_ray.placement import private_cluster
from ltx_ray.placement.private_cluster import PrivateCluster, _blocked, temporary_folder
from tests.support.checkpoint_files import RELEASED


@pytest.fixture
def short():
    """A folder whose path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="l-", dir="/tmp") as folder:
        yield folder


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)


def test_the_folder_is_tmpdir_or_where_there_is_room(monkeypatch, short, tmp_path):
    monkeypatch.setenv("TMPDIR", short)
    assert temporary_folder() == short
    monkeypatch.setattr(private_cluster, "_TEMPORARY_FOLDERS", (short,))
    long = tmp_path / ("x" * 90)
    long.mkdir()
    for unusable in (str(long), "/no/such/folder"):
        monkeypatch.setenv("TMPDIR", unusable)
        assert temporary_folder() == short
    assert not os.listdir(short)


def test_a_folder_that_was_asked_for_by_name_is_not_replaced(monkeypatch, tmp_path):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    for folder, reason in ((str(long), "its path is too long"), ("/no/folder", "No such file or directory")):
        monkeypatch.setenv("RAY_TMPDIR", folder)
        with pytest.raises(ValueError) as caught:
            temporary_folder()
        assert str(caught.value).startswith(
            f"RAY_TMPDIR: no folder for Ray's temporary files: {folder} ({reason}); legal: a folder that can be written"
        )


def test_without_any_folder_each_is_named_with_its_reason(monkeypatch, short):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("TMPDIR", short)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(ValueError, match=rf"TMPDIR: no folder .*: {short} \(No space .*\), /tmp \(No space"):
        temporary_folder()


def test_what_is_started_with_signals_blocked_outlives_them():
    wait = [sys.executable, "-c", "print(end='x', flush=True); input()"]
    signals = (signal.SIGTERM, signal.SIGHUP)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with _blocked(signals):
        process = subprocess.Popen(wait, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert process.stdout.read(1) == b"x"
    for number in signals:
        process.send_signal(number)
    process.communicate(b"\n", timeout=600)
    assert process.returncode == 0


def test_ray_uploads_nothing_and_leaves_no_token_at_home(monkeypatch):
    names = ("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "RAY_RUNTIME_ENV_HOOK", "RAY_USE_TLS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    for name in names:
        monkeypatch.setenv(name, "x")
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    PrivateCluster().prepare()
    assert os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0" and "RAY_RUNTIME_ENV_HOOK" not in os.environ
    assert os.environ["RAY_USE_TLS"] == "0"
    assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_the_end_of_a_head_that_does_not_start_is_told(monkeypatch, short):
    monkeypatch.setenv("RAY_TMPDIR", short)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    cluster = PrivateCluster()
    cluster.launch()
    with pytest.raises(ConnectionError, match="the private Ray cluster did not start: its process ended; its logs are"):
        cluster.start(num_cpus=1)
    cluster.end()
    cluster.end()


def test_a_head_that_is_never_told_what_to_start_ends_with_its_run(monkeypatch, short):
    monkeypatch.setenv("RAY_TMPDIR", short)
    monkeypatch.setattr(private_cluster, "_END_SECONDS", 600)
    cluster = PrivateCluster()
    cluster.launch()
    assert cluster._head is not None and cluster._head.poll() is None
    process = cluster._head
    cluster.end()
    assert process.returncode == 0 and os.listdir(short) == []


@pytest.mark.parametrize("why", ["its pools do not fit", "it was told to stop"])
def test_a_head_ends_with_a_run_that_starts_nothing_on_it(monkeypatch, short, why):
    """It is launched before the pools are laid out, and the run has not connected to it."""
    pytest.importorskip("ray")
    from ltx_ray.placement.cluster import Cluster, _FreeGpus
    from ltx_ray.placement.sizing import ParallelConfig

    def launch(private: PrivateCluster) -> None:
        begin(private)
        heads.append(private._head)

    def told_to_stop() -> None:
        if why == "it was told to stop":
            raise Stopped("SIGINT")

    begin, heads = PrivateCluster.launch, []
    monkeypatch.setenv("RAY_TMPDIR", short)
    monkeypatch.setattr(private_cluster, "_END_SECONDS", 600)
    monkeypatch.setattr(PrivateCluster, "prepare", lambda private: None)  # It sets variables of this process.
    monkeypatch.setattr(PrivateCluster, "launch", launch)
    monkeypatch.setattr("ltx_ray.placement.cluster._local_gpus", lambda: _FreeGpus(0.0))
    cluster = Cluster(
        address=None, parallel=ParallelConfig(), requested=RequestedNumerics(device="cuda"),
        checkpoint=Checkpoint("c", "2.3.0", RELEASED, {}, 1), model=ModelFiles("", "", ""),
        engines=lambda numerics: {}, share_cards="off", check_signals=told_to_stop,
    )  # fmt: skip
    with pytest.raises((ValueError, Stopped), match="SIGINT" if "told" in why else "GPUs: at least 1 needed"):
        cluster._start_private()
    cluster.leave()
    (head,) = heads
    assert head is not None and head.returncode == 0


@pytest.mark.parametrize("line", [b"", b'{"num_cpus": 1', b"\n", b"\xff" * 100_000 + b"\n"])
def test_a_head_whose_run_dies_while_it_is_told_what_to_start_ends_too(monkeypatch, short, line):
    monkeypatch.setenv("RAY_TMPDIR", short)
    cluster = PrivateCluster()
    cluster.launch()
    process = cluster._head
    assert process is not None and process.stdin is not None
    process.stdin.write(line)
    process.stdin.close()
    try:
        assert process.wait(600) == 0
    finally:
        process.kill()
        cluster.end()
