"""The state of a run as metrics, every few seconds: read where it is kept, so that nothing is counted a second time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping

from ltx_ray.doctor.system import memory_bytes, own_memory
from ltx_ray.driver.policy import Policy
from ltx_ray.driver.tracker import RowTracker
from ltx_ray.driver.waits import WaitReport
from ltx_ray.pools.pool import Pool
from ltx_ray.pools.protocol import LossCause, ReplicaSet
from ltx_ray.stages import Stage
from ltx_ray.storage.requests import REQUESTS

#: Seconds between two looks. Ray exports every five.
_PERIOD = 5.0


class RunGauges:
    """`gpu_seconds`: of this run and of all runs. `seconds_left` where the stages were measured, or None.

    `busy_seconds`: those in which the driver's loop did not wait. `losses`: of replicas, by pool and cause.
    """

    def __init__(
        self,
        tracker: RowTracker,
        policy: Policy,
        pools: Collection[Pool],
        replicas: ReplicaSet,
        waits: WaitReport,
        *,
        lease_age: Callable[[], float],
        gpu_seconds: Callable[[], float],
        max_gpu_hours: float | None,
        seconds_left: Callable[[], float | None],
        busy_seconds: Callable[[], float],
        losses: Mapping[tuple[str, LossCause], int],
    ):
        self._tracker, self._policy, self._pools, self._replicas = tracker, policy, pools, replicas
        self._lease_age, self._gpu_seconds, self._seconds_left = lease_age, gpu_seconds, seconds_left
        self._max_gpu_hours, self._busy_seconds, self._losses = max_gpu_hours, busy_seconds, losses
        #: What the stages wait for, which is told beside them.
        self.waits = waits
        self._told = -float("inf")

    def tell(self, now: float, ended: bool = False) -> None:
        """Set them when they are due at `now`, in seconds of the driver's clock, and at the end of the run."""
        self.waits.tell(now, ended)
        if ended or now - self._told >= _PERIOD:
            self._told = now
            self._tell()
            if ended:
                self._tracker.metrics.set("ltx_ray_seconds_left", 0.0)

    def _tell(self) -> None:
        metrics, tracker = self._tracker.metrics, self._tracker
        for state, rows in row_states(tracker).items():
            metrics.set("ltx_ray_rows", rows, state)
        metrics.reach("ltx_ray_clips", tracker.rate.clips)
        metrics.tell_calls()
        self._tell_replicas()
        for stage in Stage:
            metrics.set("ltx_ray_queue", self._policy.queued(stage), stage)
        metrics.set("ltx_ray_inflight_bytes", sum(tracked.nbytes for tracked in tracker.items.values()))
        metrics.set("ltx_ray_inflight_limit_bytes", self._policy.max_bytes)
        metrics.set("ltx_ray_publish_backlog", tracker.publisher.pending)
        metrics.set("ltx_ray_unfolded_rows", tracker.plan.existing.pending_count)
        metrics.set("ltx_ray_unfolded_age_seconds", tracker.writer.log.oldest_age)
        metrics.set("ltx_ray_lease_age_seconds", self._lease_age())
        summary = tracker.events.summary
        for event, count in summary.counts.items():
            metrics.reach("ltx_ray_events", count, event)
        metrics.set("ltx_ray_nodes_excluded", summary.excluded)
        metrics.set("ltx_ray_cards_left_alone", summary.parked)
        for pool, seconds in self._replicas.gpu_seconds_by_pool().items():
            metrics.reach("ltx_ray_gpu_reserved_seconds", seconds, pool)
        metrics.set("ltx_ray_gpu_hours", self._gpu_seconds() / 3600)
        if self._max_gpu_hours is not None:
            metrics.set("ltx_ray_gpu_hours_limit", self._max_gpu_hours)
        metrics.reach("ltx_ray_driver_busy_seconds", self._busy_seconds())
        if (memory := own_memory()) is not None:
            metrics.set("ltx_ray_driver_memory_bytes", memory)
            metrics.set("ltx_ray_driver_memory_limit_bytes", memory_bytes())
        for kind, outcome, number in REQUESTS.take():
            metrics.add("ltx_ray_store_requests", number, kind, outcome)
        self._tell_progress()

    def _tell_replicas(self) -> None:
        metrics, placing = self._tracker.metrics, self._replicas.placing()
        busy = set(self._policy.running.values())
        for pool in self._pools:
            states = replica_states(pool, placing, busy)
            for state in ("placing", "starting", "idle", "busy"):
                metrics.set("ltx_ray_replicas", states[state], pool.spec.name, state)
            metrics.set("ltx_ray_replicas_wanted", pool.spec.replicas, pool.spec.name)
        for (name, cause), lost in self._losses.items():
            metrics.reach("ltx_ray_gangs_lost", lost, name, cause)

    def _tell_progress(self) -> None:
        metrics, tracker = self._tracker.metrics, self._tracker
        rate, done, left = tracker.rate.per_hour(time.monotonic()), tracker.done_work.total.tflop, tflop_left(tracker)
        metrics.set("ltx_ray_tflop_done", done)
        if rate is not None:
            metrics.set("ltx_ray_clips_per_hour", rate)
        if left is not None:
            metrics.set("ltx_ray_tflop_left", left)
        seconds = self._seconds_left()
        if seconds is None and rate and left is not None and done:
            seconds = left / (done / tracker.rate.clips) / rate * 3600
        if seconds is not None:
            metrics.set("ltx_ray_seconds_left", seconds)


def replica_states(pool: Pool, placing: Mapping[str, float], busy: Collection[str]) -> Counter[str]:
    """How many of a pool's replicas are placing, starting, idle and busy."""
    states: Counter[str] = Counter()
    for name, ready in pool.replicas.items():
        if ready:
            states["busy" if name in busy else "idle"] += 1
        else:
            states["placing" if name in placing else "starting"] += 1
    return states


def row_states(tracker: RowTracker) -> dict[str, int]:
    """Rows by what became of them. `expected`: all of them, where that is known."""
    counts, failures = tracker.counts, tracker.failures
    expected = tracker.expected_rows
    return {
        "rendered": counts["rendered"],
        "done_before": counts["already_done"],
        "failed_row": failures["row"],
        "failed_infrastructure": failures["infrastructure"],
        "failed_before": counts["failed"] - failures.total(),
        "illegal": counts["illegal"],
        "removed": counts["removed"],
        **({} if expected is None else {"expected": expected}),
    }


def tflop_left(tracker: RowTracker) -> float | None:
    """An estimate: of the rows that were read and of those that were not, where their number is known.

    Rows that were not read yet are taken to cost what the others do, but for those that the dataset has.
    """
    counts, plan = tracker.counts, tracker.plan
    clips = plan.counts["clips"]
    if not clips:
        return 0.0 if tracker.exhausted else None
    each = plan.work.total.tflop / clips
    gone = (tracker.done_work, tracker.given_up_work, plan.refused_work)
    left = plan.work.total.tflop - sum(work.total.tflop for work in gone)
    if not tracker.exhausted:
        if plan.expected_rows is None:
            return None
        done_before = plan.existing.row_count - counts["rendered"]
        left += each * max(plan.expected_rows - counts["rows"] - max(done_before - counts["already_done"], 0), 0)
    return max(left, 0.0)
