"""The driver: the only place that waits on Ray. It carries out what the policy decides.

Large results (contexts, latents) stay in the object store; the driver passes their references on and
reads only the small reports.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ray

from ltx_ray.config import PoolSpec, RunLimits
from ltx_ray.dataset.writer import DatasetWriter, Failure, Rendered
from ltx_ray.driver.policy import Policy, Verdict
from ltx_ray.driver.progress import Progress
from ltx_ray.metrics import EventLog, RunMetrics
from ltx_ray.plan import COPY, DONE, FAILED, ILLEGAL, REPEATED, Plan, PlannedRow
from ltx_ray.pools.gang import Call, Gang, GangLost, InputsLost
from ltx_ray.pools.pool import Pool, StartFailed
from ltx_ray.recipe import merged_for
from ltx_ray.records import CallReport, Clip, WorkItem, canonical_json

_TICK_SECONDS = 0.5
#: Rows judged between two looks at the pools: a long stretch of finished rows must not keep them waiting.
_ROWS_A_TURN = 500
#: Exceptions that no row is to blame for: memory, and stores that do not answer or refuse a node.
_INFRASTRUCTURE = {
    "OutOfMemoryError", "MemoryError", "OSError", "PermissionError", "ConnectionError", "TimeoutError",
}  # fmt: skip


@dataclass
class _Work:
    """An item in the pools: the manifest rows that want it, and what its stages have made so far."""

    item: WorkItem
    rows: list[PlannedRow]
    payloads: dict[str, ray.ObjectRef] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    replicas: dict[str, str] = field(default_factory=dict)
    switches: int = 0
    gpu_seconds: float = 0.0
    attempts: int = 1
    device: str = ""
    info: dict[str, Any] = field(default_factory=dict)


class Driver:
    """Runs a plan over pools of gangs until every row has its clip or its failure."""

    def __init__(
        self,
        *,
        plan: Plan,
        join_cluster: Callable[[], tuple[list[PoolSpec], str]],
        stages: tuple[str, ...],
        writer: DatasetWriter,
        events: EventLog,
        progress: Progress,
        limits: RunLimits,
        versions: str,
        noise_device: str,
    ):
        self.plan, self.writer, self.events, self.progress = plan, writer, events, progress
        self.limits, self.versions, self.noise_device = limits, versions, noise_device
        self._join_cluster = join_cluster
        self.numerics = ""
        self.policy = Policy(queue_depth=limits.queue_depth, max_attempts=limits.max_attempts, stages=stages)
        self.pools: list[Pool] = []
        self.counts: Counter[str] = Counter()
        self._work: dict[str, _Work] = {}
        self._gpu_seconds = 0.0
        self.too_many_failed = False
        self.drain_requested: str | None = None
        self._metrics = RunMetrics()
        self._illegal: set[str] = set()
        self._device_name: str | None = None

    def request_drain(self, reason: str) -> None:
        """Have the loop drain at its next turn; safe to call from a signal handler."""
        self.drain_requested = self.drain_requested or reason

    def _drain(self, reason: str) -> None:
        """Take nothing new; let the decode pool finish; `run` then returns."""
        if not self.policy.draining:
            self.policy.draining = True
            self.progress.say(f"draining: {reason}")
            self.events.emit("drain", reason=reason)

    def run(self, rows: Iterator[PlannedRow]) -> bool:
        """Render `rows`; True when it drained and left some. `counts` says what became of them.

        Raises pools.pool.StartFailed when a pool cannot be brought up.

        The cluster is joined when the first row is to be rendered, so that a run without work needs none.
        """
        exhausted = False
        try:
            while True:
                if self.drain_requested:
                    self._drain(self.drain_requested)
                exhausted = exhausted or self._admit(rows)
                if (exhausted and not self.policy.busy) or self.policy.idle_when_drained():
                    break
                if self.policy.busy:
                    self._bring_up()
                    self._dispatch()
                    self._wait()
                self._check_limits()
                self._show(exhausted)
        finally:
            for pool in self.pools:
                pool.close()
        if exhausted and self.plan.complete:
            self.writer.forget_illegal(self.plan.manifest, keep=self._illegal)
        self._show(exhausted, force=True)
        return self.policy.draining and (bool(self.policy.busy) or not exhausted)

    # --- rows ------------------------------------------------------------------------------------

    def _admit(self, rows: Iterator[PlannedRow]) -> bool:
        """Take rows while there is room for them; True when there are no more."""
        for _ in range(_ROWS_A_TURN):
            if not self.policy.room():
                break
            planned = next(rows, None)
            if planned is None:
                return True
            if planned.status != REPEATED:
                self.counts["rows"] += 1
            if planned.status == DONE:
                self.counts["already_done"] += 1
            elif planned.status == FAILED:
                self.counts["failed"] += 1
            elif planned.status == ILLEGAL:
                self._illegal_row(planned)
            elif planned.status == COPY:
                self._copy_row(planned)
            elif planned.status != REPEATED:
                self._admit_item(planned)
        return False

    def _admit_item(self, planned: PlannedRow) -> None:
        item = planned.item
        assert item is not None
        if (work := self._work.get(item.item_id)) is not None:
            work.rows.append(planned)
            return
        self._work[item.item_id] = _Work(item, [planned])
        self.policy.admit(item.item_id, merged_for(item.request))

    def _illegal_row(self, planned: PlannedRow) -> None:
        self.counts["illegal"] += 1
        for message in planned.messages:
            self.progress.say(message)
        raw = planned.row.raw
        self.events.emit("row_illegal", source=raw.source, id=planned.row.id, message="\n".join(planned.messages))
        self._illegal.add(self.writer.write_illegal(raw, list(planned.messages)))

    def _copy_row(self, planned: PlannedRow) -> None:
        assert planned.item is not None
        name = planned.item.item_id
        self.writer.copy_index_row(name, self.plan.done.items[name], planned.request)
        self.counts["rendered"] += 1

    # --- gangs -----------------------------------------------------------------------------------

    def _bring_up(self) -> None:
        if not self.pools:
            specs, self.numerics = self._join_cluster()
            self.pools = [Pool(spec, max_starts_failed=self.limits.max_attempts + 1) for spec in specs]
        for pool in self.pools:
            for gang in pool.fill():
                self.events.emit("gang_starting", role=pool.spec.name, replica=gang.name)

    def _dispatch(self) -> None:
        while (dispatch := self.policy.next_dispatch()) is not None:
            work = self._work[dispatch.item]
            gang = self._gang(dispatch.replica)
            gang.submit(dispatch.stage, work.item, self._inputs(dispatch.stage, work))

    def _inputs(self, stage: str, work: _Work) -> list[ray.ObjectRef]:
        made = work.payloads
        if stage == "text":
            return []
        if stage == "decode":
            return [made[s] for s in ("stage1", "stage2") if s in made]
        return [made["text"]] + ([made["stage1"]] if stage == "stage2" else [])

    def _gang(self, name: str) -> Gang:
        return next(pool.gangs[name] for pool in self.pools if name in pool.gangs)

    def _wait(self) -> None:
        waiting: dict[ray.ObjectRef, tuple[Pool, Gang]] = {}
        for pool in self.pools:
            for gang in pool.gangs.values():
                waiting.update(dict.fromkeys(gang.waits_for(), (pool, gang)))
        if not waiting:
            time.sleep(_TICK_SECONDS)
            return
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=_TICK_SECONDS)
        if ready:
            # one reference woke us; take whatever else is there too
            ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        arrived = set(ready)
        for pool, gang in {id(g): (p, g) for p, g in (waiting[ref] for ref in ready)}.values():
            self._attend(pool, gang, arrived)
        self._check_deadlines()

    def _attend(self, pool: Pool, gang: Gang, arrived: set[ray.ObjectRef]) -> None:
        try:
            if gang.state != "ready":
                if gang.advance(arrived):
                    pool.started()
                    self._check_device(gang)
                    self.policy.join(gang.name, pool.spec.roles)
                    seconds = round(time.time() - gang.created, 3)
                    self.events.emit(
                        "gang_started", role=pool.spec.name, replica=gang.name, ranks=gang.ranks, seconds=seconds
                    )
                return
            call = gang.call
            reports = gang.collect(arrived)
            if reports is not None and call is not None:
                self._called(pool, gang, call, reports)
        except GangLost as lost:
            self._lost(pool, gang, str(lost))
        except InputsLost as lost:
            self._inputs_lost(gang, str(lost))

    def _check_device(self, gang: Gang) -> None:
        """Noise drawn on a GPU depends on its model, so the stages of a run must not span several."""
        for rank in gang.ranks:
            name = rank.get("device_name")
            if not name or self.noise_device == "cpu":
                continue
            if self._device_name not in (None, name):
                raise StartFailed(
                    f"the stages span {self._device_name} and {name}, whose noise differs; give --noise-device cpu, "
                    f"or GPUs of one model"
                )
            self._device_name = name

    def _check_deadlines(self) -> None:
        now = time.time()
        for pool in self.pools:
            for gang in list(pool.gangs.values()):
                if gang.state != "ready" and now - gang.created > self.limits.start_timeout:
                    self._lost(pool, gang, f"not ready after {self.limits.start_timeout:g} s ({gang.state})")
                elif (reason := gang.overdue(now, self.limits.call_timeout)) is not None:
                    self._lost(pool, gang, reason)

    def _lost(self, pool: Pool, gang: Gang, reason: str, stage: str = "", traceback: str = "") -> None:
        before_ready = gang.state != "ready"
        self.progress.say(f"{gang.name} lost: {reason}")
        self.events.emit("gang_lost", role=pool.spec.name, replica=gang.name, reason=reason)
        stage = gang.call.stage if gang.call else stage
        verdict = self.policy.leave(gang.name)
        if verdict is not None:
            self._judge(verdict, stage, reason, traceback)
        pool.drop(gang, before_ready, reason)

    # --- calls -----------------------------------------------------------------------------------

    def _called(self, pool: Pool, gang: Gang, call: Call, reports: list[CallReport]) -> None:
        report, work = reports[0], self._work[call.item_id]
        card_seconds = report.seconds * pool.spec.gpus_per_rank * pool.spec.ranks
        self._gpu_seconds += card_seconds
        work.gpu_seconds += card_seconds
        work.seconds[f"{call.stage}_seconds"] = report.seconds
        work.replicas[call.stage] = gang.name
        work.switches += report.switches
        row_id = work.rows[0].request.id
        self.events.emit(
            "call", role=pool.spec.name, replica=gang.name, stage=call.stage, item_id=call.item_id, id=row_id,
            start=round(report.started, 3), seconds=round(report.seconds, 3), ok=report.ok,
        )  # fmt: skip
        if report.switches:
            self.events.emit(
                "switch", role=pool.spec.name, replica=gang.name, to=call.stage,
                seconds=round(report.switch_seconds, 3), clean_weights=report.info.get("clean_weights"),
            )  # fmt: skip
        self._metrics.call(call.stage, report.seconds)
        if report.replica_error:
            reason = f"{call.stage}: {gang.where(0)}: {report.message}"
            self._lost(pool, gang, reason, call.stage, report.traceback or "")
            pool.faulted(reason)
            return
        if not report.ok:
            self._call_failed(call, report)
            return
        pool.worked()
        work.info.update(report.info)
        work.payloads[call.stage] = call.payload
        if call.stage in ("stage1", "stage2"):
            work.device = report.device
        if self.policy.finished(call.item_id):
            self._finish(call.item_id, ray.get(call.payload))

    def _call_failed(self, call: Call, report: CallReport) -> None:
        # every rank said the same: the row is at fault at once if the engine says so, else when the same
        # thing has happened at every attempt
        verdict = self.policy.row_failed(call.item_id) if report.row_error else self.policy.call_failed(call.item_id)
        kind = "infrastructure" if report.error_type in _INFRASTRUCTURE else "row"
        self._judge(verdict, call.stage, report.message or "", report.traceback or "", kind)

    def _inputs_lost(self, gang: Gang, reason: str) -> None:
        call = gang.call
        assert call is not None
        gang.call = None
        self.events.emit("inputs_lost", replica=gang.name, item_id=call.item_id, reason=reason)
        self._judge(self.policy.inputs_lost(call.item_id), call.stage, reason, "")
        self._work[call.item_id].payloads.clear()

    def _judge(self, verdict: Verdict, stage: str, message: str, traceback: str, kind: str = "infrastructure") -> None:
        work = self._work[verdict.item]
        work.attempts = verdict.attempts
        if verdict.retry:
            self.progress.say(f"{work.item.request.id}: {stage} failed, trying again: {_first_line(message)}")
            self.events.emit("retry", item_id=verdict.item, id=work.item.request.id, stage=stage, message=message)
            return
        del self._work[verdict.item]
        failure = Failure(stage, verdict.attempts, kind, message, traceback)
        for planned in work.rows:
            self.writer.write_failed(verdict.item, planned.request, planned.row.raw, failure)
            self.counts["failed"] += 1
            self._metrics.item("failed")
            self.progress.say(f"{planned.request.id}: failed in {stage}: {_first_line(message)}")
            self.events.emit("item_failed", item_id=verdict.item, id=planned.request.id, stage=stage, message=message)

    def _finish(self, name: str, clip: Clip) -> None:
        work = self._work.pop(name)
        flags = ("prompt_truncated",) if work.info.get("prompt_truncated") else ()
        rendered = Rendered(
            clip=clip,
            attempts=work.attempts,
            recipe=canonical_json(work.item.recipe),
            recipe_digest=work.item.recipe_digest,
            numerics=self.numerics,
            noise_ledger=canonical_json(work.info.get("noise_ledger")),
            versions=self.versions,
            device=work.device,
            seconds={**work.seconds, "gpu_seconds": work.gpu_seconds},
            stage1_replica=work.replicas.get("stage1"),
            stage2_replica=work.replicas.get("stage2"),
            switches=work.switches,
            extra_flags=flags,
        )
        for planned in work.rows:
            if clip.path is not None:
                self.writer.write_index(name, planned.request, rendered)
                self.plan.done.items.setdefault(name, planned.key)
                self.writer.forget_older_failures(self._older_failures(name, planned.key), planned.row.raw.source)
            self.counts["rendered"] += 1
            self._metrics.item("rendered")
            self.events.emit("item_finished", item_id=name, id=planned.request.id)

    def _older_failures(self, name: str, key: str) -> list[str]:
        """Parts in which the row failed as another item: with other weights, or before it was edited."""
        return [part for item, part in self._failed_parts.get(key, ()) if item != name]

    @cached_property
    def _failed_parts(self) -> dict[str, list[tuple[str, str]]]:
        """(item, part name) of earlier failures by row key; looked up for every finished row."""
        parts: dict[str, list[tuple[str, str]]] = {}
        for (item, key), kind in self.plan.done.failed.items():
            parts.setdefault(key, []).append((item, f"part-{kind}-{item}-{key}.parquet"))
        return parts

    # --- housekeeping ----------------------------------------------------------------------------

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

    def _show(self, exhausted: bool, force: bool = False) -> None:
        total = self.counts["rows"] if exhausted else None
        running = Counter(g.call.stage for p in self.pools for g in p.gangs.values() if g.call)
        starting = sum(g.state != "ready" for p in self.pools for g in p.gangs.values())
        doing = ", ".join(f"{stage} {n}" for stage, n in sorted(running.items()))
        if starting:
            doing = f"{doing}, " * bool(doing) + f"{starting} gangs starting"
        done = self.counts["rendered"] + self.counts["already_done"]
        self.progress.update(done, self.counts["failed"] + self.counts["illegal"], total, doing, force)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no message"
