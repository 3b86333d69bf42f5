"""A lease on an output, so that two runs into it do not work at once. Best effort: names of parts and
clips are deterministic, so even two that do can harm nothing."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable

from ltx_ray.storage.store import Store

_NAME = "_lease.json"
_TTL_SECONDS = 60.0
_RENEW_SECONDS = 15.0
_POLL_SECONDS = 2.0
#: Longer than another run needs between finding the output free and writing its lease.
_SETTLE_SECONDS = 1.0
#: Patience of a renewal: the next one comes soon, and several fit before the lease ends.
_RENEW_PATIENCE = 5.0
#: Bytes of every lease. An object is read in two requests, size first: one that was replaced in between must not
#: be cut short.
_BYTES = 1024
#: What stands for a lease that cannot be read: nobody's.
_NONSENSE = {"run_id": None, "host": "", "pid": 0, "expires": 0.0}


class Lease:
    """Held by one run at a time, and renewed by a thread of its own for as long as its process lives."""

    def __init__(self, store: Store, run_id: str):
        self._store, self._run_id = store, run_id
        self._renewals = store.hurried(_RENEW_PATIENCE)
        self._released, self._lost = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def lost(self) -> bool:
        """Whether another run has taken the output over, as it may when this process was stopped for a minute.

        Known within 15 seconds of going on.
        """
        return self._lost.is_set()

    def acquire(self, say: Callable[[str], None]) -> None:
        """Wait until no other run holds the lease, then take it. Raises OSError for a store that does not answer."""
        told = False
        while True:
            entry = _read(self._store)
            if not self._is_other(entry):
                if self._take(fresh=entry is None):
                    break
                continue
            if not told:
                say(f"{self._store.uri} is in use by run {entry['run_id']} on {entry['host']}; waiting for it")
                told = True
            time.sleep(_POLL_SECONDS)
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _take(self, fresh: bool) -> bool:
        """Write the lease; False when another run did so in the same moment. fresh: there was none of anybody's."""
        if fresh and self._store.is_local:
            try:
                return self._store.create(_NAME, self._entry())
            except OSError:
                pass  # a disk without hard links
        self._store.write_bytes(_NAME, self._entry())
        # there is no "write unless it is there" to be had: of two that found the output free the later writer wins
        time.sleep(_SETTLE_SECONDS)
        entry = _read(self._store)
        return entry is not None and entry["run_id"] == self._run_id

    def _is_other(self, entry: dict | None) -> bool:
        return entry is not None and entry["run_id"] != self._run_id and _is_live(entry)

    def _renew(self) -> None:
        while not self._released.wait(_RENEW_SECONDS):
            try:
                entry = _read(self._renewals)
                if entry is not None and entry["run_id"] not in (self._run_id, None):
                    self._lost.set()
                    return
                self._renewals.write_bytes(_NAME, self._entry())
            except OSError:
                continue  # the store may be back before the lease ends

    def release(self) -> None:
        """Give it back; another run's lease stays. When the store does not answer, it runs out by itself."""
        self._released.set()
        if self._thread is not None:
            self._thread.join(timeout=10)  # it may be writing just now
        try:
            entry = _read(self._renewals)
            if entry is not None and entry["run_id"] == self._run_id:
                self._renewals.delete(_NAME)
        except OSError:
            pass

    def _entry(self) -> bytes:
        entry = {
            "run_id": self._run_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pids": _pid_space(),
            "expires": time.time() + _TTL_SECONDS,
        }
        return json.dumps(entry).encode().ljust(_BYTES)


def holder(store: Store) -> dict | None:
    """The lease (`run_id`, `host`, `pid`, `expires`) of the run at work in `store`, or None (also for no answer)."""
    try:
        entry = _read(store)
    except OSError:
        return None
    return entry if entry is not None and _is_live(entry) else None


def _is_live(entry: dict) -> bool:
    if entry["expires"] < time.time():
        return False
    # a run that was killed on this machine need not be waited for; containers may share its name, not its processes
    ours = entry["host"] == socket.gethostname() and entry["pids"] == _pid_space()
    return not ours or _alive(entry["pid"])


def _pid_space() -> str:
    """Names the processes that a pid here is one of."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _read(store: Store) -> dict | None:
    """The lease as it stands, None for none. Raises OSError for a store that does not answer."""
    try:
        entry = json.loads(store.read_bytes(_NAME))
        return {
            "run_id": str(entry["run_id"]),
            "host": str(entry["host"]),
            "pid": int(entry["pid"]),
            "pids": str(entry.get("pids", "")),
            "expires": float(entry["expires"]),
        }
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return _NONSENSE


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
