"""Which manifest rows ask for which item, what the item's stages have made, and how it ended.

Rows arrive as the plan has judged them and leave through the dataset's writer: rendered, failed, illegal, or done
before. Nothing here decides what runs.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ltx_ray.dataset import layout
from ltx_ray.dataset.clip_rate import FIRST_STAGES, ClipRate
from ltx_ray.dataset.failures import FailureScope
from ltx_ray.dataset.parts import UnreadablePart
from ltx_ray.dataset.quality import QualitySums
from ltx_ray.dataset.writer import DatasetWriter, Failure, Rendered
from ltx_ray.driver.events import EventLog
from ltx_ray.driver.illegal_rows import IllegalRows
from ltx_ray.driver.progress import Progress
from ltx_ray.driver.publisher import Publisher
from ltx_ray.driver.run_metrics import RunMetrics
from ltx_ray.manifest.rules import IllegalRow, RowProblem
from ltx_ray.placement.numerics import numerics_of_row
from ltx_ray.planning.estimate import PlannedWork
from ltx_ray.planning.identity import recipe_json
from ltx_ray.planning.plan import COPY, DONE, FAILED, REMOVED, REPEATED, Plan, PlanEntry, PlannedRow
from ltx_ray.planning.row_images import UnreadRow
from ltx_ray.records import CallReport, Clip, NoiseLedger, WorkItem, canonical_json, first_line
from ltx_ray.stages import DIFFUSION_STAGES, TRAITS, Stage, needed_results

#: Failed items that are remembered for rows that ask for the same clip later.
_REMEMBERED_FAILURES = 10_000


@dataclass
class TrackedItem:
    """An item in the pools: the manifest rows that ask for it, and the results of its stages so far."""

    item: WorkItem
    rows: list[PlannedRow]
    #: Handles of the results that later stages take.
    payloads: dict[Stage, Any] = field(default_factory=dict)
    #: Handle of the context of its negative prompt, where that is apart from the result of text.
    negative: Any = None
    #: Bytes of the results, those that were dropped included.
    sizes: dict[Stage, float] = field(default_factory=dict)
    #: Seconds of the last call of each stage, and the replica that made it.
    seconds: dict[Stage, float] = field(default_factory=dict)
    replicas: dict[Stage, str] = field(default_factory=dict)
    switches: int = 0
    gpu_seconds: float = 0.0
    attempts: int = 1
    device: str = ""
    prompt_truncated: bool = False
    noise_ledger: NoiseLedger | None = None
    #: The numerics of stage 1 as JSON, if a run with others, or another model of GPU, has made its latents.
    stage1_numerics: str | None = None
    #: Why the item is given up, while its latents are still being saved.
    failure: Failure | None = None
    #: How the item ended, while its rows are being written.
    outcome: Rendered | Failure | None = None
    #: Rows that are being written, and whether one has been: the clip is published.
    writing: int = 0
    published: bool = False

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.item.request.id or self.item.item_id

    @property
    def nbytes(self) -> float:
        """Bytes of its results that are kept."""
        return sum(self.sizes[made] for made in self.payloads)

    def inputs(self, stage: Stage) -> list[Any]:
        """The payloads that a call of `stage` takes."""
        return [self.payloads[made] for made in TRAITS[stage].inputs if made in self.payloads]

    def take_call(self, stage: Stage, replica: str, report: CallReport, gpu_seconds: float) -> None:
        """Record what a call has cost, whether or not it succeeded."""
        self.gpu_seconds += gpu_seconds
        self.seconds[stage] = report.seconds
        self.replicas[stage] = replica
        self.switches += report.switches

    def take_result(self, stage: Stage, report: CallReport, payload: Any) -> None:
        """Record the result of a call that succeeded."""
        made = TRAITS[stage].result
        self.payloads[made], self.sizes[made] = payload, report.nbytes
        facts = report.facts
        # Of two ways to the latents of stage 1, what an earlier attempt recorded on the other way is void.
        if stage in (Stage.STAGE1, Stage.LOAD_LATENTS):
            other = Stage.STAGE1 if stage == Stage.LOAD_LATENTS else Stage.LOAD_LATENTS
            self.seconds.pop(other, None)
            self.replicas.pop(other, None)
            self.stage1_numerics = None
        if stage in DIFFUSION_STAGES:
            self.device = facts.device_name or report.device
            self.noise_ledger = facts.noise_ledger
            self.stage1_numerics = facts.stage1_numerics
        if stage == Stage.DECODE and facts.noise_ledger is not None:
            # The preview is of latents that an earlier run stored.
            self.noise_ledger, self.stage1_numerics = facts.noise_ledger, facts.stage1_numerics
        if stage == Stage.TEXT:
            self.prompt_truncated = facts.prompt_truncated

    def drop_results(self, path: tuple[Stage, ...]) -> None:
        """Drop the results that no stage on `path` takes."""
        needed = needed_results(path)
        for stage in [stage for stage in self.payloads if stage not in needed]:
            del self.payloads[stage]


class RowTracker:
    """`counts`: rows, rendered, already_done, failed, illegal, removed. `versions` as JSON."""

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
        self.metrics = RunMetrics(events.run_id)
        #: Of the clips that this run publishes, in the time of `time.monotonic`.
        self.rate = ClipRate()
        #: What those clips cost, and what the clips would have cost that are given up.
        self.done_work, self.given_up_work = PlannedWork(), PlannedWork()
        #: What was measured of them.
        self.quality = QualitySums()
        #: Rows that have failed in this run, by the class of their failure.
        self.failures: Counter[str] = Counter()
        #: The items in the pools and those whose rows are being written, by item_id.
        self.items: dict[str, TrackedItem] = {}
        self.exhausted = False
        self._illegal = IllegalRows(progress.say)
        self._scope = FailureScope(writer.log.store, plan.manifest)
        self._said_unchecked = False
        #: By item_id: a row that asks later for an item that has failed in this run fails the same way.
        self._given_up: dict[str, Failure] = {}

    @property
    def done(self) -> int:
        """Rows that have their clip, of this run or from before."""
        return self.counts["rendered"] + self.counts["already_done"]

    @property
    def expected_rows(self) -> int | None:
        """All rows of the run; None while only reading the manifest will tell."""
        return self.counts["rows"] if self.exhausted else self.plan.expected_rows

    @property
    def failed(self) -> int:
        """Rows that have failed or are illegal."""
        return self.counts["failed"] + self.counts["illegal"]

    @property
    def at_fault(self) -> int:
        """Rows that have failed by their own fault, in this run or before. Illegal ones are apart."""
        return self.counts["failed"] - self.failures["infrastructure"]

    @property
    def waits_for_images(self) -> bool:
        """Whether the images of the next row are still being read."""
        return not self.exhausted and not self.plan.next_is_ready

    def take(self, rows: Iterator[PlanEntry], at_most: int, wait: bool = True) -> Iterator[TrackedItem]:
        """Read up to `at_most` rows and yield the items that are new.

        No row after the first is waited for, nor is the first without `wait`.
        """
        existing = self.plan.existing
        for number in range(at_most):
            if self.waits_for_images and (number or not wait):
                return
            planned = next(rows, None)
            if planned is None:
                self.exhausted = True
                return
            if isinstance(planned, IllegalRow):
                self.counts["rows"] += 1
                self._take_illegal(planned)
                continue
            if isinstance(planned, UnreadRow):
                self.counts["rows"] += 1
                self._take_unread(planned)
                continue
            if planned.status == REPEATED:
                continue
            if planned.status == REMOVED:
                self.counts["removed"] += 1
                continue
            self.counts["rows"] += 1
            if planned.status == DONE:
                self.counts["already_done"] += 1
                if existing.failed_count:
                    self._forget_failures_of_done(planned)
            elif planned.status == FAILED:
                self.counts["failed"] += 1
            elif planned.status == COPY:
                self._take_copy(planned)
            elif (tracked := self._take_row(planned)) is not None:
                yield tracked

    def _take_row(self, planned: PlannedRow) -> TrackedItem | None:
        """Attach a row to its item; the item when it is new."""
        item = planned.item
        tracked = self.items.get(item.item_id)
        if tracked is not None:
            tracked.rows.append(planned)
            if tracked.outcome is not None:
                self._write(tracked, planned)
        elif item.item_id in self._given_up:
            self._write(TrackedItem(item, [planned], outcome=self._given_up[item.item_id]), planned)
        elif self._finished(item.item_id) is not None:
            self._take_copy(planned)  # The item was finished after the row was planned.
        else:
            tracked = self.items[item.item_id] = TrackedItem(item, [planned])
            return tracked
        return None

    def refuse(self, tracked: TrackedItem, problem: RowProblem) -> None:
        """The run cannot render an item that was just taken, so its rows are illegal here."""
        del self.items[tracked.item.item_id]
        self._give_up_work(tracked)
        for planned in tracked.rows:
            self._take_illegal(planned.refused(problem))
            self._forget_failure(planned)

    def _take_illegal(self, row: IllegalRow) -> None:
        raw, messages = row.raw, row.messages()
        self.counts["illegal"] += 1
        if self._illegal.take(row):
            self.events.emit("row_illegal", source=raw.source, id=row.id, message="\n".join(messages))
        self.publisher.submit(lambda: self._scope.found(self.writer.write_illegal(raw, messages)), _nothing)

    def _take_unread(self, row: UnreadRow) -> None:
        failure = Failure("plan", 0, "infrastructure", row.message)
        self.counts["failed"] += 1
        self._report(row.id, None, failure)
        self.publisher.submit(lambda: self._scope.found(self.writer.write_unplanned(row.raw, failure)), _nothing)

    def _take_copy(self, planned: PlannedRow) -> None:
        item_id = planned.item.item_id
        finished = self._finished(item_id)
        assert finished is not None
        table, from_key = finished
        request, raw = planned.request, planned.raw
        failures: list[Failure] = []

        def copy() -> None:
            try:
                if table == layout.PREVIEWS:
                    self.writer.copy_preview_row(item_id, from_key, request, raw)
                    return
                self.writer.copy_index_row(item_id, from_key, request)
                self._forget_older_failures(planned)
            except (UnreadablePart, FileNotFoundError) as damage:
                failures.append(Failure("plan", 0, "infrastructure", str(damage)))
                self.writer.write_failed(item_id, request, raw, failures[0])

        def copied() -> None:
            if failures:
                self._report_failure(planned, failures[0])
            self.counts["failed" if failures else "rendered"] += 1

        self.publisher.submit(copy, copied)

    def _finished(self, item_id: str) -> tuple[str, str] | None:
        """The table and the key of a row whose item is finished, or has its preview in a run that makes only those."""
        existing = self.plan.existing
        if (key := existing.key_of(item_id)) is not None:
            return layout.INDEX, key
        if self.plan.latents_only and (key := existing.preview_of(item_id)) is not None:
            return layout.PREVIEWS, key
        return None

    def _forget_failure(self, planned: PlannedRow) -> None:
        self.publisher.submit(lambda: self.writer.forget_failure(planned.item_id, planned.id), _nothing)

    def _forget_failures_of_done(self, planned: PlannedRow) -> None:
        """A row was done before, and may have a failure nevertheless."""
        raw, existing = planned.raw, self.plan.existing
        if existing.failure(planned.item_id, planned.key):
            # The run that finished the row was killed before it could remove the row's failure.
            self._forget_failure(planned)
        if raw.values.get("images") and existing.failures_of_key(layout.row_key(raw.source)):
            # A later run could not read its image, and so could not tell that it was done.
            self.publisher.submit(lambda: self.writer.forget_unplanned(raw), _nothing)

    def call_begins(self, tracked: TrackedItem, stage: Stage, time: float) -> None:
        """A call of `stage` is dispatched at `time` of `time.monotonic`."""
        if stage in FIRST_STAGES and not tracked.item.preflight:
            self.rate.began(time)

    def say_unchecked(self, tracked: TrackedItem) -> None:
        """Warn once in a run that latents without a digest were continued."""
        if not self._said_unchecked:
            self._said_unchecked = True
            message = (
                f"stored latents of an older version have no digest and are taken as they are, such as those of "
                f"{tracked.name}"
            )
            self.progress.say(message)
            self.events.emit("warning", message=message)

    # --- outcomes --------------------------------------------------------------------------------

    def finish(self, tracked: TrackedItem, clip: Clip, numerics: str) -> None:
        """The item's last stage returned `clip`. `numerics` of the run as JSON."""
        numerics = numerics_of_row(numerics, tracked.item.request)
        if tracked.stage1_numerics is not None:
            numerics = canonical_json({**json.loads(numerics), "stage_1": json.loads(tracked.stage1_numerics)})
        seconds = {f"{stage}_seconds": spent for stage, spent in tracked.seconds.items()}
        rendered = Rendered(
            clip=clip,
            attempts=tracked.attempts,
            recipe=recipe_json(tracked.item.recipe),
            recipe_digest=tracked.item.recipe_digest,
            numerics=numerics,
            noise_ledger=canonical_json(tracked.noise_ledger),
            versions=self.versions,
            device=tracked.device,
            seconds={**seconds, "gpu_seconds": tracked.gpu_seconds},
            stage1_replica=tracked.replicas.get(Stage.STAGE1),
            stage2_replica=tracked.replicas.get(Stage.STAGE2),
            switches=tracked.switches,
            extra_flags=("prompt_truncated",) if tracked.prompt_truncated else (),
        )
        self._end(tracked, rendered)

    def fail(self, tracked: TrackedItem, failure: Failure) -> None:
        """The item is given up."""
        if len(self._given_up) < _REMEMBERED_FAILURES:
            self._given_up[tracked.item.item_id] = failure
        self._give_up_work(tracked)
        self._end(tracked, failure)

    def _give_up_work(self, tracked: TrackedItem) -> None:
        self.given_up_work.add(tracked.rows[0].estimate(self.plan.builder.checkpoint.transformer))

    def _end(self, tracked: TrackedItem, outcome: Rendered | Failure) -> None:
        tracked.outcome = outcome
        tracked.payloads.clear()
        for planned in tracked.rows:
            self._write(tracked, planned)

    def _write(self, tracked: TrackedItem, planned: PlannedRow) -> None:
        tracked.writing += 1
        item_id, outcome = tracked.item.item_id, tracked.outcome
        if isinstance(outcome, Failure):
            self.publisher.submit(
                lambda: self._write_failed(item_id, planned, outcome),
                lambda: self._failed(tracked, planned, outcome),
            )
        else:
            assert outcome is not None
            self.publisher.submit(
                lambda: self._write_rendered(item_id, planned, outcome),
                lambda: self._rendered(tracked, planned),
            )

    def _write_rendered(self, item_id: str, planned: PlannedRow, rendered: Rendered) -> None:
        if self.plan.latents_only:
            self.writer.write_preview(item_id, planned.request, planned.raw, rendered)
            return
        self.writer.write_index(item_id, planned.request, rendered)
        self._forget_older_failures(planned)

    def _write_failed(self, item_id: str, planned: PlannedRow, failure: Failure) -> None:
        self.writer.write_failed(item_id, planned.request, planned.raw, failure)
        if not self.plan.latents_only:
            self._forget_older_failures(planned)

    def _rendered(self, tracked: TrackedItem, planned: PlannedRow) -> None:
        if not tracked.published:
            tracked.published = True
            self.rate.published(time.monotonic())
            assert isinstance(tracked.outcome, Rendered)
            self.quality.add(tracked.outcome.measures, tracked.outcome.flags)
            self.done_work.add(planned.estimate(self.plan.builder.checkpoint.transformer))
        self._count(tracked, "rendered")
        self.events.emit("item_finished", item_id=tracked.item.item_id, id=planned.request.id)

    def _failed(self, tracked: TrackedItem, planned: PlannedRow, failure: Failure) -> None:
        self._count(tracked, "failed")
        self._report_failure(planned, failure)

    def _report_failure(self, planned: PlannedRow, failure: Failure) -> None:
        self._report(planned.request.id, planned.item_id, failure)

    def _report(self, row_id: str | None, item_id: str | None, failure: Failure) -> None:
        self.failures[failure.error_class] += 1
        stage, message = failure.stage, failure.message
        self.progress.say(f"{row_id}: failed in {stage}: {first_line(message)}")
        self.events.emit("item_failed", item_id=item_id, id=row_id, stage=stage, message=message)

    def _count(self, tracked: TrackedItem, outcome: str) -> None:
        self.counts[outcome] += 1
        tracked.writing -= 1
        if not tracked.writing:
            self.items.pop(tracked.item.item_id, None)

    def _forget_older_failures(self, planned: PlannedRow) -> None:
        """The row may have failed as another item: with other weights, or before it was edited."""
        item_id, raw, existing = planned.item_id, planned.raw, self.plan.existing
        if not existing.may_have_failures:
            return
        if any(other != item_id for other, _ in existing.failures_of_key(planned.key)):
            self.writer.forget_older_failures(item_id, planned.request, raw.source)
        if existing.failures_of_key(layout.row_key(raw.source)):
            self.writer.forget_unplanned(raw)  # at this place it was illegal, or its image could not be read

    def close(self, complete: bool) -> None:
        """End of the run. `complete`: every row of the manifest was read."""
        self.publisher.poll()
        self._illegal.summarize()
        if complete and self.plan.complete:
            self.writer.complete(self._scope)


def _nothing() -> None:
    pass
