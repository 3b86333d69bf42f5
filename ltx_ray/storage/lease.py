"""A lease on an output, so that two runs do not work on it at once.

It is taken and renewed by conditional writes, and clocks of two machines are never compared: a run that waits takes the
lease over when the file has not changed for a minute of its own clock. Two runs that do work at once, as when one was
suspended, do no harm.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ltx_ray.storage.store import Store

#: The lease's file, relative to the output. It stays when no run has the lease, because it counts the holders.
LEASE_FILE = "state/lease.json"
#: The lease of ltx-ray 0.1, which a run of that version may still hold.
_FORMER_FILE = "_lease.json"
_TTL_SECONDS = 60.0
_RENEW_SECONDS = 15.0
_POLL_SECONDS = 2.0
#: How long a renewal is retried: the next one comes soon, and several fit before the lease expires.
_RENEW_RETRY_SECONDS = 5.0


@dataclass(frozen=True)
class LeaseEntry:
    """What the lease's file says of the run that holds it; `run_id` is "" when none does.

    `epoch` is the number of runs that have held it so far. `expires`, in seconds since the epoch, is for people and for
    a run of 0.1.
    """

    run_id: str
    host: str
    pid: int
    pid_namespace: str
    expires: float
    epoch: int = 0

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
            epoch=int(fields.get("epoch", 0)),
        )

    def encode(self) -> bytes:
        fields = {
            "run_id": self.run_id,
            "host": self.host,
            "pid": self.pid,
            "pids": self.pid_namespace,
            "expires": self.expires,
            "epoch": self.epoch,
        }
        return json.dumps(fields).encode()

    @property
    def is_held(self) -> bool:
        """Whether a run has the lease that is not known to be dead."""
        # A run that was killed on this machine has no process any more.
        return bool(self.run_id) and (not self.is_of_this_machine or _is_running(self.pid))

    @property
    def is_of_this_machine(self) -> bool:
        """Whether its process would be known here. Containers may share a host name, but not their process ids."""
        return self.host == socket.gethostname() and self.pid_namespace == _pid_namespace()

    @property
    def is_live(self) -> bool:
        """Whether the run may still be alive, as far as one look and this machine's clock can tell."""
        return self.is_held and self.expires >= time.time()


#: Represents a lease that cannot be read: no run holds it.
_UNREADABLE = LeaseEntry(run_id="", host="", pid=0, pid_namespace="", expires=0.0)


class Lease:
    """Held by one run at a time, and renewed by a thread for as long as the process lives."""

    def __init__(self, store: Store, run_id: str):
        assert run_id != _UNREADABLE.run_id
        self._store, self._process = store, (run_id, socket.gethostname(), os.getpid(), _pid_namespace())
        self._renewals = store.retrying_for(_RENEW_RETRY_SECONDS)
        self._released, self._lost = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        #: The number of this holder, higher than that of every holder before; 0 before the lease is taken.
        self.epoch = 0
        self._renewed = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since it was taken or renewed."""
        return time.monotonic() - self._renewed

    @property
    def lost(self) -> bool:
        """Whether another run has taken the output over, as it may when this process was suspended for a minute.

        This becomes true within 15 seconds after the process resumes.
        """
        return self._lost.is_set()

    def acquire(self, say: Callable[[str], None], wait_seconds: float = math.inf) -> None:
        """Wait until no other run holds the lease, then take it. Raises OSError when the store does not answer.

        wait_seconds: how long to wait for a run that is alive, before ValueError is raised. Whether one on another
        machine is alive takes up to a minute to see. An exception, such as that of a signal, leaves no lease behind.
        """
        try:
            self._acquire(say, wait_seconds)
        except BaseException:
            self.release()
            raise

    def _acquire(self, say: Callable[[str], None], wait_seconds: float) -> None:
        announced, seen, since, renewed = "", None, 0.0, False
        began = time.monotonic()
        limit = "" if wait_seconds == math.inf else f" for up to {wait_seconds:g} s, once it is seen to be alive"
        while True:
            entry, version = _read(self._store)
            # The holder renews it every 15 seconds, whatever its clock says.
            if version != seen:
                renewed = seen is not None
                seen, since = version, time.monotonic()
            silent = time.monotonic() - since >= _TTL_SECONDS
            other = _former(self._store)
            is_alive = other is not None or renewed or (entry.is_of_this_machine and entry.is_live)
            if other is None and entry.is_held and not silent:
                other = entry
            if other is None:
                if self._take(entry, version):
                    break
                continue
            if is_alive and time.monotonic() - began >= wait_seconds:
                raise ValueError(
                    f"--output: {self._store.name}, in use by run {other.run_id} on {other.host}; legal: the same "
                    f"command once that has ended, --wait-for-output SECONDS, or another --output, as for each --shard"
                )
            if announced != other.run_id:
                say(f"{self._store.name} is in use by run {other.run_id} on {other.host}; waiting for it{limit}")
                announced = other.run_id
            time.sleep(_POLL_SECONDS)
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _take(self, entry: LeaseEntry, version: str) -> bool:
        """Write the lease; False when another run wrote its own meanwhile."""
        taken = self._write(self._store, entry.epoch + 1, version)
        if taken:
            self.epoch = entry.epoch + 1
        return taken

    def _write(self, store: Store, epoch: int, version: str) -> bool:
        entry = LeaseEntry(*self._process, expires=time.time() + _TTL_SECONDS, epoch=epoch)
        began = time.monotonic()
        written = _replace(store, LEASE_FILE, entry.encode(), version)
        if written:
            self._renewed = began
        return written

    def _is_own(self, entry: LeaseEntry) -> bool:
        return (entry.run_id, entry.host, entry.pid, entry.pid_namespace) == self._process

    def _renew(self) -> None:
        while not self._released.wait(_RENEW_SECONDS):
            try:
                entry, version = _read(self._renewals)
                # A file that somebody deleted or spoiled is written again.
                if entry != _UNREADABLE and not (self._is_own(entry) and entry.epoch == self.epoch):
                    self._lost.set()
                    return
                self._write(self._renewals, self.epoch, version)
            except OSError:
                continue  # the store may be back before the lease expires

    def release(self) -> None:
        """Give the lease back unless it is another run's. When the store does not answer, it expires by itself."""
        self._released.set()
        if self._thread is not None:
            self._thread.join(timeout=10)  # it may be in the middle of a renewal
        try:
            entry, version = _read(self._renewals)
            if self._is_own(entry):
                _replace(self._renewals, LEASE_FILE, replace(_UNREADABLE, epoch=entry.epoch).encode(), version)
        except OSError:
            pass


def holder(store: Store) -> LeaseEntry | None:
    """The lease of the run that works in `store`; None when there is none or the store does not answer."""
    try:
        entry, _ = _read(store)
        return entry if entry.is_live else _former(store)
    except OSError:
        return None


def write_fenced(store: Store, relative: str, record: bytes, epoch: int) -> bool:
    """Write a record, JSON with its holder's `epoch`; False when a later holder of the lease has written its own.

    A run that lost its lease without noticing cannot replace what its successor wrote. Raises OSError.
    """
    while True:
        present, version = _read_versioned(store, relative)
        try:
            if json.loads(present).get("epoch", 0) > epoch:
                return False
        except (ValueError, TypeError, AttributeError):
            pass  # there is none, or it is none
        if _replace(store, relative, record, version):
            return True


def _pid_namespace() -> str:
    """Identifies the set of processes among which a pid of this process is unique."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _read(store: Store) -> tuple[LeaseEntry, str]:
    """The lease in `store`, and its version, "" where there is no file. Raises OSError if the store does not answer."""
    data, version = _read_versioned(store, LEASE_FILE)
    try:
        return LeaseEntry.parse(data), version
    except (ValueError, KeyError, TypeError):
        return _UNREADABLE, version


def _former(store: Store) -> LeaseEntry | None:
    """The lease of a live run of ltx-ray 0.1. Raises OSError when the store does not answer."""
    try:
        entry = LeaseEntry.parse(store.read_bytes(_FORMER_FILE))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return entry if entry.is_live else None


def _read_versioned(store: Store, relative: str) -> tuple[bytes, str]:
    """A file and its version; nothing, in version "", where there is no file."""
    try:
        return store.read_versioned(relative)
    except FileNotFoundError:
        return b"", ""


def _replace(store: Store, relative: str, data: bytes, version: str) -> bool:
    """Write a file that is still in `version`; see `_read_versioned`."""
    return store.update(relative, data, version) if version else store.create(relative, data)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
