"""The metrics of a run in `ray.util.metrics`, for the cluster's Prometheus, which reads them as `ray_ltx_ray_…`.

Prometheus adds `_total` to the names of counters. All have the label `run`. docs/monitoring.md#metrics lists them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ltx_ray.stages import Stage


@dataclass(frozen=True)
class Metric:
    """`counts`: a counter, which only grows. `buckets`: a histogram with these upper bounds. Otherwise a gauge."""

    help: str
    labels: tuple[str, ...] = ()
    counts: bool = False
    buckets: tuple[float, ...] = ()


#: Seconds of calls, from a tenth of one to two hours. Each bound is a quarter above the one before, and so is the error
#: of a quantile at most. Quantiles of a few fixed times could not be added up over runs, or read for another window.
_CALL_SECONDS = tuple(
    round(step * 10.0**power, 4)
    for power in range(-1, 4)
    for step in (1.0, 1.25, 1.6, 2.0, 2.5, 3.15, 4.0, 5.0, 6.3, 8.0)
)


METRICS: Mapping[str, Metric] = {
    "ltx_ray_clips": Metric("Clips that the run has published, each once", counts=True),
    "ltx_ray_stage_calls": Metric("Calls of a stage that came back", ("stage", "ok"), counts=True),
    "ltx_ray_stage_seconds": Metric("Seconds of those calls", ("stage", "ok"), counts=True),
    "ltx_ray_call_seconds": Metric("The same of calls that succeeded, by buckets", ("stage",), buckets=_CALL_SECONDS),
    "ltx_ray_waited_seconds": Metric("Seconds that replicas of a stage waited", ("stage", "cause"), counts=True),
    "ltx_ray_gpu_busy_seconds": Metric("GPU seconds of calls", ("stage",), counts=True),
    "ltx_ray_gpu_reserved_seconds": Metric("GPU seconds that the run has reserved", ("pool",), counts=True),
    "ltx_ray_driver_busy_seconds": Metric("Seconds in which the driver's loop did not wait", counts=True),
    "ltx_ray_driver_memory_bytes": Metric("Memory of the driver's process"),
    "ltx_ray_driver_memory_limit_bytes": Metric("Memory of its machine or container"),
    "ltx_ray_store_requests": Metric(
        "Requests to object stores, of the driver and the ranks", ("kind", "outcome"), counts=True
    ),
    "ltx_ray_events": Metric("Events of the run, by their names in events.jsonl", ("event",), counts=True),
    "ltx_ray_rows": Metric("Rows of the manifest by what became of them", ("state",)),
    "ltx_ray_replicas": Metric("Replicas: placing, starting, idle or busy", ("pool", "state")),
    "ltx_ray_replicas_wanted": Metric("Replicas that there should be", ("pool",)),
    "ltx_ray_gangs_lost": Metric("Replicas that were lost, by what has ended them", ("pool", "cause"), counts=True),
    "ltx_ray_queue": Metric("Clips that wait before a stage", ("stage",)),
    "ltx_ray_inflight_bytes": Metric("Bytes of results in the object store"),
    "ltx_ray_inflight_limit_bytes": Metric("Bytes that those results may take"),
    "ltx_ray_publish_backlog": Metric("Rows that wait to be committed"),
    "ltx_ray_unfolded_rows": Metric("Finished rows that are in no part of the index yet"),
    "ltx_ray_unfolded_age_seconds": Metric("For how long the oldest of those waits"),
    "ltx_ray_lease_age_seconds": Metric("Seconds since the run's lease was renewed"),
    "ltx_ray_nodes_excluded": Metric("Nodes that are excluded"),
    "ltx_ray_cards_left_alone": Metric("Cards that are left alone"),
    "ltx_ray_clips_per_hour": Metric("The rate, as the console says it"),
    "ltx_ray_tflop_done": Metric("TFLOP of the clips that the run has published"),
    "ltx_ray_tflop_left": Metric("TFLOP of the clips that are left, an estimate"),
    "ltx_ray_seconds_left": Metric("Seconds until the last row, an estimate"),
    "ltx_ray_gpu_hours": Metric("GPU hours that all runs into the output have reserved"),
    "ltx_ray_gpu_hours_limit": Metric("--max-gpu-hours"),
}


class _Recorder(Protocol):
    """A Counter, a Gauge or a Histogram of `ray.util.metrics`."""

    def inc(self, value: float, tags: dict[str, str]) -> None: ...

    def set(self, value: float, tags: dict[str, str]) -> None: ...

    def observe(self, value: float, tags: dict[str, str]) -> None: ...


def _in_ray(name: str, metric: Metric) -> Any:
    from ray.util import metrics

    labels = ("run", *metric.labels)
    if metric.buckets:
        return metrics.Histogram(name, metric.help, list(metric.buckets), labels)
    kind = metrics.Counter if metric.counts else metrics.Gauge
    return kind(name, metric.help, tag_keys=labels)


class RunMetrics:
    """Each is created on first use, because metrics need a cluster, and a run without work never joins one."""

    def __init__(self, run: str, make: Callable[[str, Metric], _Recorder] = _in_ray):
        self._run, self._make = run, make
        self._made: dict[str, _Recorder] = {}
        #: A recorder with its tags, by name and the values of labels.
        self._known: dict[tuple[str, tuple[str, ...]], tuple[_Recorder, dict[str, str]]] = {}
        #: Calls, their seconds and their GPU seconds since `tell_calls`, by stage and success.
        self._calls: dict[tuple[Stage, bool], tuple[int, float, float]] = {}
        #: What counters have reached, by name and labels.
        self._totals: Counter[tuple[str, tuple[str, ...]]] = Counter()

    def _of(self, name: str, values: tuple[str, ...]) -> tuple[_Recorder, dict[str, str]]:
        if (known := self._known.get((name, values))) is None:
            if name not in self._made:
                self._made[name] = self._make(name, METRICS[name])
            tags = {"run": self._run, **dict(zip(METRICS[name].labels, map(str, values), strict=True))}
            known = self._known[name, values] = self._made[name], tags
        return known

    def add(self, name: str, value: float, *labels: str) -> None:
        """Have a counter grow. `labels`: their values, in order."""
        if value > 0:
            recorder, tags = self._of(name, labels)
            recorder.inc(value, tags)

    def reach(self, name: str, total: float, *labels: str) -> None:
        """Have a counter grow to what is counted elsewhere."""
        before = self._totals[name, labels]
        self._totals[name, labels] = max(before, total)  # type: ignore[assignment]  # Counters take floats.
        self.add(name, total - before, *labels)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        recorder, tags = self._of(name, labels)
        recorder.set(value, tags)

    def call(self, stage: Stage, ok: bool, seconds: float, gpus: float) -> None:
        """A call has come back, whose replica holds so many GPUs. Counters grow with `tell_calls`."""
        calls, total, gpu_seconds = self._calls.get((stage, ok), (0, 0.0, 0.0))
        self._calls[stage, ok] = calls + 1, total + seconds, gpu_seconds + seconds * gpus
        if ok:
            recorder, tags = self._of("ltx_ray_call_seconds", (stage,))
            recorder.observe(seconds, tags)

    def tell_calls(self) -> None:
        """Have the counters of calls grow by those since the last time."""
        told, self._calls = self._calls, {}
        for (stage, ok), (calls, seconds, gpu_seconds) in told.items():
            succeeded = "true" if ok else "false"
            self.add("ltx_ray_stage_calls", calls, stage, succeeded)
            self.add("ltx_ray_stage_seconds", seconds, stage, succeeded)
            self.add("ltx_ray_gpu_busy_seconds", gpu_seconds, stage)
