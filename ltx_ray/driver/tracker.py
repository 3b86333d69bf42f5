"""The driver's books: which rows want which item, what its stages have made, and what became of it.

Rows come in as the plan has judged them and leave through the dataset's writer: rendered, failed, illegal,
or done before. Nothing here decides anything.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ltx_ray.dataset.layout import failed_name
from ltx_ray.dataset.writer import DatasetWriter, Failure, Rendered, UnreadablePart
from ltx_ray.driver.events import EventLog, RunMetrics
from ltx_ray.driver.progress import Progress
from ltx_ray.driver.publisher import Publisher
from ltx_ray.manifest.rules import IllegalRow, RowProblem
from ltx_ray.planning.plan import COPY, DONE, FAILED, REPEATED, Plan, PlanEntry, PlannedRow
from ltx_ray.records import Clip, WorkItem, canonical_json

#: Failures that are kept for rows that ask for the same clip later.
_REMEMBERED = 10_000


@dataclass
class TrackedItem:
    """An item in the pools: the manifest rows that want it, and what its stages have made so far."""

    item: WorkItem
    rows: list[PlannedRow]
    payloads: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    replicas: dict[str, str] = field(default_factory=dict)
    switches: int = 0
    gpu_seconds: float = 0.0
    attempts: int = 1
    device: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    #: Why it is given up, while its latents are still being kept.
    failure: Failure | None = None
    #: What became of it; its rows are being written then.
    outcome: Rendered | Failure | None = None
    writing: int = 0

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.item.request.id or self.item.item_id


class RowTracker:
    """`counts`: rows, rendered, already_done, failed, illegal."""

    def __init__(
        self,
        plan: Plan,
        writer: DatasetWriter,
        publisher: Publisher,
        events: EventLog,
        progress: Progress,
        versions: str,
    ):
        self.plan, self.writer, self.publisher = plan, writer, publisher
        self.events, self.progress, self.versions = events, progress, versions
        self.counts: Counter[str] = Counter()
        self.metrics = RunMetrics()
        self.work: dict[str, TrackedItem] = {}
        self.exhausted = False
        self._illegal: set[str] = set()
        #: A row that comes late and asks for what has failed in this run fails the same way.
        self._given_up: dict[str, Failure] = {}

    def take(self, rows: Iterator[PlanEntry], at_most: int) -> Iterator[TrackedItem]:
        """Read up to `at_most` rows and yield the items among them that are new work."""
        done = self.plan.existing
        for _ in range(at_most):
            planned = next(rows, None)
            if planned is None:
                self.exhausted = True
                return
            if isinstance(planned, IllegalRow):
                self.counts["rows"] += 1
                self._take_illegal(planned)
                continue
            if planned.status != REPEATED:
                self.counts["rows"] += 1
            if planned.status == DONE:
                self.counts["already_done"] += 1
                if done.failed_count and done.failure(planned.item_id, planned.key):
                    # the run that finished it was killed before it could say so here
                    self._forget_failure(planned)
            elif planned.status == FAILED:
                self.counts["failed"] += 1
            elif planned.status == COPY:
                self._take_copy(planned)
            elif planned.status != REPEATED:
                item = planned.item
                work = self.work.get(item.item_id)
                if work is not None:
                    work.rows.append(planned)
                    if work.outcome is not None:
                        self._write(work, planned)
                elif item.item_id in self._given_up:
                    self._write(TrackedItem(item, [planned], outcome=self._given_up[item.item_id]), planned)
                elif self._first_key(item.item_id) is not None:
                    self._take_copy(planned)  # finished since the row was planned
                else:
                    work = self.work[item.item_id] = TrackedItem(item, [planned])
                    yield work

    def refuse(self, work: TrackedItem, problem: RowProblem) -> None:
        """The run cannot render the item, which was just taken: its rows are illegal here."""
        del self.work[work.item.item_id]
        for planned in work.rows:
            self._take_illegal(planned.refused(problem))
            self._forget_failure(planned)

    def _take_illegal(self, row: IllegalRow) -> None:
        raw, messages = row.raw, row.messages()
        self.counts["illegal"] += 1
        for message in messages:
            self.progress.say(message)
        self.events.emit("row_illegal", source=raw.source, id=row.id, message="\n".join(messages))
        self.publisher.submit(lambda: self._illegal.add(self.writer.write_illegal(raw, messages)), _nothing)

    def _take_copy(self, planned: PlannedRow) -> None:
        name = planned.item.item_id
        from_key = self._first_key(name)
        older = self._older_failures(name, planned.key)

        request, raw, failures = planned.request, planned.raw, []

        def copy() -> None:
            try:
                if self.plan.latents_only:
                    self.writer.copy_preview_row(name, from_key, request, raw)
                    return
                self.writer.copy_index_row(name, from_key, request)
                self.writer.forget_older_failures(older, raw.source)
            except UnreadablePart as damage:
                failures.append(Failure("plan", 0, "infrastructure", str(damage)))
                self.writer.write_failed(name, request, raw, failures[0])

        def copied() -> None:
            if failures:
                self._say_failed(planned, failures[0])
            self.counts["failed" if failures else "rendered"] += 1

        self.publisher.submit(copy, copied)

    def _first_key(self, name: str) -> str | None:
        """The key of a row for which the item is finished (or has its preview, where that is all there will be)."""
        return self.plan.existing.preview_of(name) if self.plan.latents_only else self.plan.existing.key_of(name)

    def _forget_failure(self, planned: PlannedRow) -> None:
        self.publisher.submit(lambda: self.writer.forget_failure(planned.item_id, planned.key), _nothing)

    # --- outcomes --------------------------------------------------------------------------------

    def finish(self, work: TrackedItem, clip: Clip, numerics: str) -> None:
        """The item's last stage came back with `clip`."""
        flags = ("prompt_truncated",) if work.info.get("prompt_truncated") else ()
        if before := work.info.get("stage_1_numerics"):
            # its stored stage 1 was computed otherwise, in an earlier run
            numerics = canonical_json({**json.loads(numerics), "stage_1": json.loads(before)})
        rendered = Rendered(
            clip=clip,
            attempts=work.attempts,
            recipe=canonical_json(work.item.recipe),
            recipe_digest=work.item.recipe_digest,
            numerics=numerics,
            noise_ledger=canonical_json(work.info.get("noise_ledger")),
            versions=self.versions,
            device=work.device,
            seconds={**work.seconds, "gpu_seconds": work.gpu_seconds},
            stage1_replica=work.replicas.get("stage1"),
            stage2_replica=work.replicas.get("stage2"),
            switches=work.switches,
            extra_flags=flags,
        )
        self._end(work, rendered)

    def fail(self, work: TrackedItem, failure: Failure) -> None:
        """The item is given up."""
        if len(self._given_up) < _REMEMBERED:
            self._given_up[work.item.item_id] = failure
        self._end(work, failure)

    def _end(self, work: TrackedItem, outcome: Rendered | Failure) -> None:
        work.outcome = outcome
        work.payloads.clear()
        for planned in work.rows:
            self._write(work, planned)

    def _write(self, work: TrackedItem, planned: PlannedRow) -> None:
        work.writing += 1
        name, outcome = work.item.item_id, work.outcome
        older = [] if self.plan.latents_only else self._older_failures(name, planned.key)
        if isinstance(outcome, Failure):
            self.publisher.submit(
                lambda: self._write_failed(name, planned, outcome, older),
                lambda: self._failed(work, planned, outcome),
            )
        else:
            self.publisher.submit(
                lambda: self._write_rendered(name, planned, outcome, older), lambda: self._rendered(work, planned)
            )

    def _write_rendered(self, name: str, planned: PlannedRow, rendered: Rendered, older: list[str]) -> None:
        if self.plan.latents_only:
            self.writer.write_preview(name, planned.request, planned.raw, rendered)
            return
        self.writer.write_index(name, planned.request, rendered)
        self.writer.forget_older_failures(older, planned.raw.source)

    def _write_failed(self, name: str, planned: PlannedRow, failure: Failure, older: list[str]) -> None:
        self.writer.write_failed(name, planned.request, planned.raw, failure)
        self.writer.forget_older_failures(older, planned.raw.source)

    def _rendered(self, work: TrackedItem, planned: PlannedRow) -> None:
        finished = self.plan.existing.add_preview if self.plan.latents_only else self.plan.existing.add_row
        finished(work.item.item_id, planned.key)
        self._count(work, "rendered")
        self.events.emit("item_finished", item_id=work.item.item_id, id=planned.request.id)

    def _failed(self, work: TrackedItem, planned: PlannedRow, failure: Failure) -> None:
        self._count(work, "failed")
        self._say_failed(planned, failure)

    def _say_failed(self, planned: PlannedRow, failure: Failure) -> None:
        row_id, stage, message = planned.request.id, failure.stage, failure.message
        self.progress.say(f"{row_id}: failed in {stage}: {first_line(message)}")
        self.events.emit("item_failed", item_id=planned.item_id, id=row_id, stage=stage, message=message)

    def _count(self, work: TrackedItem, outcome: str) -> None:
        self.counts[outcome] += 1
        self.metrics.item(outcome)
        work.writing -= 1
        if not work.writing:
            self.work.pop(work.item.item_id, None)

    def _older_failures(self, name: str, key: str) -> list[str]:
        """Parts in which the row failed as another item: with other weights, or before it was edited."""
        failed = self.plan.existing.failed_parts(key)
        return [failed_name(kind, item, key) for item, kind in failed if item != name]

    def close(self, complete: bool) -> None:
        """The end of a run: `complete` when every row of the manifest was read."""
        self.publisher.poll()
        if complete and self.plan.complete:
            self.writer.forget_illegal(self.plan.manifest, keep=self._illegal)


def first_line(text: str) -> str:
    """The first line of a message."""
    return text.strip().splitlines()[0] if text.strip() else "no message"


def _nothing() -> None:
    pass
