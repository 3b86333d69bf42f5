"""One run from end to end: what was asked for is checked, rows are planned, driven over a cluster and recorded."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from ltx_ray.checkpoints.checkpoint import Checkpoint, check_parallel, check_transformer, open_checkpoint
from ltx_ray.checkpoints.lora import check_lora
from ltx_ray.checkpoints.node_cache import pinned
from ltx_ray.checkpoints.parts import check_other_models
from ltx_ray.config import EngineSpec, ModelFiles, Numerics, RequestedNumerics, RunLimits, Selection
from ltx_ray.dataset.description import describe
from ltx_ray.dataset.existing import ExistingRows, list_existing
from ltx_ray.dataset.fold import fold_dataset, fold_output, remove_empty_folders
from ltx_ray.dataset.gpu_time import GpuTime
from ltx_ray.dataset.identity import KeptIdentity, scheme_at
from ltx_ray.dataset.known_answers import KnownAnswers
from ltx_ray.dataset.output import check_creation, check_place, is_own_table, is_within, wait_seconds
from ltx_ray.dataset.removal import finish_removals
from ltx_ray.dataset.row_log import RowLog
from ltx_ray.dataset.run_cost import cost_of
from ltx_ray.dataset.writer import DatasetWriter
from ltx_ray.driver.admission import Claims
from ltx_ray.driver.events import EventLog
from ltx_ray.driver.joined_cluster import JoinedCluster
from ltx_ray.driver.last_report import write_last_report
from ltx_ray.driver.loop import Driver
from ltx_ray.driver.progress import Progress
from ltx_ray.driver.publisher import Publisher
from ltx_ray.driver.row_traces import RowTraces
from ltx_ray.driver.run_record import RunRecord, SoFar, keep_older_run, last_lines, recorded_counts
from ltx_ray.driver.signals import RunSignals, Stopped
from ltx_ray.driver.tracker import RowTracker
from ltx_ray.manifest.raw import RawRow
from ltx_ray.manifest.reader import manifest_folder
from ltx_ray.manifest.rules import RowRules, check_defaults
from ltx_ray.placement.cluster import Cluster, where_to_run
from ltx_ray.placement.memory import checked_budget
from ltx_ray.placement.numerics import check as check_numerics
from ltx_ray.placement.numerics import check_widths, numerics_json
from ltx_ray.placement.sizing import ParallelConfig
from ltx_ray.planning.disk_space import expected_shortage
from ltx_ray.planning.estimate import Stored
from ltx_ray.planning.first_clip import FirstClip
from ltx_ray.planning.legality import check_legality
from ltx_ray.planning.plan import ItemBuilder, Plan, PlanEntry, item_to_render
from ltx_ray.planning.preflight import preflight_item
from ltx_ray.planning.promotion import promoted
from ltx_ray.pools.pool import ModelRefused, StartFailed
from ltx_ray.presets import served_pipelines
from ltx_ray.records import LoraUse, canonical_json
from ltx_ray.stages import FULL_PATH, PREVIEW_PATH
from ltx_ray.storage.credentials import masked
from ltx_ray.storage.images import check_roots
from ltx_ray.storage.lease import Lease
from ltx_ray.storage.locations import recorded
from ltx_ray.storage.reasons import reason
from ltx_ray.storage.store import Store, clean_stale

#: No process is still writing a temporary file of this age, in seconds.
_STALE_SECONDS = 3600.0
#: Seconds for which an output that cannot be reached is retried before the run ends.
_OUTPUT_RETRY_SECONDS = 600.0
_CHECK_RETRY_SECONDS = 10.0

_ENGINES = {
    "text": "ltx_ray.engine.text:TextEngine",
    "diffusion": "ltx_ray.engine.diffusion:DiffusionEngine",
    "decode": "ltx_ray.engine.decode:DecodeEngine",
}


class ExitCode(IntEnum):
    """How a command ends (docs/failure-model.md#exit-codes)."""

    #: Every row is in the index.
    OK = 0
    #: Anything that no other code stands for.
    ERROR = 1
    #: The options, the model, the manifest or the cluster do not allow what was asked for.
    USAGE = 2
    #: Some rows failed; or, of `plan` and `verify`: something is wrong.
    FAILED_ROWS = 3
    #: The run was told to stop and left rows. The same command resumes.
    DRAINED = 4


@dataclass(frozen=True)
class Options:
    """What a user asked for, as given."""

    manifest: str
    output: str | None
    model: ModelFiles
    numerics: RequestedNumerics = RequestedNumerics()  # noqa: RUF009 (frozen)
    parallel: ParallelConfig = ParallelConfig()  # noqa: RUF009 (frozen)
    #: Whether text and decode run on the DiT's GPUs: "on", "off", or "auto" for "on" where all GPUs are free.
    share_cards: str = "auto"
    trace: bool = False  # of every row, to where OpenTelemetry's variables say
    wait_for_gpus: float = 0.0  # seconds, for those of a running cluster that is busy
    gpu_model: str | None = None  # Ray's name of the GPUs to use
    gpu_price: float | None = None  # dollars for an hour of one GPU
    #: Address of a running Ray cluster; None for that of RAY_ADDRESS, or else a private one.
    ray_address: str | None = None
    #: Defaults of row fields, by column.
    row_defaults: Mapping[str, Any] = field(default_factory=dict)
    selection: Selection = Selection()  # noqa: RUF009 (frozen)
    samples_per_prompt: int = 1
    save_latents: bool = False
    #: "stage1" for previews; None for finished clips.
    stop_after: str | None = None
    #: Whether the output may be in a store that does not refuse to create a file twice. See `Store.create`.
    single_writer: bool = False
    wait_for_output: float | None = None  # seconds; see dataset.output.wait_seconds
    image_roots: tuple[str, ...] = ()
    limits: RunLimits = RunLimits()  # noqa: RUF009 (frozen)
    #: Whether rows that failed by their own fault are tried again.
    retry_failed: bool = False
    #: The rows are previews. These items resume from their stored latents; the other rows are passed over.
    promote: frozenset[str] | None = None
    allow_illegal: bool = False  # even if many of the manifest's first rows are
    exit_zero_on_failed_rows: bool = False  # in place of 3, when none is left
    #: Whether a tiny clip goes through every pool before a pool grows beyond one replica.
    preflight: bool = True
    #: Whether noise may be drawn on another device than that of the dataset's other clips.
    allow_other_noise: bool = False
    #: The scheme of item_ids; None for that of the output's rows, or the newest.
    scheme: int | None = None
    #: The command line, for the record.
    command: tuple[str, ...] = ()
    #: Dotted paths of the engines, by kind.
    engines: Mapping[str, str] = field(default_factory=lambda: dict(_ENGINES))

    @property
    def stored(self) -> Stored:
        return Stored(self.save_latents, self.stop_after is not None, self.numerics.dtype)


@dataclass(frozen=True)
class Prepared:
    """Options that were found to be legal, and what follows from them."""

    options: Options
    checkpoint: Checkpoint
    #: The manifest, before it is compared with a dataset.
    plan: Plan
    #: What a user should know, though it prevents nothing.
    warnings: tuple[str, ...] = ()


def prepare(options: Options) -> Prepared:
    """Check everything that needs neither GPU nor Ray. Raises ValueError for a user's mistake.

    The plan knows no dataset yet: `plan.against` is for the caller, once the dataset may be read.
    """
    model = options.model.in_place()
    checkpoint = open_checkpoint(model.checkpoint_path)
    parallel = options.parallel
    check_transformer(checkpoint)
    check_parallel(
        checkpoint, parallel.tp, parallel.stage2_tp, parallel.sequence_parallel, parallel.stage1_sequence_parallel
    )
    parallel.check(model.distilled)
    check_other_models(model)
    loras = ([model.distilled_lora] if model.distilled_lora else []) + [lora.path for lora in model.loras]
    warnings = [warning for path in loras if (warning := check_lora(checkpoint, path)) is not None]
    defaults = check_defaults(options.row_defaults)
    check_roots(options.image_roots)
    check_numerics(options.numerics)
    check_widths(options.numerics, parallel, checkpoint.transformer)
    # Paths in rows of failed/ and previews/ count from the manifest that the rows were in first.
    own_folder = () if is_own_table(options.manifest, options.output) else (manifest_folder(options.manifest),)
    rules = RowRules(
        defaults=defaults,
        num_layers=checkpoint.transformer.num_layers,
        pipelines=served_pipelines(model.distilled),
        loras=tuple(LoraUse(lora.name, lora.strength) for lora in model.loras),
        image_roots=options.image_roots or own_folder,
    )
    plan = Plan(
        manifest=options.manifest,
        rules=rules,
        builder=ItemBuilder(model, options.numerics, options.scheme or scheme_at(options.output, _CHECK_RETRY_SECONDS)),
        selection=options.selection,
        samples=options.samples_per_prompt,
        retry_failed=options.retry_failed,
        latents_only=options.stop_after is not None,
        promote=options.promote,
    )
    return Prepared(replace(options, model=pinned(options.model)), checkpoint, plan, tuple(warnings))


def render(options: Options) -> ExitCode:
    """Render the manifest. Raises ValueError for a user's mistake, ConnectionError without an answer of the cluster."""
    with RunSignals() as signals:
        try:
            return _render(options, signals)
        except Stopped as signal:
            Progress().say(f"stopped by {signal} before the first clip; the same command starts again")
            return ExitCode.DRAINED


def _render(options: Options, signals: RunSignals) -> ExitCode:
    assert options.output is not None
    check_place(options.output)
    prepared = prepare(options)
    address = where_to_run(options.ray_address)
    # What is wrong with the manifest as a whole is reported before the output is touched.
    notes: list[str] = []
    if is_within(options.manifest, options.output):
        # Rows that failed in a run that was killed are in no part of failed/ yet.
        wait = wait_seconds(options.wait_for_output, options.selection)
        fold_output(Store(options.output), Progress().say, wait_seconds=wait)
    raws = prepared.plan.read(notes.append)
    if not (options.retry_failed or options.promote is not None):  # whose manifest is a table of a dataset
        prepared = replace(prepared, warnings=(*prepared.warnings, *notes))
        if not options.allow_illegal and options.selection.ids is None:
            check_legality(prepared.plan)
    store = Store(options.output)
    store.check_writable()
    check_creation(store, options.single_writer)
    return Run(prepared, store, address, signals).execute(raws)


class Run:
    """One run into an output: from its lease to the last temporary file."""

    def __init__(self, prepared: Prepared, store: Store, address: str | None, signals: RunSignals):
        """`address` of the cluster; None for a private one."""
        self.signals = signals
        self.prepared, self.options, self.store = prepared, prepared.options, store
        self.run_id = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
        self.progress = Progress()
        self.lease = Lease(store, self.run_id)
        self._first_clip = FirstClip()
        options = self.options
        self.identity = KeptIdentity(store, self.progress.say, options.allow_other_noise)
        self.cluster = Cluster(
            address=address, parallel=replace(options.parallel, with_stage2=options.stop_after is None),
            requested=options.numerics, checkpoint=prepared.checkpoint, model=options.model, engines=self._engines,
            share_cards=options.share_cards, wait_for_gpus=options.wait_for_gpus, gpu_model=options.gpu_model,
            start_timeout=options.limits.start_timeout, say=self.progress.say, check_signals=signals.check,
        )  # fmt: skip

    def execute(self, raws: Iterator[RawRow]) -> ExitCode:
        """Render the manifest's rows, `raws`."""
        self.progress.say(f"rendering {recorded(self.options.manifest)} into {self.store.name}")
        for warning in self.prepared.warnings:
            self.progress.say(warning)
        self.lease.acquire(self.progress.say, wait_seconds(self.options.wait_for_output, self.options.selection))
        try:
            self.identity.begin(self.prepared.plan.builder.scheme, self.options.scheme)
            existing = self._existing_rows()
            if not existing.has_noise:
                # A run that drew noise and finished nothing binds no later one to its GPUs.
                self.identity.forget_noise()
            plan = self.prepared.plan.against(existing)
            if plan.promote is None and (short := expected_shortage(self.store, plan, self.options.stored)) is not None:
                self.progress.say(short)
            return _Rendering(self, plan).execute(self._chosen(plan, plan.rows(raws)))
        finally:
            self._leave()

    def _existing_rows(self) -> ExistingRows:
        """List the dataset's rows, under the lease: rows that another run has just finished are done.

        What a run that was killed has finished is folded. Nothing that is folded is mended.
        """
        clean_stale(self.store, _STALE_SECONDS)
        existing = list_existing(self.store, self.progress.say)
        fold_dataset(self.store, existing, self.identity.dataset_id, self.run_id, self.progress.say)
        if finish_removals(self.store, existing, self.progress.say):
            existing = list_existing(self.store, self.progress.say)
        return existing

    def _chosen(self, plan: Plan, rows: Iterator[PlanEntry]) -> Iterator[PlanEntry]:
        """`rows`, of which a promotion refuses some. Ids that are selected and missing are named at the end."""
        if self.options.stop_after is None:  # A run that makes previews does not ask for latents.
            rows = plan.existing.latents.prefetched(rows, item_to_render)
        if self.options.promote is not None:
            rows = promoted(rows, plan)
        yield from self._first_clip.watch(rows)
        plan.say_missing_ids(self.progress.say)

    def _engines(self, numerics: Numerics) -> dict[str, EngineSpec]:
        o, plan = self.options, self.prepared.plan
        spec = EngineSpec(
            "", o.model, numerics, self.store.uri, o.save_latents, o.stop_after, scheme=plan.builder.scheme,
            first_shape=self._first_clip.shape,
        )  # fmt: skip
        return {kind: replace(spec, engine=path) for kind, path in o.engines.items()}

    def _leave(self) -> None:
        """Leave the cluster, delete temporary files and give the lease back."""
        # That takes seconds, and the next run would have to do what is left out. A second signal ends it nevertheless.
        self.signals.action = lambda name: None
        self.cluster.leave()
        if not self.lease.lost:
            # The run's workers have ended, so nobody finishes the files that they have begun.
            with contextlib.suppress(OSError):
                clean_stale(self.store, 0)
                remove_empty_folders(self.store)
                self.store.remove_scratch()
        self.lease.release()


class _Rendering:
    """The part of a run that renders: the driver on its cluster, and the records of both."""

    def __init__(self, run: Run, plan: Plan):
        options, store = run.options, run.store
        assert options.output is not None
        self._run, self._options, self._plan = run, options, plan
        keep_older_run(store)
        self._events = EventLog(store, run.run_id, RowTraces(run.run_id, run.progress.say) if options.trace else None)
        self._record = RunRecord(
            store,
            run_id=run.run_id,
            epoch=run.lease.epoch,
            command=[masked(argument) for argument in options.command],
            manifest=recorded(options.manifest),
            output=store.name,
            checkpoint=run.prepared.checkpoint,
            parallel=options.parallel,
            requested=options.numerics,
        )
        self._log = RowLog(
            store.retrying_for(_OUTPUT_RETRY_SECONDS),
            plan.existing,
            run.identity.dataset_id,
            run.run_id,
            holds_lease=lambda: not run.lease.lost,
            fold_failures=not is_within(options.manifest, options.output),
        )
        self._tracker = RowTracker(
            plan,
            DatasetWriter(self._log),
            Publisher(self._log),
            self._events,
            run.progress,
            canonical_json(self._record.versions),
        )
        self._gpu_time = GpuTime(store.retrying_for(_CHECK_RETRY_SECONDS), run.lease.epoch)
        self._driver = Driver(
            tracker=self._tracker,
            join_cluster=self._join_cluster,
            path=PREVIEW_PATH if options.stop_after else FULL_PATH,
            limits=options.limits,
            noise_device=options.numerics.noise_device,
            check_noise=run.identity.check_noise,
            use_stored=not options.stop_after,
            on_drain=lambda: self._write_record("draining"),
            should_stop=self._why_stop,
            gpu_seconds_before=self._gpu_time.before,
        )

    def execute(self, rows: Iterator[PlanEntry]) -> ExitCode:
        run = self._run
        state, code = self._drive(rows)
        # A run that was told to stop does not wait for a report.
        if state != "drained" and not self._driver.drain_requested and not run.lease.lost:
            run.signals.action = None
            write_last_report(run.store, self._tracker.counts["rows"], run.progress.say)
            run.signals.action = self._driver.request_drain
        tracker, rate, is_retry = self._tracker, self._record.clips_per_hour, self._options.retry_failed
        for line in last_lines(state, tracker.counts, tracker.at_fault, rate, run.store.name, is_retry):
            run.progress.say(line)
        return code

    def _drive(self, rows: Iterator[PlanEntry]) -> tuple[str, ExitCode]:
        """Render `rows` and record how it went; the run's state and its exit code."""
        state, code = "failed", ExitCode.ERROR
        try:
            self._write_record("running")
            self._events.emit("run_started", run_id=self._run.run_id)
            for warning in self._run.prepared.warnings:
                self._events.emit("warning", message=warning)
            self._events.flush()
            state, code = self._run_driver(rows)
        except ConnectionError:
            raise  # The cluster does not answer.
        except (Stopped, SystemExit):
            # A signal came before the cluster was joined. While it was being joined, Ray's handler has replaced ours.
            state, code = "drained", ExitCode.DRAINED
        except (StartFailed, OSError) as error:
            # An OSError is the output's, which could not be reached for as long as it is retried.
            self._run.progress.say(reason(error))
            code = ExitCode.USAGE if isinstance(error, ModelRefused) else code
        finally:
            self._run.signals.action = self._driver.request_drain
            self._fold()
            self._finish(state)
        return state, code

    def _fold(self) -> None:
        """Fold what the run has finished. What cannot be folded now is folded by the next run."""
        run = self._run
        try:
            self._log.close()
            if not run.lease.lost:
                run.identity.describe(functools.partial(describe, run.store, self._plan.existing))
        except OSError as error:
            run.progress.say(f"rows were not folded: {reason(error)}; ltx-ray fold {run.store.name} does that")

    def _run_driver(self, rows: Iterator[PlanEntry]) -> tuple[str, ExitCode]:
        """Render `rows`; the run's state and its exit code."""
        drained = self._driver.run(rows)
        state = "drained" if drained else "finished"
        if self._driver.too_many_failed:
            return state, ExitCode.FAILED_ROWS
        if drained:
            return state, ExitCode.DRAINED
        failed = self._tracker.counts["failed"] + self._tracker.counts["illegal"]
        return state, ExitCode.FAILED_ROWS if failed and not self._options.exit_zero_on_failed_rows else ExitCode.OK

    def _join_cluster(self) -> JoinedCluster:
        """What the driver calls when the first row is to be rendered."""
        options, run = self._options, self._run
        self._gpu_time.check(options.limits.max_gpu_hours)
        if options.numerics.noise_device == "cpu":
            run.identity.check_noise("cpu")
        placement = run.cluster.join()
        run.identity.check_numerics(json.loads(numerics_json(placement.numerics)))
        # Only now: joining sets variables that Ray reads when it is imported.
        from ltx_ray.pools.ray_replicas import RayReplicaSet

        if placement.parallel.names_a_layout and not options.parallel.names_a_layout:
            run.progress.say(f"layout chosen for {options.parallel.optimize}: {placement.parallel.flags}")
        files = run.prepared.checkpoint, options.model.in_place()
        budget = checked_budget(*files, placement.pools, placement.numerics, placement.largest_gpu)
        self._record.place(placement.pools, placement.numerics)
        # Until now there was nothing to finish, and Ray has set a handler of its own.
        run.signals.action = self._driver.request_drain
        run.signals.install()
        run.signals.check()
        self._write_record("running")
        replicas = {pool.name: pool.replicas for pool in placement.pools}
        self._events.emit("cluster_joined", pools=replicas, tp=placement.numerics.tp, device=placement.numerics.device)
        preflight = options.preflight and max(replicas.values()) > 1
        return JoinedCluster(
            RayReplicaSet(
                options.limits.start_timeout, placement.left_alone, options.limits.load_concurrency,
                run.cluster.foreign_nodes,
            ),
            placement.pools,
            numerics_json(placement.numerics),
            run.cluster.store_bytes,
            lease_age=lambda: run.lease.age,
            preflight=preflight_item(run.prepared.plan, options.model.distilled) if preflight else None,
            claims=Claims(run.prepared.plan.builder.digests, one_model=options.numerics.noise_device != "cpu"),
            answers=KnownAnswers(run.store.retrying_for(_CHECK_RETRY_SECONDS)),
            on_versions=self._take_versions,
            elastic=options.parallel.max_replicas is not None,
            new_nodes=run.cluster.new_nodes, max_gpus=options.parallel.max_gpus,
            problem=budget.problem if budget is not None else lambda request: None,
        )  # fmt: skip

    def _take_versions(self, versions: Mapping[str, str | None]) -> None:
        """The packages of the ranks have these versions, which the rows record."""
        self._record.versions = versions
        self._tracker.versions = canonical_json(dict(versions))

    def _why_stop(self) -> str | None:
        """Why the run has to end, if it has to. The driver asks at every turn, so the record is refreshed here."""
        if self._run.lease.lost:
            return f"another run has taken over {self._run.store.name}"
        if self._record.due:
            self._gpu_time.refresh(self._driver.gpu_seconds())
            self._record.refresh(self._so_far())
        return None

    def _write_record(self, state: str) -> None:
        self._record.write(state, self._so_far())

    def _so_far(self) -> SoFar:
        tracker, rate, events = self._tracker, self._tracker.rate, self._events.summary
        reserved = self._driver.gpu_seconds() - self._gpu_time.before
        cost = cost_of(reserved, self._options.gpu_price, rate.clips, tracker.done_work.total.seconds)
        per_hour = rate.per_hour(time.monotonic())
        return SoFar(tracker.counts, rate.clips, events, per_hour, cost, tracker.quality, tracker.expected_rows)

    def _finish(self, state: str) -> None:
        """Record how the run ended, unless another run has taken the output over and the records are its own."""
        if self._run.lease.lost:
            return
        self._events.emit("run_finished", state=state, counts=recorded_counts(self._tracker.counts))
        self._gpu_time.write(self._driver.gpu_seconds())
        self._write_record(state)
        self._events.flush()
