"""A lease on an output, so that two runs into it do not work at once. Best effort: names of parts and
clips are deterministic, so even two that do can harm nothing."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable

from ltx_ray.storage import Store

_NAME = "_lease.json"
_TTL_SECONDS = 60.0
_RENEW_SECONDS = 15.0
_POLL_SECONDS = 2.0


class Lease:
    """Held by one run at a time, and renewed by a thread of its own for as long as its process lives."""

    def __init__(self, store: Store, run_id: str):
        self._store, self._run_id = store, run_id
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, say: Callable[[str], None]) -> None:
        """Wait until no other run holds the lease, then take it."""
        told = False
        while (holder := self._holder()) is not None:
            if not told:
                say(f"{self._store.uri} is in use by run {holder['run_id']} on {holder['host']}; waiting for it")
                told = True
            time.sleep(_POLL_SECONDS)
        self._write()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._released.wait(_RENEW_SECONDS):
            try:
                self._write()
            except Exception:
                continue  # the store may be back before the lease ends

    def release(self) -> None:
        """Give it back; another run's lease stays."""
        self._released.set()
        if self._thread is not None:
            self._thread.join(timeout=10)  # it may be writing just now
        entry = _read(self._store)
        if entry is not None and entry["run_id"] == self._run_id:
            self._store.delete(_NAME)

    def _write(self) -> None:
        entry = {
            "run_id": self._run_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "expires": time.time() + _TTL_SECONDS,
        }
        self._store.write_bytes(_NAME, json.dumps(entry).encode())

    def _holder(self) -> dict | None:
        entry = holder(self._store)
        return None if entry is None or entry["run_id"] == self._run_id else entry


def holder(store: Store) -> dict | None:
    """The lease (`run_id`, `host`, `pid`, `expires`) of the run at work in `store`, or None."""
    entry = _read(store)
    if entry is None or entry["expires"] < time.time():
        return None
    # a run that was killed on this machine need not be waited for
    if entry["host"] == socket.gethostname() and not _alive(entry["pid"]):
        return None
    return entry


def _read(store: Store) -> dict | None:
    try:
        entry = json.loads(store.read_bytes(_NAME))
        entry.update(pid=int(entry["pid"]), expires=float(entry["expires"]))
        return entry if {"run_id", "host"} <= set(entry) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
