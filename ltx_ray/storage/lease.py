"""A lease on an output, so that two runs do not work on it at once.

It is best effort. Names of parts and clips are deterministic, so two runs that do work at once do no harm.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ltx_ray.storage.store import Store

#: The lease's file, relative to the output.
LEASE_FILE = "_lease.json"
_TTL_SECONDS = 60.0
_RENEW_SECONDS = 15.0
_POLL_SECONDS = 2.0
#: Longer than another run needs between finding the output free and writing its lease.
_SETTLE_SECONDS = 1.0
#: How long a renewal is retried: the next one comes soon, and several fit before the lease expires.
_RENEW_RETRY_SECONDS = 5.0
#: Bytes of every lease. An object is read in two requests, its size first: one that is replaced in between must not be
#: cut short.
_BYTES = 1024


@dataclass(frozen=True)
class LeaseEntry:
    """What the lease's file says of the run that holds it. `expires` is in seconds since the epoch."""

    run_id: str
    host: str
    pid: int
    pid_namespace: str
    expires: float

    @classmethod
    def parse(cls, data: bytes) -> LeaseEntry:
        """Raises ValueError, KeyError or TypeError when `data` is not a lease."""
        fields = json.loads(data)
        return cls(
            run_id=str(fields["run_id"]),
            host=str(fields["host"]),
            pid=int(fields["pid"]),
            pid_namespace=str(fields.get("pids", "")),
            expires=float(fields["expires"]),
        )

    def encode(self) -> bytes:
        fields = {
            "run_id": self.run_id,
            "host": self.host,
            "pid": self.pid,
            "pids": self.pid_namespace,
            "expires": self.expires,
        }
        return json.dumps(fields).encode().ljust(_BYTES)

    @property
    def is_live(self) -> bool:
        """Whether the run may still be alive."""
        if self.expires < time.time():
            return False
        # A run that was killed on this machine has no process any more. Containers may share the machine's host name,
        # but not its process ids.
        same_machine = self.host == socket.gethostname() and self.pid_namespace == _pid_namespace()
        return not same_machine or _is_running(self.pid)


#: Represents a lease that cannot be read: it belongs to no run and has expired.
_UNREADABLE = LeaseEntry(run_id="", host="", pid=0, pid_namespace="", expires=0.0)


class Lease:
    """Held by one run at a time, and renewed by a thread for as long as the process lives."""

    def __init__(self, store: Store, run_id: str):
        assert run_id != _UNREADABLE.run_id
        self._store, self._run_id = store, run_id
        self._renewals = store.retrying_for(_RENEW_RETRY_SECONDS)
        self._released, self._lost = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def lost(self) -> bool:
        """Whether another run has taken the output over, as it may when this process was suspended for a minute.

        This becomes true within 15 seconds after the process resumes.
        """
        return self._lost.is_set()

    def acquire(self, say: Callable[[str], None]) -> None:
        """Wait until no other run holds the lease, then take it. Raises OSError when the store does not answer.

        An exception, such as that of a signal, leaves no lease behind.
        """
        try:
            self._acquire(say)
        except BaseException:
            self.release()
            raise

    def _acquire(self, say: Callable[[str], None]) -> None:
        announced = False
        while True:
            entry = _read(self._store)
            if entry is None or entry.run_id == self._run_id or not entry.is_live:
                if self._take(fresh=entry is None):
                    break
                continue
            if not announced:
                say(f"{self._store.name} is in use by run {entry.run_id} on {entry.host}; waiting for it")
                announced = True
            time.sleep(_POLL_SECONDS)
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _take(self, fresh: bool) -> bool:
        """Write the lease; False when another run wrote its own meanwhile. `fresh`: there was no file."""
        if fresh and self._store.is_local:
            try:
                return self._store.create(LEASE_FILE, self._entry())
            except OSError:
                pass  # a disk without hard links
        self._store.write_bytes(LEASE_FILE, self._entry())
        # Stores have no "write unless it exists": of two runs that found the output free, the later writer wins.
        time.sleep(_SETTLE_SECONDS)
        entry = _read(self._store)
        return entry is not None and entry.run_id == self._run_id

    def _renew(self) -> None:
        while not self._released.wait(_RENEW_SECONDS):
            try:
                entry = _read(self._renewals)
                if entry is not None and entry.run_id not in (self._run_id, _UNREADABLE.run_id):
                    self._lost.set()
                    return
                self._renewals.write_bytes(LEASE_FILE, self._entry())
            except OSError:
                continue  # the store may be back before the lease expires

    def release(self) -> None:
        """Delete the lease unless it is another run's. When the store does not answer, it expires by itself."""
        self._released.set()
        if self._thread is not None:
            self._thread.join(timeout=10)  # it may be in the middle of a renewal
        try:
            entry = _read(self._renewals)
            if entry is not None and entry.run_id == self._run_id:
                self._renewals.delete(LEASE_FILE)
        except OSError:
            pass

    def _entry(self) -> bytes:
        expires = time.time() + _TTL_SECONDS
        return LeaseEntry(self._run_id, socket.gethostname(), os.getpid(), _pid_namespace(), expires).encode()


def holder(store: Store) -> LeaseEntry | None:
    """The lease of the run that works in `store`; None when there is none or the store does not answer."""
    try:
        entry = _read(store)
    except OSError:
        return None
    return entry if entry is not None and entry.is_live else None


def _pid_namespace() -> str:
    """Identifies the set of processes among which a pid of this process is unique."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _read(store: Store) -> LeaseEntry | None:
    """The lease in `store`; None when there is none. Raises OSError when the store does not answer."""
    try:
        return LeaseEntry.parse(store.read_bytes(LEASE_FILE))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return _UNREADABLE


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
