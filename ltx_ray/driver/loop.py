"""The driver carries out the decisions of the policy and reports to it what happened.

It refers to replicas by name and to results by handle. The processes are those of the replica set (pools.protocol).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

from ltx_ray.config import RunLimits
from ltx_ray.dataset.writer import Failure
from ltx_ray.driver.activity import activity
from ltx_ray.driver.admission import Admission
from ltx_ray.driver.calls_under_way import CallsUnderWay
from ltx_ray.driver.growth import Growth
from ltx_ray.driver.joined_cluster import JoinedCluster
from ltx_ray.driver.loop_time import LoopTime
from ltx_ray.driver.negatives import NegativeContexts
from ltx_ray.driver.outcomes import Outcomes
from ltx_ray.driver.policy import Policy
from ltx_ray.driver.policy_state import RetryDecision
from ltx_ray.driver.publisher import Publisher
from ltx_ray.driver.run_gauges import RunGauges
from ltx_ray.driver.second_opinion import SecondOpinions
from ltx_ray.driver.staffing import Staffing
from ltx_ray.driver.supervised import say_final
from ltx_ray.driver.tracker import RowTracker, TrackedItem
from ltx_ray.driver.waits import WaitReport
from ltx_ray.driver.work_left import WorkLeft
from ltx_ray.planning.identity import merged_weights
from ltx_ray.planning.plan import PlanEntry
from ltx_ray.pools.pool import ModelRefused, Pool, StartFailed
from ltx_ray.pools.protocol import (
    CallFinished,
    InputsLost,
    ReplicaEvent,
    ReplicaLost,
    ReplicaSet,
    ReplicaStarted,
    loss_cause,
)
from ltx_ray.records import ErrorKind, first_line
from ltx_ray.stages import PATH_FROM_STORED, Stage

_TICK_SECONDS = 0.5
#: Rows judged between two looks at the pools: a long stretch of finished rows must not keep the pools waiting.
_ROWS_PER_TURN = 500
#: Seconds between two looks at how large the object store is.
_MEMORY_SECONDS = 30.0
#: The item_id of the preflight clip. A row may ask for the very same clip.
_PREFLIGHT = "preflight"


class Driver:
    """Runs a plan over pools of replicas until every row has its clip or its failure."""

    def __init__(
        self,
        *,
        tracker: RowTracker,
        join_cluster: Callable[[], JoinedCluster],
        path: tuple[Stage, ...],
        limits: RunLimits,
        noise_device: str,
        check_noise: Callable[[str], None] = lambda family: None,
        use_stored: bool = False,
        on_drain: Callable[[], None] = lambda: None,
        should_stop: Callable[[], str | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        gpu_seconds_before: float = 0.0,
    ):
        """`path`: the stages of an item. `use_stored`: start items from stored latents of stage 1, if there are any.

        `check_noise` is called once, with the model of the GPU (or "cpu") on which noise is drawn, and raises
        ValueError when the dataset does not allow it. `on_drain` is called once, when the run begins to drain.
        `should_stop` is called at every turn and returns a reason to drain, or None. `clock`: seconds, of the replicas.
        `gpu_seconds_before`: those that earlier runs have reserved.
        """
        self.tracker, self.limits, self.noise_device = tracker, limits, noise_device
        self.events, self.progress, self.counts = tracker.events, tracker.progress, tracker.counts
        self.policy = Policy(queue_depth=limits.queue_depth, max_attempts=limits.max_attempts, path=path)
        self.pools: list[Pool] = []
        self.too_many_failed = False
        self.drain_requested: str | None = None
        self._join_cluster, self._on_drain, self._use_stored = join_cluster, on_drain, use_stored
        self._should_stop, self._check_noise, self._clock = should_stop, check_noise, clock
        self._cluster: JoinedCluster | None = None
        # The next five are set when the cluster is joined.
        self._replicas: ReplicaSet
        self._staff: Staffing
        self._opinions: SecondOpinions
        self._negatives: NegativeContexts
        self._admission: Admission
        self._gauges: RunGauges | None = None
        self._preflight_admitted = self._preflight_running = False
        self._outcomes, self._gpu_seconds_before = Outcomes(limits.max_failed_fraction), gpu_seconds_before
        self._work_left, self._loop_time = WorkLeft(), LoopTime()
        self._calls = CallsUnderWay(clock)
        self._noise_checked = False
        self._drain_until, self._memory_due = float("inf"), -float("inf")
        #: Items whose latents are saved for the next run, because this one drains.
        self._saved: set[str] = set()

    def request_drain(self, reason: str) -> None:
        """Have the loop drain at its next turn, giving up calls under way; safe to call from a signal handler."""
        self.drain_requested = self.drain_requested or reason

    def run(self, rows: Iterator[PlanEntry]) -> bool:
        """Render `rows`; True when the run drained and left some. `counts` says what became of them.

        The cluster is joined when the first row is to be rendered, so that a run without work needs none. Rows that
        do not fit on its GPUs are refused as illegal ones are, before they are dispatched.

        Raises pools.pool.StartFailed when a pool cannot be started, or ModelRefused, which is one, when the model
        cannot be used, OSError when the output store keeps failing, and what `check_noise` raises.
        """
        publisher, ended = self.tracker.publisher, False
        try:
            while not self._ended():
                if reason := self.drain_requested or self._should_stop():
                    self._drain(reason, at_once=True)
                self._admit(rows)
                if self.policy.in_flight:
                    self._turn_pools()
                idle = not self.policy.in_flight
                waits = idle and (self.tracker.exhausted or publisher.pending >= Publisher.FULL)
                self._loop_time.waiting(partial(publisher.poll, flush=idle), _TICK_SECONDS if waits else 0.0)
                self._check_limits()
                self._show()
            publisher.close(finish=True)
            ended = True
        except StartFailed:
            # Clips that are finished get their index rows.
            publisher.close(finish=True)
            ended = True
            raise
        finally:
            if not ended:
                publisher.close(finish=False)
            if self._cluster is not None:
                self._cluster.replicas.close()
            self.tracker.metrics.tell_calls()
        left = bool(self.policy.in_flight) or not self.tracker.exhausted or bool(self._saved)
        self.tracker.close(complete=self.tracker.exhausted and not left)
        if waited := self.waited():
            self.events.emit("waits", shares=waited)
        self._show(ended=True)
        return self.policy.draining and left

    def _turn_pools(self) -> None:
        """Start what is missing, dispatch what may run, and take in what happened."""
        self._start_replicas()
        self._follow_memory()
        for item in self._calls.late():
            self.policy.call_is_late(item)
        self._dispatch()
        if not self._preflight_running:
            # What can run does by now.
            self._staff.waits.look(self.policy, self._clock())
        for event in self._loop_time.waiting(self._replicas.wait, self._wait_seconds()):
            self._handle(event)
        self._join(self._admission.settle(self._clock()))
        self._staff.check_placing()
        if self.policy.draining and not self._preflight_running:
            # The next run resumes from a finished stage 1.
            self._saved.update(self.policy.save_waiting(Stage.STAGE2))

    def _wait_seconds(self) -> float:
        """Seconds to wait for events of the pools: few or none while rows are being committed or may be taken."""
        if self.tracker.publisher.committing or self.tracker.waits_for_images:
            return _TICK_SECONDS / 20
        return 0.0 if not self.tracker.exhausted and self.policy.capacity() else _TICK_SECONDS

    def _ended(self) -> bool:
        if self.tracker.exhausted and not self.policy.in_flight and not self.tracker.publisher.pending:
            return True
        if not self.policy.draining:
            return False
        if self.policy.drained() or self._clock() > self._drain_until:
            return True
        # Once the decode pool is gone, no item that waits for it can end.
        decoding = any(pool.replicas for pool in self.pools if Stage.DECODE in pool.spec.roles)
        return bool(self.pools) and not decoding and not self.policy.running

    def waited(self) -> dict[str, dict[str, float]]:
        """Shares of the time of each stage's replicas in this run, by what they waited for."""
        return {} if self._gauges is None else self._gauges.waits.whole_run()

    # --- rows ------------------------------------------------------------------------------------

    def _admit(self, rows: Iterator[PlanEntry]) -> None:
        """Take as many rows as the policy has capacity for."""
        taken = 0
        publisher = self.tracker.publisher
        while not self.tracker.exhausted and taken < _ROWS_PER_TURN and publisher.pending < Publisher.FULL:
            capacity = min(self.policy.capacity(), _ROWS_PER_TURN - taken)
            if not capacity:
                return
            taken += capacity
            illegal, unread = self.counts["illegal"], self.tracker.failures["infrastructure"]
            # With nothing in flight there is nothing to do but to wait for a row.
            for tracked in self.tracker.take(rows, capacity, wait=not self.policy.in_flight):
                self._admit_item(tracked)
            self._outcomes.add_illegal(self.counts["illegal"] - illegal)
            # Taking rows reports no other failures: those of items are reported when they have been written.
            self._outcomes.add("infrastructure", self.tracker.failures["infrastructure"] - unread)
            if self.tracker.waits_for_images:
                return

    def _admit_item(self, tracked: TrackedItem) -> None:
        item = tracked.item
        problem = self._joined().problem(item.request)
        if problem is not None:
            self.tracker.refuse(tracked, problem)
            return
        existing = self.tracker.plan.existing
        # A row that failed because of an infrastructure failure may have its latents on the node that saved them.
        stored = self._use_stored and (
            existing.has_latents(item.item_id) or existing.failure(item.item_id, tracked.rows[0].key) == "infra"
        )
        self.policy.admit(item.item_id, merged_weights(item.request), PATH_FROM_STORED if stored else None)

    # --- replicas --------------------------------------------------------------------------------

    def _joined(self) -> JoinedCluster:
        if self._cluster is None:
            cluster = self._cluster = self._join_cluster()
            self._replicas = cluster.replicas
            self.pools = [Pool(spec, max_failures=self.limits.max_attempts + 1) for spec in cluster.pools]
            self._follow_memory()
            growth = Growth(self.pools, cluster.new_nodes, cluster.max_gpus)
            self._staff = Staffing(
                self.pools, cluster.replicas, self.policy, self.limits, self.events, self.progress, growth
            )
            self._opinions = SecondOpinions(self.policy, self._staff)
            self._negatives = NegativeContexts(cluster.replicas, self._staff.left_alone.wrong_nodes)
            self._admission = Admission(self._staff, cluster.claims, cluster.answers, cluster.on_versions)
            waits = WaitReport(self._staff.waits, self.events, self.tracker.metrics)
            self._gauges = RunGauges(
                self.tracker, self.policy, self.pools, cluster.replicas, waits, lease_age=cluster.lease_age,
                gpu_seconds=self.gpu_seconds, max_gpu_hours=self.limits.max_gpu_hours, seconds_left=self._seconds_left,
                busy_seconds=self._loop_time.busy, losses=self._staff.losses,
            )  # fmt: skip
        return self._cluster

    def _follow_memory(self) -> None:
        """The object store grows and shrinks with the cluster."""
        if self._cluster is not None and self._clock() >= self._memory_due:
            self._memory_due = self._clock() + _MEMORY_SECONDS
            self.policy.max_bytes = self._cluster.max_bytes()

    def _start_replicas(self) -> None:
        cluster = self._joined()
        self._admit_preflight(cluster)
        if self.policy.draining:
            return
        self._staff.start_missing(self._clock(), self._preflight_running, cluster.elastic, not self.tracker.exhausted)
        if not self._preflight_running:
            self._admission.rows_begin(self._clock())
        if cluster.elastic and self.tracker.exhausted:
            self._staff.give_back_spare()

    def _admit_preflight(self, cluster: JoinedCluster) -> None:
        if self._preflight_admitted:
            return
        self._preflight_admitted = True
        if cluster.preflight is not None:
            self._preflight_running = True
            item = replace(cluster.preflight, item_id=_PREFLIGHT)
            self.tracker.items[_PREFLIGHT] = TrackedItem(item, [])
            self.policy.admit(_PREFLIGHT, merged_weights(item.request), first=True)
            self.policy.alone = _PREFLIGHT

    def _dispatch(self) -> None:
        while (dispatch := self.policy.next_dispatch()) is not None:
            tracked = self.tracker.items[dispatch.item]
            if dispatch.moved:
                self.events.emit("role_moved", replica=dispatch.replica, to=dispatch.stage)
            self._calls.begin(dispatch.item, self.policy.late_after(dispatch.stage))
            self.tracker.call_begins(tracked, dispatch.stage, time.monotonic())
            item, inputs = self._negatives.call(tracked, dispatch.stage)
            timeout = self._work_left.deadline(dispatch.stage, item, self.limits.call_timeout)
            self._replicas.submit(dispatch.replica, dispatch.stage, item, inputs, timeout)

    # --- events ----------------------------------------------------------------------------------

    def _handle(self, event: ReplicaEvent) -> None:
        if not self._staff.knows(event.replica):
            return  # It was given back by what was done about an event before this one.
        if isinstance(event, CallFinished):
            self._call_finished(event)
        elif isinstance(event, ReplicaStarted):
            self._join(self._admission.take(event, self._clock()))
        elif isinstance(event, ReplicaLost):
            self._replica_lost(event)
        elif isinstance(event, InputsLost):
            self._inputs_lost(event)

    def _join(self, events: Iterable[ReplicaStarted]) -> None:
        """Replicas that are up and compute what the rows claim take part from now on."""
        for event in events:
            pool = self._staff.started(event)
            drawing = next((rank.device_name for rank in event.ranks if rank.device_name), None)
            if drawing is not None and self.noise_device != "cpu" and not self._noise_checked:
                self._noise_checked = True
                self._check_noise(drawing)
            node = event.ranks[0].node if event.ranks else ""
            self.policy.add_replica(event.replica, pool.spec.roles, pool.spec.calls_at_once, node)

    def _replica_lost(self, event: ReplicaLost, traceback: str = "") -> None:
        """A replica has been killed."""
        pool = self._staff.pool_of(event.replica)
        self._staff.tell_lost(event)
        stages = {item: self.policy.stage_of(item) for item in self.policy.items_of(event.replica)}

        def charged(item: str) -> bool:
            return not (event.idle or event.node_lost) and event.item_id in (None, item)

        for decision in self.policy.remove_replica(event.replica, charged, event.inputs_lost):
            self._calls.lose(self.tracker.items[decision.item], pool)
            if event.inputs_lost:
                self._drop_results(decision.item)
            self._carry_out(decision, stages[decision.item], event.reason, traceback)
        self._staff.lost(event, self._clock())

    def _inputs_lost(self, event: InputsLost) -> None:
        item, stage = event.item_id, self.policy.stage_of(event.item_id)
        self.events.emit("inputs_lost", replica=event.replica, item_id=item, reason=event.reason)
        self._calls.lose(self.tracker.items[item], self._staff.pool_of(event.replica))
        # Latents that were to be saved are gone for good.
        saving = stage == Stage.SAVE_LATENTS
        decision = self.policy.row_failed(item) if saving else self.policy.inputs_lost(item)
        self._drop_results(item)
        self._carry_out(decision, stage, event.reason, "")

    def _call_finished(self, event: CallFinished) -> None:
        report, pool, item_id = event.report, self._staff.pool_of(event.replica), event.item_id
        tracked, stage = self.tracker.items[item_id], self.policy.stage_of(item_id)
        self._calls.account(self.tracker, pool, event.replica, tracked, stage, report)
        if report.error is not None:
            self._call_failed(event, pool, tracked, stage)
            return
        self._staff.call_succeeded(event.replica)
        self._opinions.succeeded(tracked, stage, self._clock())
        tracked.take_result(stage, report, event.payload)
        if report.facts.negative is not None:
            self._negatives.take(tracked, report.facts.negative, self._staff.node_of(event.replica))
        if report.facts.unchecked:
            self.tracker.say_unchecked(tracked)
        # The preflight clip takes other times than the clips of rows.
        measured = (None,) if tracked.item.preflight else (report.seconds, report.switch_seconds, report.nbytes)
        self._work_left.measured(stage, tracked.item, report.seconds)
        if self.policy.call_finished(item_id, *measured):
            self._finish(tracked, stage, event)
        else:
            tracked.drop_results(self.policy.remaining_path(item_id))

    def _call_failed(self, event: CallFinished, pool: Pool, tracked: TrackedItem, stage: Stage) -> None:
        error, item_id, now = event.report.error, tracked.item.item_id, self._clock()
        assert error is not None
        if error.kind == ErrorKind.MODEL:
            raise ModelRefused(error.message)
        if error.kind in (ErrorKind.REPLICA, ErrorKind.PROCESS, ErrorKind.DEVICE, ErrorKind.NODE):
            ranks = self._staff.ranks_of(event.replica)
            hold = error.kind == ErrorKind.DEVICE and self._staff.left_alone.breaks(ranks, pool.spec.name)
            self._replicas.kill(event.replica, hold)
            name = "" if error.kind == ErrorKind.REPLICA else f"{error.type}: "
            reason = f"{stage}: {event.where}: {name}{error.message}"
            lost = ReplicaLost(
                event.replica, reason, served=True, item_id=item_id, ranks=ranks, held=hold, ended_by=loss_cause(error)
            )
            self._replica_lost(lost, error.traceback)
            if error.kind == ErrorKind.REPLICA:
                pool.broke(reason)
        elif error.kind == ErrorKind.NOT_FINITE and self._opinions.ask(tracked, event.replica, error.message, now):
            pass  # Its node may be to blame.
        elif error.kind == ErrorKind.STORED_LATENTS_GONE:
            self.events.emit("stored_latents_gone", item_id=item_id, id=tracked.name, message=error.message)
            self._drop_results(item_id)
            self._carry_out(self.policy.inputs_lost(item_id, self.policy.path), stage, error.message, "")
        else:
            # Every rank raised the same error. A RowError blames the row at once, another error after the last attempt.
            at_fault = error.kind in (ErrorKind.ROW, ErrorKind.NOT_FINITE)
            decision = self.policy.row_failed(item_id) if at_fault else self.policy.call_failed(item_id)
            blamed = "infrastructure" if error.kind == ErrorKind.INFRASTRUCTURE else "row"
            self._carry_out(decision, stage, error.message, error.traceback, blamed)

    def _finish(self, tracked: TrackedItem, stage: Stage, event: CallFinished) -> None:
        """An item has passed its last stage."""
        result = self._replicas.result(event.payload)
        item_id = tracked.item.item_id
        if stage == Stage.SAVE_LATENTS and tracked.failure is None:
            del self.tracker.items[item_id]
            self.events.emit("latents_saved", item_id=item_id, id=tracked.name, place=result)
        elif stage == Stage.SAVE_LATENTS:
            failure = tracked.failure
            assert failure is not None
            self._fail(tracked, replace(failure, message=f"{failure.message} (latents kept in {result})"))
        elif tracked.item.preflight:
            del self.tracker.items[item_id]
            self._preflight_running = False
            seconds = sum(tracked.seconds.values())
            self.events.emit("preflight", seconds=round(seconds, 3))
            self.progress.say(f"preflight: a clip of one frame group went through every pool in {seconds:.1f} s")
        else:
            self._outcomes.add("rendered", len(tracked.rows))
            self.tracker.finish(tracked, result, self._joined().numerics)

    def _drop_results(self, item_id: str) -> None:
        if (tracked := self.tracker.items.get(item_id)) is not None:
            tracked.payloads.clear()

    # --- failures --------------------------------------------------------------------------------

    def _carry_out(
        self, decision: RetryDecision, stage: Stage, message: str, traceback: str, blamed: str = "infrastructure"
    ) -> None:
        """Report a failure in `stage`; when the item is given up, fail its rows or first save its latents."""
        tracked = self.tracker.items[decision.item]
        if stage == Stage.SAVE_LATENTS:
            if not decision.retry and tracked.failure is not None:
                self._fail(tracked, tracked.failure)
            return
        tracked.attempts = decision.attempts
        if decision.retry:
            self.progress.say(f"{tracked.name}: {stage} failed, trying again: {first_line(message)}")
            self.events.emit("retry", item_id=decision.item, id=tracked.name, stage=stage, message=message)
            return
        if tracked.item.preflight:
            raise StartFailed(f"preflight: {stage}: {message}\n{traceback}".rstrip())
        failure = Failure(stage, decision.attempts, blamed, message, traceback)
        if blamed == "infrastructure" and Stage.STAGE1 in tracked.payloads and stage in (Stage.STAGE2, Stage.DECODE):
            # The row is not to blame, so its latents are saved for the next run.
            tracked.failure = failure
            self.policy.admit(decision.item, path=(Stage.SAVE_LATENTS,), attempts=self.limits.max_attempts)
        else:
            self._fail(tracked, failure)

    def _fail(self, tracked: TrackedItem, failure: Failure) -> None:
        self._outcomes.add(failure.error_class, len(tracked.rows))
        self.tracker.fail(tracked, failure)

    # --- housekeeping ----------------------------------------------------------------------------

    def _drain(self, reason: str, at_once: bool = False, final: bool = False) -> None:
        """Admit nothing new and let the decode pool finish; `run` then returns.

        `at_once` gives up the calls of the other pools, and the decode pool has `limits.grace` seconds left. `final`:
        the same command would end the same way.
        """
        if at_once and self._drain_until == float("inf"):
            self._drain_until = self._clock() + self.limits.grace
            for pool in self.pools:
                if Stage.DECODE not in pool.spec.roles:
                    for name in list(pool.replicas):
                        self._staff.give_back(name, "draining")
        if not self.policy.draining:
            self.policy.draining = True
            if final:
                say_final(reason)
            self.progress.say(f"draining: {reason}")
            self.events.emit("drain", reason=reason)
            self._on_drain()

    def _check_limits(self) -> None:
        if (found := self._outcomes.too_many_failed()) is not None:
            part, rows, why, limit = found
            self.too_many_failed = True
            self._drain(f"{part:.0%} of the last {rows} rows failed {why} (--max-failed-fraction {limit:g})")
        hours, before = self.limits.max_gpu_hours, self._gpu_seconds_before / 3600
        if hours is not None and (used := self.gpu_seconds() / 3600) > hours:
            self._drain(
                f"{used:.2f} GPU hours reserved, {before:.2f} of them by earlier runs (--max-gpu-hours)", final=True
            )

    def gpu_seconds(self) -> float:
        """How long this run and those before it have reserved GPUs."""
        return self._gpu_seconds_before + (self._replicas.gpu_seconds() if self._cluster is not None else 0.0)

    def _show(self, ended: bool = False) -> None:
        """Print the state when it is due, and at the end, where the rate of the whole run follows it."""
        if self._gauges is not None:
            self._gauges.tell(self._clock(), ended)
        if not (self.progress.due() or ended):
            return
        tracker = self.tracker
        doing = activity(self.policy, self.pools, {} if self._gauges is None else self._gauges.waits.shares)
        rate = None if ended else tracker.rate.per_hour(time.monotonic())
        left, total = self._seconds_left(), tracker.expected_rows
        self.progress.update(tracker.done, tracker.failed, total, doing, ended, rate=rate, left=left)

    def _seconds_left(self) -> float | None:
        return self._work_left.in_flight(self.tracker, self.policy, self.pools, self._calls.began, self._clock())
