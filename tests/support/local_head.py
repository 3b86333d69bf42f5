"""A real Ray head by `cluster/local`, as in the README, and jobs on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOCAL = str(ROOT / "cluster/local")
RAY = str(Path(sys.executable).parent / "ray")
# Without PYTHONPATH, so that a submitted clone has to suffice.
ENV = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
ENV["LTX_RAY_PYTHON"] = sys.executable
#: A command that prints the address of its cluster and waits for the end of its stdin.
_REPORT = """
import json, os, sys
names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
print(json.dumps({name: os.environ[name] for name in names if name in os.environ}), flush=True)
sys.stdin.read()
sys.exit(7)
"""


def start(command: list[str], *options: str, **environment: str) -> subprocess.Popen[str]:
    """`cluster/local` with this command."""
    return subprocess.Popen(
        [LOCAL, "--num-cpus", "6", *options, "--", *command],
        env={**ENV, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # The tests may run in a shell's background job, which ignores SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def temp_dir(gcs_address: str) -> str:
    """The --temp-dir of the head at this address, from the head's own command line."""
    port = gcs_address.rpartition(":")[2]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if f"--port={port}" in words and "--block" in words:
            return next(w.partition("=")[2] for w in words if w.startswith("--temp-dir="))
    raise AssertionError(f"no head at {gcs_address}")


def processes_of(folder: str) -> list[str]:
    """Command lines of the processes that name the folder, as every Ray process but a worker does."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
            if folder.encode() in words and int(path.name) != os.getpid():
                found.append((path / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


class LocalHead:
    """A head that lives until `close`, which also checks what it leaves: exit code, processes and files."""

    def __init__(self, **environment: str):
        self._process = start([sys.executable, "-c", _REPORT], **environment)
        assert self._process.stdin and self._process.stdout
        line = self._process.stdout.readline()
        assert line, "cluster/local did not run its command"
        reported = json.loads(line)
        self._folder = temp_dir(reported["RAY_ADDRESS"])
        assert processes_of(self._folder)
        #: The dashboard's URL.
        self.url: str = reported["RAY_API_SERVER_ADDRESS"]
        #: What a caller's environment needs for the head's token; nothing where it has none.
        self.token = {name: value for name, value in reported.items() if "AUTH" in name}

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a caller that knows where the head is."""
        return {**ENV, **self.token, "RAY_API_SERVER_ADDRESS": self.url}

    def get(self, path: str) -> Any:
        """What the dashboard says at `path`."""
        request = urllib.request.Request(f"{self.url}{path}")
        if "RAY_AUTH_TOKEN" in self.token:
            request.add_header("Authorization", f"Bearer {self.token['RAY_AUTH_TOKEN']}")
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def jobs(self) -> list[str]:
        return [job["submission_id"] for job in self.get("/api/jobs/") if job["submission_id"]]

    def leaks(self) -> list[str]:
        """Actors of runs that still exist."""
        query = "/api/v0/actors?filter_keys=state&filter_predicates=!%3D&filter_values=DEAD"
        found = self.get(query)["data"]["result"]["result"]
        return [str(actor) for actor in found if actor["class_name"] != "JobSupervisor"]

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        try:
            code = self._process.wait(600)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait(600)
            raise
        assert code == 7, "the command's exit code was not passed on"
        assert processes_of(self._folder) == []
        assert not Path(self._folder).exists()
