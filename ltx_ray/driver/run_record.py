"""`run.json`: what the newest run is, how far it is and what it runs on. It informs people; no run reads it back."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ltx_ray
from ltx_ray.checkpoints.checkpoint import Checkpoint
from ltx_ray.config import Numerics, PoolSpec, RequestedNumerics
from ltx_ray.dataset import layout
from ltx_ray.dataset.clip_rate import UNFINISHED, final_rate
from ltx_ray.placement.numerics import numerics_json
from ltx_ray.placement.sizing import ParallelConfig
from ltx_ray.storage.lease import write_fenced
from ltx_ray.storage.store import Store

#: Seconds for which an output that cannot be reached is retried before the record is given up.
_RETRY_SECONDS = 10.0
_PACKAGES = ("torch", "ray", "diffusers", "transformers", "safetensors", "av", "pyarrow")
#: The counts of rows that the record and the last line of a run have.
_COUNTS = ("rows", "rendered", "already_done", "failed", "illegal")


class RunRecord:
    """The record of one run. It is written again whenever the run's state changes.

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
        self._numerics = _unresolved(requested, parallel)
        #: The clips/h of the whole run, once it has ended.
        self.clips_per_hour: float | None = None
        #: Of this package and of those whose versions may change bits, by name; None for one that is missing.
        self.versions = {"ltx_ray": ltx_ray.__version__, **{name: _version(name) for name in _PACKAGES}}

    def place(self, pools: Sequence[PoolSpec], numerics: Numerics) -> None:
        """Take in what the run got on its cluster."""
        self._pools = {pool.name: pool.replicas for pool in pools}
        self._numerics = json.loads(numerics_json(numerics))

    def write(self, state: str, counts: Mapping[str, int], clips: int = 0) -> None:
        """`state`: running, draining, drained, finished or failed. `clips`: those that the run has made so far.

        A store that cannot be reached loses the record.
        """
        finished = None if state in UNFINISHED else _now()
        self.clips_per_hour = final_rate(clips, self._started, finished)
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
            "counts": recorded_counts(counts),
            "clips": clips,
            "clips_per_hour": self.clips_per_hour,
            "versions": self.versions,
        }
        with contextlib.suppress(OSError):
            data = json.dumps(record, indent=2, ensure_ascii=False).encode()
            write_fenced(self._store, layout.RUN_RECORD, data, self._epoch)


def recorded_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """The counts that people see, zeros included."""
    return {name: counts.get(name, 0) for name in _COUNTS}


def keep_older_run(store: Store) -> None:
    """Copy the records of the run before this one to `runs/<its id>/`."""
    try:
        older = json.loads(store.read_bytes(layout.RUN_RECORD))["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if not isinstance(older, str) or os.path.basename(older) != older:
        return  # Not a name that a run has.
    for name in (layout.RUN_RECORD, layout.EVENTS, layout.REPORT):
        if store.exists(name):
            store.write_bytes(layout.older_record(older, name), store.read_bytes(name))


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


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
