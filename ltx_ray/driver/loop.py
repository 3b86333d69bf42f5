"""The driver: it carries out what the policy decides and tells it what happened.

It knows replicas by name and results by their handles; the crew (pools.crew) has the processes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ltx_ray.config import PoolSpec, RunLimits
from ltx_ray.dataset.writer import Failure
from ltx_ray.driver.policy import Policy, RetryDecision
from ltx_ray.driver.publisher import Publisher
from ltx_ray.driver.tracker import RowTracker, TrackedItem, first_line
from ltx_ray.manifest.rules import RowProblem
from ltx_ray.planning.identity import merged_for
from ltx_ray.planning.plan import PlanEntry
from ltx_ray.pools.pool import Pool, StartFailed
from ltx_ray.pools.protocol import CallFinished, InputsLost, ReplicaEvent, ReplicaLost, ReplicaSet, ReplicaStarted
from ltx_ray.records import CallReport, RenderRequest, WorkItem

_TICK_SECONDS = 0.5
#: Rows judged between two looks at the pools: a long stretch of finished rows must not keep them waiting.
_ROWS_A_TURN = 500
#: Exceptions after which nobody can say what state a replica's processes are in.
_BREAKS_THE_GANG = {"OutOfMemoryError", "MemoryError", "AcceleratorError", "DistBackendError", "DistNetworkError"}
#: An item's stages when the latents of stage 1 are stored already.
_FROM_STORED = ("text", "stored", "stage2", "decode")


@dataclass(frozen=True)
class JoinedCluster:
    """The cluster of a run: its crew, its pools, and the numerics that they render with (JSON)."""

    replica_set: ReplicaSet
    pools: list[PoolSpec]
    numerics: str
    #: What the results of items in flight may take of the object store, in bytes.
    max_bytes: float = float("inf")
    #: A tiny clip that goes through the line before the pools grow beyond one replica each.
    preflight: WorkItem | None = None
    #: The cluster grows and shrinks with what is asked of it: replicas are given back when no row needs them.
    elastic: bool = False
    #: Why none of the replicas can render a row; None when one can.
    problem: Callable[[RenderRequest], RowProblem | None] = lambda request: None


class Driver:
    """Runs a plan over pools of replicas until every row has its clip or its failure."""

    def __init__(
        self,
        *,
        tracker: RowTracker,
        join_cluster: Callable[[], JoinedCluster],
        stages: tuple[str, ...],
        limits: RunLimits,
        noise_device: str,
        use_stored: bool = False,
        on_drain: Callable[[], None] = lambda: None,
        should_stop: Callable[[], str | None] = lambda: None,
    ):
        """`use_stored`: begin with the stored latents of stage 1 where there are some. `on_drain` is called once when
        the run begins to drain, `should_stop` at every turn: a reason to drain, or None."""
        self.tracker, self.limits, self.noise_device = tracker, limits, noise_device
        self.events, self.progress, self.counts = tracker.events, tracker.progress, tracker.counts
        self.policy = Policy(queue_depth=limits.queue_depth, max_attempts=limits.max_attempts, stages=stages)
        self.pools: list[Pool] = []
        self.too_many_failed = False
        self.drain_requested: str | None = None
        self._join_cluster, self._on_drain, self._use_stored = join_cluster, on_drain, use_stored
        self._should_stop = should_stop
        self._joined: JoinedCluster | None = None
        self._brought_up = False
        self._preflight: str | None = None
        self._gpu_seconds = 0.0
        #: When the call of each busy replica began.
        self._began: dict[str, float] = {}
        self._drain_until = float("inf")
        #: Items whose latents are stored, because the run was told to stop, for the next one.
        self._saved: set[str] = set()
        self._device_name: str | None = None

    def request_drain(self, reason: str) -> None:
        """Have the loop drain at its next turn, in haste; safe to call from a signal handler."""
        self.drain_requested = self.drain_requested or reason

    def run(self, rows: Iterator[PlanEntry]) -> bool:
        """Render `rows`; True when it drained and left some. `counts` says what became of them.

        Raises pools.pool.StartFailed when a pool cannot be brought up, OSError when the output store stays away.

        The cluster is joined when the first row is to be rendered, so that a run without work needs none. Rows that
        have no room on its GPUs are refused as illegal ones are, before they are dispatched.
        """
        publisher, ended = self.tracker.publisher, False
        try:
            while True:
                if reason := self.drain_requested or self._should_stop():
                    self._drain(reason, haste=True)
                self._admit(rows)
                if self.policy.busy:
                    self._bring_up()
                    self._dispatch()
                    for event in self._replica_set.wait(self._patience()):
                        self._attend(event)
                    self._check_placing()
                    if self.policy.draining and self._preflight is None:
                        # a stage 1 that is done need not be done again
                        self._saved.update(self.policy.keep("stage2"))
                publisher.poll(0.0 if self.policy.busy else _TICK_SECONDS)
                self._check_limits()
                self._show()
                if self._at_an_end():
                    break
            publisher.close(finish=True)
            ended = True
        except StartFailed:
            # what is finished is finished
            publisher.close(finish=True)
            ended = True
            raise
        finally:
            if not ended:
                publisher.close(finish=False)
            if self._joined is not None:
                self._joined.replica_set.close()
        left = bool(self.policy.busy) or not self.tracker.exhausted or bool(self._saved)
        self.tracker.close(complete=self.tracker.exhausted and not left)
        self._show(force=True)
        return self.policy.draining and left

    def _patience(self) -> float:
        """Seconds to wait for news: a written row, or one that may be read, wakes nobody."""
        if self.tracker.publisher.pending:
            return _TICK_SECONDS / 20
        return 0.0 if not self.tracker.exhausted and self.policy.room() else _TICK_SECONDS

    def _at_an_end(self) -> bool:
        if self.tracker.exhausted and not self.policy.busy and not self.tracker.publisher.pending:
            return True
        if self.policy.idle_when_drained() or time.monotonic() > self._drain_until:
            return True
        # what waits for the decode pool has nobody to wait for
        decoding = any(pool.replicas for pool in self.pools if "decode" in pool.spec.roles)
        return self.policy.draining and bool(self.pools) and not decoding and not self.policy.running

    @property
    def _replica_set(self) -> ReplicaSet:
        assert self._joined is not None
        return self._joined.replica_set

    # --- rows ------------------------------------------------------------------------------------

    def _admit(self, rows: Iterator[PlanEntry]) -> None:
        """Take rows while there is room for them."""
        taken = 0
        while not self.tracker.exhausted and taken < _ROWS_A_TURN and self.tracker.publisher.pending < Publisher.FULL:
            room = min(self.policy.room(), _ROWS_A_TURN - taken)
            if not room:
                return
            taken += room
            for work in self.tracker.take(rows, room):
                self._admit_item(work)

    def _admit_item(self, work: TrackedItem) -> None:
        item = work.item
        problem = self._join().problem(item.request)
        if problem is not None:
            self.tracker.refuse(work, problem)
            return
        done = self.tracker.plan.existing
        # a row that failed by no fault of its own may have its latents on the node that kept them
        stored = self._use_stored and (
            done.has_latents(item.item_id) or done.failure(item.item_id, work.rows[0].key) == "infra"
        )
        self.policy.admit(item.item_id, merged_for(item.request), _FROM_STORED if stored else None)

    # --- replicas --------------------------------------------------------------------------------

    def _join(self) -> JoinedCluster:
        if self._joined is None:
            joined = self._joined = self._join_cluster()
            self.pools = [Pool(spec, max_starts_failed=self.limits.max_attempts + 1) for spec in joined.pools]
            self.policy.max_bytes = joined.max_bytes
        return self._joined

    def _bring_up(self) -> None:
        joined = self._join()
        if not self._brought_up:
            self._brought_up = True
            if joined.preflight is not None:
                # under a name of its own: a row may ask for the very same clip
                item = replace(joined.preflight, item_id="preflight")
                self._preflight = item.item_id
                self.tracker.work[self._preflight] = TrackedItem(item, [])
                self.policy.admit(self._preflight, merged_for(item.request), first=True)
        if self.policy.draining:
            return
        served = {role for pool in self.pools if pool.ready for role in pool.spec.roles}
        everywhere = all(served.issuperset(pool.spec.roles) for pool in self.pools)
        if joined.elastic and not everywhere:
            # who waits for a second place must not have the one that a first replica waits for
            for name in self._replica_set.placing():
                if (pool := self._pool(name)).ready:
                    self._give_back(pool, name, "another pool has none")
        first = self._preflight is not None or (joined.elastic and not everywhere)
        for pool in self.pools:
            for name in pool.missing(at_most=1 if first else None):
                self._replica_set.start(name, pool.spec)
                self.events.emit("gang_starting", role=pool.spec.name, replica=name)
        if joined.elastic and self.tracker.exhausted:
            for name in self.policy.spare():
                pool = self._pool(name)
                pool.spec = replace(pool.spec, replicas=pool.spec.replicas - 1)
                self._give_back(pool, name, "no row needs it")

    def _give_back(self, pool: Pool, name: str, why: str) -> None:
        """End a replica that is not at fault; what it was doing costs nobody an attempt."""
        self._account_for(pool, name)
        self.policy.leave(name, given_back=True)
        del pool.replicas[name]
        self._replica_set.kill(name)
        self.events.emit("gang_given_back", role=pool.spec.name, replica=name, reason=why)

    def _pool(self, replica: str) -> Pool:
        return next(pool for pool in self.pools if replica in pool.replicas)

    def _dispatch(self) -> None:
        while (dispatch := self.policy.next_dispatch()) is not None:
            work = self.tracker.work[dispatch.item]
            if dispatch.moved:
                self.events.emit("role_moved", replica=dispatch.replica, to=dispatch.stage)
            made = [work.payloads.get(stage) for stage in ("stage1", "stage2")]
            if dispatch.stage not in ("decode", "keep"):
                made = [work.payloads.get("text"), *made] if dispatch.stage in ("stage1", "stage2") else []
            self._began[dispatch.replica] = time.monotonic()
            self._replica_set.submit(
                dispatch.replica, dispatch.stage, work.item, [handle for handle in made if handle is not None]
            )

    def _check_placing(self) -> None:
        """A replica may wait for a place as long as others do the work meanwhile."""
        served = {role for pool in self.pools if pool.ready for role in pool.spec.roles}
        for name, seconds in self._replica_set.placing().items():
            pool = self._pool(name)
            if seconds > self.limits.start_timeout and not served.issuperset(pool.spec.roles):
                spec = pool.spec
                needs = f"{spec.ranks} x ({spec.cpus_per_rank:g} CPU, {spec.gpus_per_rank:g} GPU) on one node"
                raise StartFailed(
                    f"pool {spec.name}: no place for a replica in {self.limits.start_timeout:g} s; it needs {needs}"
                )

    # --- news ------------------------------------------------------------------------------------

    def _attend(self, event: ReplicaEvent) -> None:
        if isinstance(event, CallFinished):
            self._answered(event)
        elif isinstance(event, ReplicaStarted):
            pool = self._pool(event.replica)
            pool.started(event.replica)
            self._check_device(event)
            self.policy.join(event.replica, pool.spec.roles)
            self.events.emit(
                "gang_started", role=pool.spec.name, replica=event.replica, ranks=event.ranks,
                seconds=round(event.seconds, 3),
            )  # fmt: skip
        elif isinstance(event, ReplicaLost):
            self._lost(event)
        elif isinstance(event, InputsLost):
            item = self.policy.item_of(event.replica)
            assert item is not None
            self.events.emit("inputs_lost", replica=event.replica, item_id=item, reason=event.reason)
            stage = self.policy.stage_of(item)
            # what was to be kept is gone
            verdict = self.policy.row_failed(item) if stage == "keep" else self.policy.inputs_lost(item)
            self._forget_results(item)
            self._judge(verdict, stage, event.reason, "")

    def _check_device(self, event: ReplicaStarted) -> None:
        """Noise drawn on a GPU depends on its model, so the stages of a run must not span several."""
        for rank in event.ranks:
            name = rank.get("device_name")
            if not name or self.noise_device == "cpu":
                continue
            if self._device_name not in (None, name):
                raise StartFailed(
                    f"the stages span {self._device_name} and {name}, whose noise differs; give --noise-device cpu, "
                    f"or GPUs of one model"
                )
            self._device_name = name

    def _lost(self, event: ReplicaLost, traceback: str = "") -> None:
        """A replica has been killed."""
        pool = self._pool(event.replica)
        self.progress.say(f"{event.replica} lost: {event.reason}")
        self.events.emit("gang_lost", role=pool.spec.name, replica=event.replica, reason=event.reason)
        self._account_for(pool, event.replica)
        item = self.policy.item_of(event.replica)
        stage = self.policy.stage_of(item) if item else ""
        charged = not (event.idle or event.node_lost)
        verdict = self.policy.leave(event.replica, charged, event.inputs_lost)
        if verdict is not None:
            if event.inputs_lost:
                self._forget_results(verdict.item)
            self._judge(verdict, stage, event.reason, traceback)
        pool.lost(event.replica, event.served, event.reason)
        if event.idle:
            pool.died_idle(event.reason)

    def _answered(self, event: CallFinished) -> None:
        report, pool = event.report, self._pool(event.replica)
        name = self.policy.item_of(event.replica)
        assert name is not None
        work, stage = self.tracker.work[name], self.policy.stage_of(name)
        self._note(pool, event.replica, work, stage, report)
        if report.replica_error or report.error_type in _BREAKS_THE_GANG:
            self._replica_set.kill(event.replica)
            kind = "" if report.replica_error else f"{report.error_type}: "
            reason = f"{stage}: {event.where}: {kind}{report.message}"
            self._lost(ReplicaLost(event.replica, reason, served=True), report.traceback or "")
            if report.replica_error:
                pool.faulted(reason)
        elif report.error_type == "StoredLatentsGone":
            self.events.emit("stored_latents_gone", item_id=name, id=work.name, message=report.message)
            self._forget_results(name)
            self._judge(self.policy.inputs_lost(name, self.policy.stages), stage, report.message or "", "")
        elif not report.ok:
            # every rank said the same: the row is at fault at once if the engine says so, else when the same
            # thing has happened at every attempt
            verdict = self.policy.row_failed(name) if report.row_error else self.policy.call_failed(name)
            kind = "infrastructure" if report.infrastructure else "row"
            self._judge(verdict, stage, report.message or "", report.traceback or "", kind)
        else:
            pool.worked()
            work.info.update(report.info)
            work.payloads["stage1" if stage == "stored" else stage] = event.payload
            if stage in ("stage1", "stage2"):
                work.device = report.device
            # a tiny clip says nothing of how long the others take
            measured = (None,) if work.item.preflight else (report.seconds, report.switch_seconds, report.nbytes)
            if self.policy.finished(name, *measured):
                self._finish(work, stage, event)
            elif self.policy.stage_of(name) == "decode":
                work.payloads.pop("text")  # only the stages themselves read the contexts

    def _note(self, pool: Pool, replica: str, work: TrackedItem, stage: str, report: CallReport) -> None:
        self._began.pop(replica, None)
        card_seconds = report.seconds * pool.spec.gpus_per_rank * pool.spec.ranks
        self._gpu_seconds += card_seconds
        work.gpu_seconds += card_seconds
        work.seconds[f"{stage}_seconds"] = report.seconds
        work.replicas[stage] = replica
        work.switches += report.switches
        self.events.emit(
            "preflight_call" if work.item.preflight else "call",
            role=pool.spec.name, replica=replica, stage=stage, item_id=work.item.item_id, id=work.name,
            start=round(report.started, 3), seconds=round(report.seconds, 3), ok=report.ok,
        )  # fmt: skip
        if report.switches:
            self.events.emit(
                "switch", role=pool.spec.name, replica=replica, to=stage,
                seconds=round(report.switch_seconds, 3), clean_weights=report.info.get("clean_weights"),
            )  # fmt: skip
        self.tracker.metrics.call(stage, report.seconds)

    def _account_for(self, pool: Pool, replica: str) -> None:
        """A call that never came back has used its cards, too."""
        if (began := self._began.pop(replica, None)) is not None:
            self._gpu_seconds += (time.monotonic() - began) * pool.spec.gpus_per_rank * pool.spec.ranks

    def _finish(self, work: TrackedItem, stage: str, event: CallFinished) -> None:
        result = self._replica_set.result(event.payload)
        if stage == "keep" and work.failure is None:
            del self.tracker.work[work.item.item_id]
            self.events.emit("latents_saved", item_id=work.item.item_id, id=work.name, place=result)
        elif stage == "keep":
            failure = work.failure
            self.tracker.fail(work, replace(failure, message=f"{failure.message} (latents kept in {result})"))
        elif work.item.preflight:
            del self.tracker.work[work.item.item_id]
            self._preflight = None
            seconds = sum(work.seconds.values())
            self.events.emit("preflight", seconds=round(seconds, 3))
            self.progress.say(f"preflight: a clip of one frame group went through every pool in {seconds:.1f} s")
        else:
            self.tracker.finish(work, result, self._joined.numerics)

    def _forget_results(self, item: str) -> None:
        if (work := self.tracker.work.get(item)) is not None:
            work.payloads.clear()

    # --- verdicts --------------------------------------------------------------------------------

    def _judge(
        self, verdict: RetryDecision, stage: str, message: str, traceback: str, kind: str = "infrastructure"
    ) -> None:
        work = self.tracker.work[verdict.item]
        if stage == "keep":
            if not verdict.retry and work.failure is not None:
                self.tracker.fail(work, work.failure)
            return
        work.attempts = verdict.attempts
        if verdict.retry:
            self.progress.say(f"{work.name}: {stage} failed, trying again: {first_line(message)}")
            self.events.emit("retry", item_id=verdict.item, id=work.name, stage=stage, message=message)
            return
        if work.item.preflight:
            raise StartFailed(f"preflight: {stage}: {message}\n{traceback}".rstrip())
        failure = Failure(stage, verdict.attempts, kind, message, traceback)
        if kind == "infrastructure" and "stage1" in work.payloads and stage in ("stage2", "decode"):
            # the row is not to blame: what it has is kept for `ltx-ray retry`
            work.failure = failure
            self.policy.admit(verdict.item, path=("keep",), attempts=self.limits.max_attempts)
        else:
            self.tracker.fail(work, failure)

    # --- housekeeping ----------------------------------------------------------------------------

    def _drain(self, reason: str, haste: bool = False) -> None:
        """Take nothing new and let the decode pool finish; `run` then returns. In `haste`, calls of the other pools
        are given up, and the decode pool has the grace time."""
        if haste and self._drain_until == float("inf"):
            self._drain_until = time.monotonic() + self.limits.grace
            for pool in self.pools:
                if "decode" not in pool.spec.roles:
                    for name in list(pool.replicas):
                        self._give_back(pool, name, "draining")
        if not self.policy.draining:
            self.policy.draining = True
            self.progress.say(f"draining: {reason}")
            self.events.emit("drain", reason=reason)
            self._on_drain()

    def _check_limits(self) -> None:
        limits = self.limits
        failed = self.counts["failed"] + self.counts["illegal"]
        finished = self.counts["rendered"] + self.counts["already_done"] + failed
        if limits.max_failed_fraction is not None and finished >= 10:
            fraction = failed / finished
            if fraction > limits.max_failed_fraction:
                self.too_many_failed = True
                self._drain(f"{fraction:.0%} of {finished} rows failed (--max-failed-fraction)")
        if limits.max_gpu_hours is not None and self._gpu_seconds > limits.max_gpu_hours * 3600:
            self._drain(f"{self._gpu_seconds / 3600:.2f} GPU hours used (--max-gpu-hours)")

    def _show(self, force: bool = False) -> None:
        failed = self.counts["failed"] + self.counts["illegal"]
        done = self.counts["rendered"] + self.counts["already_done"]
        if not (self.progress.due(done + failed) or force):
            return
        total = self.counts["rows"] if self.tracker.exhausted else None
        running = Counter(self.policy.stage_of(item) for item in self.policy.running.values())
        starting = sum(len(pool.replicas) - pool.ready for pool in self.pools)
        doing = ", ".join(f"{stage} {n}" for stage, n in sorted(running.items()))
        if starting:
            doing = f"{doing}, " * bool(doing) + f"{starting} gangs starting"
        self.progress.update(done, failed, total, doing, force)
