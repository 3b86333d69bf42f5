"""The GPU time that all runs of an output have reserved: `state/gpu_time.json`. A limit on it outlives a run."""

from __future__ import annotations

import contextlib
import json
import threading

from ltx_ray.dataset.layout import GPU_TIME
from ltx_ray.dataset.report_text import finite
from ltx_ray.storage.lease import write_fenced
from ltx_ray.storage.store import Store


def read_gpu_seconds(store: Store) -> float:
    """How long all runs so far have reserved GPUs, in seconds. Raises OSError when the record cannot be read."""
    try:
        record = json.loads(store.read_bytes(GPU_TIME))
    except FileNotFoundError:
        return 0.0
    except ValueError:
        return 0.0  # Damaged, so that nothing is known.
    return max(finite(record.get("gpu_seconds")) or 0.0, 0.0) if isinstance(record, dict) else 0.0


class GpuTime:
    """The record of an output, for a run whose lease has this `epoch`. Raises OSError when it cannot be read."""

    def __init__(self, store: Store, epoch: int):
        self._store, self._epoch = store, epoch
        #: Seconds of earlier runs.
        self.before = read_gpu_seconds(store)
        self._writing: threading.Thread | None = None

    def check(self, max_hours: float | None) -> None:
        """Raise ValueError when earlier runs have used up `max_hours` (--max-gpu-hours)."""
        hours = self.before / 3600
        if max_hours is not None and hours >= max_hours:
            raise ValueError(
                f"--max-gpu-hours: {max_hours:g}, of which earlier runs into this output have reserved {hours:.2f}; "
                f"legal: a larger number"
            )

    def write(self, seconds: float) -> None:
        """Record the seconds of all runs so far. A store that fails loses them until the next time."""
        if self._writing is not None:
            self._writing.join()
        self._put(seconds)

    def refresh(self, seconds: float) -> None:
        """Write on a thread of its own, unless the last one is still writing."""
        if self._writing is None or not self._writing.is_alive():
            self._writing = threading.Thread(target=self._put, args=(seconds,), name="gpu time", daemon=True)
            self._writing.start()

    def _put(self, seconds: float) -> None:
        if seconds > 0:
            record = json.dumps({"epoch": self._epoch, "gpu_seconds": round(seconds, 1)})
            with contextlib.suppress(OSError):
                write_fenced(self._store, GPU_TIME, record.encode(), self._epoch)
