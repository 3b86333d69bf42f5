"""`run.json`: what the newest run is, how far it is and what it runs on. It informs people; no run reads it back."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ltx_ray.checkpoints.checkpoint import Checkpoint
from ltx_ray.config import Numerics, PoolSpec, RequestedNumerics
from ltx_ray.dataset import layout
from ltx_ray.dataset.clip_rate import UNFINISHED, final_rate, rate_text
from ltx_ray.dataset.package_versions import package_versions
from ltx_ray.dataset.quality import QualitySums
from ltx_ray.dataset.run_cost import RunCost
from ltx_ray.dataset.run_summary import SummaryBuilder
from ltx_ray.placement.numerics import numerics_json
from ltx_ray.placement.sizing import ParallelConfig
from ltx_ray.records import plain
from ltx_ray.storage.credentials import masked
from ltx_ray.storage.lease import write_fenced
from ltx_ray.storage.store import Store

#: Seconds between two records of a run whose state stays the same.
_REFRESH_SECONDS, _REMOTE_REFRESH_SECONDS = 10.0, 60.0
#: Seconds for which an output that cannot be reached is retried before the record is given up.
_RETRY_SECONDS = 10.0
#: The counts of rows that the record and the last line of a run have.
_COUNTS = ("rows", "rendered", "already_done", "failed", "illegal")


@dataclass(frozen=True)
class SoFar:
    """What a run has done so far.

    `clips`: those that it has made. `summary`: of its events, with the timeline, which is written beside them. `rate`:
    the clips/h of now. `cost` and `quality`: of its clips. `expected_rows`: all rows, where that is known.
    """

    counts: Mapping[str, int]
    clips: int = 0
    summary: SummaryBuilder | None = None
    rate: float | None = None
    cost: RunCost | None = None
    quality: QualitySums | None = None
    expected_rows: int | None = None


class RunRecord:
    """The record of one run. It is written again whenever the run's state changes, and from time to time in between.

    `epoch` is that of the run's lease: the record of a run that took the output over is not replaced.
    """

    def __init__(
        self,
        store: Store,
        *,
        run_id: str,
        epoch: int,
        command: Sequence[str],
        manifest: str,
        output: str,
        checkpoint: Checkpoint,
        parallel: ParallelConfig,
        requested: RequestedNumerics,
    ):
        self._store = store.retrying_for(_RETRY_SECONDS)
        self._started = _now()
        self._run: dict[str, Any] = {"command": list(command), "manifest": manifest, "output": output}
        self._model = {"checkpoint": checkpoint.path, "model_version": checkpoint.model_version}
        self._run_id, self._epoch, self._tp = run_id, epoch, parallel.tp
        self._pools: dict[str, int] = {}
        self._state, self._written = "", -math.inf
        self._period = _REFRESH_SECONDS if store.is_local else _REMOTE_REFRESH_SECONDS
        self._refresh: threading.Thread | None = None
        self._numerics = _unresolved(requested, parallel)
        #: The clips/h of the whole run, once it has ended.
        self.clips_per_hour: float | None = None
        #: Those of this process, until a replica has told its own.
        self.versions: Mapping[str, str | None] = package_versions()

    def place(self, pools: Sequence[PoolSpec], numerics: Numerics) -> None:
        """Take in what the run got on its cluster."""
        self._pools = {pool.name: pool.replicas for pool in pools}
        self._numerics = json.loads(numerics_json(numerics))
        self._tp = numerics.tp

    def write(self, state: str, so_far: SoFar) -> None:
        """`state`: running, draining, drained, finished or failed. A store that cannot be reached loses the record."""
        files = self._files(state, so_far)
        if self._refresh is not None:
            self._refresh.join()
        self._put(files)

    @property
    def due(self) -> bool:
        """Whether the record is due to be refreshed. Cheap enough for every turn of the driver's loop."""
        if time.monotonic() - self._written < self._period:
            return False
        return self._refresh is None or not self._refresh.is_alive()

    def refresh(self, so_far: SoFar) -> None:
        """Write it again with the same state, on a thread of its own."""
        files = self._files(self._state, so_far)
        self._refresh = threading.Thread(target=self._put, args=(files,), name="record", daemon=True)
        self._refresh.start()

    def _files(self, state: str, so_far: SoFar) -> dict[str, bytes]:
        """What is to be written, by its path."""
        self._state, self._written = state, time.monotonic()
        finished = None if state in UNFINISHED else _now()
        self.clips_per_hour = final_rate(so_far.clips, self._started, finished)
        record = {
            "run_id": self._run_id,
            "epoch": self._epoch,
            "state": state,
            "started_at": self._started,
            "finished_at": finished,
            **self._run,
            **self._model,
            "pools": self._pools,
            "tp": self._tp,
            "numerics": self._numerics,
            "device": self._numerics["device"],
            "counts": recorded_counts(so_far.counts),
            "expected_rows": so_far.expected_rows,
            "clips": so_far.clips,
            "clips_per_hour": self.clips_per_hour,
            "cost": None if so_far.cost is None else plain(so_far.cost),
            "quality": None if so_far.quality is None else so_far.quality.summary(),
            "versions": dict(self.versions),
        }
        files = {}
        if (summary := so_far.summary) is not None:
            record["summary"] = plain(summary.summary(round(time.time(), 3), so_far.rate))
            if (timeline := summary.timeline()) is not None:
                files[layout.timeline_path(self._run_id)] = masked(timeline.json()).encode()
        # The record comes last, so that a timeline is there when it can be read.
        return {**files, layout.RUN_RECORD: json.dumps(record, indent=2, ensure_ascii=False).encode()}

    def _put(self, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            with contextlib.suppress(OSError):
                if name == layout.RUN_RECORD:
                    write_fenced(self._store, name, data, self._epoch)
                else:
                    self._store.write_bytes(name, data)


def recorded_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """The counts that people see, zeros included, and the rows that were taken down before, if any."""
    removed = {"removed": n} if (n := counts.get("removed", 0)) else {}
    return {name: counts.get(name, 0) for name in _COUNTS} | removed


def summary_line(state: str, counts: Mapping[str, int], rate: float | None, output: str) -> str:
    """The last line of a run. `rate` in clips/h."""
    parts = [f"{counts['rendered']} rendered" + (f" ({rate_text(rate)})" if rate else "")]
    if counts["already_done"]:
        parts.append(f"{counts['already_done']} done before")
    if counts.get("removed"):
        parts.append(f"{counts['removed']} taken down before")
    for what in ("failed", "illegal"):
        if counts[what]:
            parts.append(f"{counts[what]} {what}")
    if counts["failed"] + counts["illegal"]:
        parts.append(f"listed in {output}/failed")
    return f"{state}: {counts['rows']} rows, {', '.join(parts)}"


def last_lines(
    state: str, counts: Mapping[str, int], at_fault: int, rate: float | None, output: str, is_retry: bool = False
) -> Iterator[str]:
    """The last lines of a run. `at_fault`: rows that failed by their own fault, without illegal ones.

    `is_retry`: the same command renders those again.
    """
    if at_fault and state == "finished" and not is_retry:
        yield retry_line(at_fault, output)
    yield summary_line(state, counts, rate, output)


def retry_line(rows: int, output: str) -> str:
    """What becomes of rows that failed by their own fault."""
    return (
        f"{rows} rows failed by their own fault, in this run or before: the same command passes them over, and "
        f"ltx-ray retry {output} renders them again"
    )


def keep_older_run(store: Store) -> None:
    """Keep the records of the run before this one in `runs/<its id>/`. Its events are not read, but renamed."""
    try:
        older = json.loads(store.read_bytes(layout.RUN_RECORD))["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if not isinstance(older, str) or os.path.basename(older) != older:
        return  # Not a name that a run has.
    for name in (layout.RUN_RECORD, layout.REPORT):
        if store.exists(name):
            store.write_bytes(layout.older_record(older, name), store.read_bytes(name))
    # If they are there already, those of now belong to a run that was killed before it had a record.
    kept = layout.older_record(older, layout.EVENTS)
    if store.exists(layout.EVENTS) and not store.exists(kept):
        # Into an object store, only a version before wrote this file. One of over 5 GB cannot be renamed there.
        with contextlib.nullcontext() if store.is_local else contextlib.suppress(OSError):
            store.move(layout.EVENTS, kept)


def _unresolved(requested: RequestedNumerics, parallel: ParallelConfig) -> dict[str, Any]:
    """The numerics of a run that has joined no cluster, in the fields of resolved ones."""
    fields = Numerics(
        dtype=requested.dtype,
        precision=requested.precision,
        noise_device=requested.noise_device,
        attention=requested.attention,
        compile=requested.compile,
        tp=parallel.tp,
        stage2_tp=parallel.tp_of_stage2,
        guidance_parallel=parallel.guidance_parallel,
        sequence_parallel=parallel.sequence_parallel,
        stage1_sequence_parallel=parallel.stage1_sequence_parallel,
    )
    return json.loads(numerics_json(fields))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
