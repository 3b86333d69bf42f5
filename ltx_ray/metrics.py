"""What happened and how long it took: `events.jsonl` in the output, counters in Ray's metrics."""

from __future__ import annotations

import json
import time
from functools import cached_property
from typing import Any

from ltx_ray.storage import Store

_FLUSH_SECONDS = 2.0
_REMOTE_FLUSH_SECONDS = 60.0


class EventLog:
    """`events.jsonl`: one JSON object a line with `t` (seconds since the epoch) and `event`.

    Local files grow by appending. An object store has no append: there the run's lines are kept and
    the whole file is written again once a minute and at the end.
    """

    def __init__(self, store: Store, name: str = "events.jsonl"):
        self._store, self._name = store, name
        self._pending: list[str] = []
        self._all: list[str] = []
        self._flushed = 0.0
        store.write_bytes(name, b"")

    def emit(self, event: str, **fields: Any) -> None:
        line = json.dumps({"t": round(time.time(), 3), "event": event, **fields}, ensure_ascii=False, default=str)
        self._pending.append(line + "\n")
        period = _FLUSH_SECONDS if self._store.is_local else _REMOTE_FLUSH_SECONDS
        if time.monotonic() - self._flushed >= period:
            self.flush()

    def flush(self) -> None:
        """Write what has not been written yet."""
        if self._pending:
            if self._store.is_local:
                self._store.append_text(self._name, "".join(self._pending))
            else:
                self._all += self._pending
                self._store.write_bytes(self._name, "".join(self._all).encode())
            self._pending = []
        self._flushed = time.monotonic()


class RunMetrics:
    """Counters and timings of a run in `ray.util.metrics`, where the cluster's Prometheus finds them.

    Made when first used: metrics want a cluster, which a run without work never joins.
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
        self._items.inc(1, tags={"outcome": outcome})

    def call(self, stage: str, seconds: float) -> None:
        self._seconds.observe(seconds, tags={"stage": stage})
