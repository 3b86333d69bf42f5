"""A Ray cluster on this machine for one run, which lives and ends with the run."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ltx_ray.placement.job_cluster import JOB_VARIABLE
from ltx_ray.records import first_line

#: Signals that mean the run. Its private cluster goes on until the run has drained.
_RUN_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: Longest path of a folder of temporary files, in bytes: a Unix socket's has at most 107, and this is Ray's longest.
_FOLDER_BYTES = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
#: Room that a folder must have for Ray's logs, in bytes.
_LOG_BYTES = 2**20
#: Where temporary files go when TMPDIR does not say it.
_TEMPORARY_FOLDERS = ("/tmp", "/var/tmp")
_END_SECONDS = 15.0


class PrivateCluster:
    """Started by `start`, ended by `end`, or by the kernel when this process ends in any other way."""

    def __init__(self) -> None:
        self._head: subprocess.Popen[bytes] | None = None
        self._folder = ""

    def prepare(self) -> None:
        """Set what Ray reads when it is imported, in this process and in those of the cluster."""
        # Neither `uv run` nor a platform's hook may have Ray pack and upload the working directory.
        os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
        os.environ.pop("RAY_RUNTIME_ENV_HOOK", None)
        # The environment of the job that this run may be, on another cluster.
        os.environ.pop(JOB_VARIABLE, None)
        # Certificates are for other machines. Without any, Ray waits for minutes.
        os.environ["RAY_USE_TLS"] = "0"
        if "ray" in sys.modules:
            # It has read the mode already, and without one it took "disabled".
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        elif os.environ.setdefault("RAY_AUTH_MODE", "token").lower() == "token":
            # A token of the run's own: Ray would write one to the home directory, and every cluster that is started
            # later would then ask for it.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

    def launch(self) -> None:
        """Begin the process that `start` tells what to start, so that it imports Ray meanwhile. `prepare` comes first.

        Raises ValueError without a folder for Ray's files.
        """
        self._folder = temporary_folder()
        environment = {
            **os.environ,
            "RAY_TMPDIR": self._folder,
            # Ranks have environments of their own, so that a worker that is started early would serve nobody.
            "RAY_enable_worker_prestart": "0",
            "RAY_prestart_worker_first_driver": "0",
        }
        environment.pop("RAY_ADDRESS", None)
        with _blocked(_RUN_SIGNALS):
            self._head = subprocess.Popen(
                # -P: the folder of the script, this one, holds no modules for Ray.
                [sys.executable, "-P", str(Path(__file__).with_name("private_head.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env=environment, start_new_session=True,
            )  # fmt: skip

    def start(self, **arguments: Any) -> str:
        """Start the cluster with arguments of `ray.init`; returns its address. `launch` comes first.

        Raises ConnectionError when the cluster does not start.
        """
        assert self._head is not None and self._head.stdin is not None and self._head.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # It says why, or has ended.
            self._head.stdin.write(json.dumps(arguments).encode() + b"\n")
            self._head.stdin.flush()
        line = self._head.stdout.readline()
        reply = json.loads(line) if line else {"error": "its process ended"}
        if "error" in reply:
            raise ConnectionError(
                f"the private Ray cluster did not start: {first_line(reply['error'])}; "
                f"its logs are in {os.path.join(self._folder, 'ray', 'session_latest', 'logs')}"
            )
        return str(reply["address"])

    def end(self) -> None:
        """End the cluster and wait for it. Does nothing when it was not started."""
        head, self._head = self._head, None
        if head is None:
            return
        assert head.stdin is not None and head.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            head.stdin.close()
        head.stdout.close()
        try:
            head.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            head.kill()
            head.wait()


@contextlib.contextmanager
def _blocked(signals: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Context in which this thread, and processes that it starts, leave `signals` pending."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def temporary_folder() -> str:
    """The folder below which Ray keeps a private cluster's sockets and logs.

    That is RAY_TMPDIR, or else the first of TMPDIR, /tmp and /var/tmp that will do. Raises ValueError when none does.
    """
    if explicit := os.environ.get("RAY_TMPDIR"):
        variable, candidates = "RAY_TMPDIR", [explicit]
    else:
        variable, candidates = "TMPDIR", [*filter(None, [os.environ.get("TMPDIR")]), *_TEMPORARY_FOLDERS]
    reasons = []
    for folder in map(os.path.abspath, candidates):
        reason = _why_unusable(folder)
        if reason is None:
            return folder
        reasons.append(f"{folder} ({reason})")
    raise ValueError(
        f"{variable}: no folder for Ray's temporary files: {', '.join(reasons)}; legal: a folder that can be written, "
        f"with room, and a path of at most {_FOLDER_BYTES} bytes, in RAY_TMPDIR"
    )


def _why_unusable(folder: str) -> str | None:
    """Why Ray cannot keep its files below `folder`; None when it can."""
    if len(os.fsencode(folder)) > _FOLDER_BYTES:
        return "its path is too long"
    inner = os.path.join(folder, "ray")
    try:
        with tempfile.TemporaryFile(dir=inner if os.path.isdir(inner) else folder) as file:
            file.write(bytes(_LOG_BYTES))
    except OSError as error:
        return error.strerror or str(error)
    return None
