"""What happened and how long it took: `events.jsonl` in the output, counters in Ray's metrics."""

from __future__ import annotations

import json
import math
import tempfile
import threading
import time
from functools import cached_property
from typing import Any

from ltx_ray.dataset.layout import EVENTS
from ltx_ray.storage.credentials import masked
from ltx_ray.storage.store import Store

_FLUSH_SECONDS = 2.0
_REMOTE_FLUSH_SECONDS = 60.0
#: Seconds between two uploads of the whole log, as a multiple of the seconds of the last one.
_UPLOAD_INTERVAL_FACTOR = 20.0
#: Seconds for which a write is retried. Events that cannot be written are written with the next ones.
_RETRY_SECONDS = 2.0


class EventLog:
    """`events.jsonl`: one JSON object per line with `t` (seconds since the epoch) and `event`.

    A local file grows by appending. An object store cannot append: the lines are kept in a temporary file of this
    machine, and a thread writes the whole log again once a minute. When the log has grown large it does so less often,
    so that uploads take a twentieth of the time. A write that fails does not stop the run: the lines wait for the next
    flush. The last lines are lost if the store fails until the end.
    """

    def __init__(self, store: Store, name: str = EVENTS):
        self._store, self._name = store.retrying_for(_RETRY_SECONDS), name
        self._pending: list[str] = []
        #: Whether the file holds this run's events; until the first write it holds those of an older run.
        self._begun = False
        self._flushed, self._period = -math.inf, _FLUSH_SECONDS if store.is_local else _REMOTE_FLUSH_SECONDS
        self._spool = None if store.is_local else tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (open for the whole run)
        self._upload: threading.Thread | None = None
        self.flush()

    def emit(self, event: str, **fields: Any) -> None:
        """Add an event; it is written within seconds, or within a minute to an object store."""
        line = json.dumps({"t": round(time.time(), 3), "event": event, **fields}, ensure_ascii=False, default=str)
        self._pending.append(masked(line) + "\n")
        if time.monotonic() - self._flushed < self._period:
            return
        if self._spool is None:
            self._append()
        elif self._upload is None or not self._upload.is_alive():
            self._upload = threading.Thread(target=self._rewrite, args=(self._log(),), name="events", daemon=True)
            self._upload.start()

    def flush(self) -> None:
        """Write the pending events, and return when they are written."""
        if self._spool is None:
            self._append()
            return
        if self._upload is not None:
            self._upload.join()
        self._rewrite(self._log())

    def _append(self) -> None:
        lines = "".join(self._pending)
        try:
            if not self._begun:
                self._store.write_bytes(self._name, lines.encode("utf-8", "replace"))
            elif lines:
                self._store.append_text(self._name, lines)
            self._begun, self._pending = True, []
        except OSError:
            pass
        self._flushed = time.monotonic()

    def _log(self) -> bytes:
        """The whole log. The pending lines move into the temporary file, unless its disk is full."""
        assert self._spool is not None
        lines = "".join(self._pending).encode("utf-8", "replace")
        self._spool.seek(0)
        log = self._spool.read() + lines
        try:
            self._spool.write(lines)
            self._pending = []
        except OSError:
            self._spool.truncate(len(log) - len(lines))
        return log

    def _rewrite(self, log: bytes) -> None:
        began = time.monotonic()
        try:
            self._store.write_bytes(self._name, log)
        except OSError:
            pass
        self._flushed = time.monotonic()
        self._period = max(_REMOTE_FLUSH_SECONDS, _UPLOAD_INTERVAL_FACTOR * (self._flushed - began))


class RunMetrics:
    """Counters and timings of a run in `ray.util.metrics`, for the cluster's Prometheus.

    They are created on first use, because metrics need a cluster, and a run without work never joins one.
    """

    @cached_property
    def _items(self) -> Any:
        from ray.util import metrics

        return metrics.Counter("ltx_ray_items", "Finished items by outcome", tag_keys=("outcome",))

    @cached_property
    def _seconds(self) -> Any:
        from ray.util import metrics

        return metrics.Histogram(
            "ltx_ray_call_seconds",
            "Seconds of engine calls by stage",
            boundaries=[0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000],
            tag_keys=("stage",),
        )

    def item(self, outcome: str) -> None:
        """Count a row whose item ended: "rendered" or "failed"."""
        self._items.inc(1, tags={"outcome": outcome})

    def call(self, stage: str, seconds: float) -> None:
        """Record the duration of an engine call."""
        self._seconds.observe(seconds, tags={"stage": stage})
