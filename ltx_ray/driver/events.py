"""What happened and how long it took: the events of a run in its output."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Collection
from typing import Any, Protocol

import pyarrow as pa
from pydantic_core import to_json

from ltx_ray.dataset.layout import EVENTS, event_segments
from ltx_ray.dataset.run_summary import SummaryBuilder
from ltx_ray.driver.row_traces import RowTraces
from ltx_ray.storage.credentials import masked
from ltx_ray.storage.store import Store

#: Seconds after which events are written.
_FLUSH_SECONDS = 2.0
_REMOTE_FLUSH_SECONDS = 60.0
#: Events that a local log has at once: tests and operators look for the processes that they name.
_AT_ONCE = frozenset({"gang_started"})
#: Bytes of events in a segment, before it is compressed.
SEGMENT_BYTES = 8 * 2**20
#: Most bytes of events that wait for a store that fails. The oldest are given up beyond it.
_MOST_PENDING = 4 * SEGMENT_BYTES
#: Events that are made lines and summed up together, which takes half as long as one at a time between other work.
_GROUP = 128
#: Seconds for which a write is retried. Events that cannot be written are written with the next ones.
_RETRY_SECONDS = 2.0


def _line(entry: dict[str, Any]) -> str:
    if "stage" in entry:
        entry["stage"] = str(entry["stage"])  # An enum would take longer than all other fields together.
    try:
        text = to_json(entry, fallback=str).decode()
    except ValueError:  # a text that UTF-8 cannot hold, such as bytes of a file's name
        text = json.dumps(entry, ensure_ascii=False, default=str)
    return masked(text) + "\n"


class _Log(Protocol):
    """Where events go: whole lines, in order, on one thread at a time."""

    @property
    def period(self) -> float:
        """Seconds after which events are written."""

    @property
    def at_once(self) -> Collection[str]:
        """Events that are written at once."""

    @property
    def waiting(self) -> bool:
        """Whether lines that were taken could not be written yet."""

    def take(self, lines: str) -> bool:
        """Take lines, and write them and what waits. False when they could not be taken."""


class _LocalLog:
    """`events.jsonl`, to which lines are appended. A full one becomes a compressed segment of the run."""

    at_once, waiting = _AT_ONCE, False

    def __init__(self, store: Store, segments: str):
        self._store, self._segments = store, segments
        self.period = _FLUSH_SECONDS
        self._count = self._size = 0
        #: Whether the file holds this run's events. Until its first write it may hold those of an older run.
        self._begun = False

    def take(self, lines: str) -> bool:
        try:
            if not self._begun:
                self._store.write_bytes(EVENTS, lines.encode("utf-8", "replace"))
            elif lines:
                self._store.append_text(EVENTS, lines)
        except OSError:
            return False
        self._begun, self._size = True, self._size + len(lines)
        if self._size >= SEGMENT_BYTES:
            self._end_segment()
        return True

    def _end_segment(self) -> None:
        """Begin the file anew. It is renamed first, so that a crash leaves no event in two files."""
        full = f"{self._segments}/{self._count + 1:06d}.jsonl"
        try:
            os.makedirs(self._store.path(self._segments), exist_ok=True)
            self._store.move(EVENTS, full)
            self._count, self._size, self._begun = self._count + 1, 0, False
            self._begun = self.take("")
            self._store.write_bytes(f"{full}.zst", _compressed(self._store.read_bytes(full)))
            self._store.delete(full)
        except OSError:
            pass  # The file grows on, or the segment stays as it is.


class _RemoteLog:
    """Segments in an object store, each written once: an object cannot be appended to."""

    at_once = frozenset[str]()

    def __init__(self, store: Store, segments: str):
        self._store, self._segments = store, segments
        self.period = _REMOTE_FLUSH_SECONDS
        self._count = 0
        #: (name, bytes) of a segment that could not be written. A store may have it though its answer was lost, so that
        #: it is written again as it is.
        self._unsent: tuple[str, bytes] | None = None

    @property
    def waiting(self) -> bool:
        return self._unsent is not None

    def take(self, lines: str) -> bool:
        if not self._send():
            return False
        if lines:
            self._count += 1
            name = f"{self._segments}/{self._count:06d}.jsonl.zst"
            self._unsent = name, _compressed(lines.encode("utf-8", "replace"))
            self._send()
        return True

    def _send(self) -> bool:
        try:
            if self._unsent is not None:
                self._store.write_bytes(*self._unsent)
        except OSError:
            return False
        self._unsent = None
        return True


class EventLog:
    """The events of a run: JSON objects, one per line, with `t` (seconds since the epoch) and `event`.

    In a local output, `events.jsonl` grows by appending. Whenever it holds SEGMENT_BYTES it moves, compressed, to
    `state/events/<run>/<number>.jsonl.zst`. In an object store all events go there, in segments of a minute or of
    SEGMENT_BYTES. No segment is written to again, and no run reads one.

    A thread writes them. A write that fails does not stop the run: the lines wait for the next one. When many have to
    wait, the oldest are given up, and an event `events_lost` says how many.
    """

    def __init__(self, store: Store, run_id: str, traces: RowTraces | None = None):
        """`traces`: what else takes the events, if anything does."""
        self.run_id, self._traces = run_id, traces
        self._summary = SummaryBuilder()
        #: Events that are no lines yet.
        self._entries: list[dict[str, Any]] = []
        store, segments = store.retrying_for(_RETRY_SECONDS), event_segments(run_id)
        self._log: _Log = _LocalLog(store, segments) if store.is_local else _RemoteLog(store, segments)
        #: Lines that no write has taken, and their characters. `_lines_lock` guards them, the entries, the summary and
        #: `_thread`.
        self._lines: list[str] = []
        self._size = self._lost = 0
        self._lines_lock, self._log_lock = threading.Lock(), threading.Lock()
        self._due = threading.Event()
        self._thread: threading.Thread | None = None
        self.flush()

    @property
    def summary(self) -> SummaryBuilder:
        """What the record of the run says of its events so far. For the thread that emits them."""
        with self._lines_lock:
            self._take_entries()
        return self._summary

    def emit(self, event: str, **fields: Any) -> None:
        """Add an event; it is written within seconds, or within a minute to an object store.

        The values of `fields` must not change any more.
        """
        with self._lines_lock:
            self._entries.append({"t": round(time.time(), 3), "event": event, **fields})
            if self._thread is None:
                self._due.clear()
                self._thread = threading.Thread(target=self._write_on, name="events", daemon=True)
                self._thread.start()
            size = self._size
            if len(self._entries) >= _GROUP:
                self._take_entries()
            # Only once on the way: behind a store that fails, each further event would try it again.
            full = self._size >= SEGMENT_BYTES > size
            if full or event in self._log.at_once:
                self._due.set()

    def _take_entries(self) -> None:
        """Make lines of the events, and sum them up."""
        for entry in self._entries:
            self._summary.add(entry)
            if self._traces is not None:
                self._traces.take(entry)
            line = _line(entry)
            self._lines.append(line)
            self._size += len(line)
        self._entries.clear()

    def flush(self) -> None:
        """Write the pending events, and return when that was tried."""
        self._write()
        self._due.set()

    def _write_on(self) -> None:
        """Write what is pending when it is due, until nothing is."""
        while True:
            self._due.wait(self._log.period)
            self._due.clear()
            self._write()
            with self._lines_lock:
                if not self._entries and not self._lines and not self._log.waiting:
                    self._thread = None
                    return

    def _write(self) -> None:
        with self._log_lock:
            with self._lines_lock:
                self._take_entries()
                lines, self._lines, self._size = self._lines, [], 0
            if self._lost:
                entry = {"t": round(time.time(), 3), "event": "events_lost", "count": self._lost}
                lines.insert(0, json.dumps(entry) + "\n")
            if self._log.take("".join(lines)):
                self._lost = 0
                return
            if self._lost:
                del lines[0]
            with self._lines_lock:
                self._lines = lines + self._lines
                self._size = sum(map(len, self._lines))
                while self._size > _MOST_PENDING:
                    self._size -= len(self._lines.pop(0))
                    self._lost += 1


def _compressed(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)
