"""One run from end to end: model and plan checked, cluster joined, driver run, records written."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import secrets
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ltx_ray
from ltx_ray.checkpoints.checkpoint import (
    Checkpoint,
    check_gemma,
    check_parallel,
    check_transformer,
    check_upsampler,
    open_checkpoint,
)
from ltx_ray.checkpoints.lora import check_lora
from ltx_ray.config import ModelFiles, Numerics, PoolSpec, RunLimits, Selection
from ltx_ray.dataset import layout
from ltx_ray.dataset.existing import ExistingRows, list_existing
from ltx_ray.dataset.repair import repair
from ltx_ray.dataset.writer import DatasetWriter
from ltx_ray.driver.events import EventLog
from ltx_ray.driver.progress import Progress
from ltx_ray.manifest.reader import RawRow, manifest_folder
from ltx_ray.manifest.rules import IllegalRow, RowProblem, RowRules, check_defaults, judge
from ltx_ray.placement.cluster import Cluster
from ltx_ray.placement.memory import MemoryBudget, can_share
from ltx_ray.placement.numerics import check as check_numerics
from ltx_ray.placement.sizing import ParallelConfig
from ltx_ray.planning.plan import TODO, ItemBuilder, Plan, PlanEntry
from ltx_ray.pools.pool import StartFailed
from ltx_ray.presets import served_pipelines
from ltx_ray.records import LoraUse, WorkItem, canonical_json
from ltx_ray.stages import FULL_PATH, PREVIEW_PATH
from ltx_ray.storage.images import check_roots
from ltx_ray.storage.lease import Lease
from ltx_ray.storage.store import Store, clean_stale

#: A temporary file this old has no process that is still writing it.
_STALE_SECONDS = 3600.0
#: Seconds for which the output may stay away before a run ends, and for which its own record is worth waiting.
_INDEX_PATIENCE, _RECORD_PATIENCE = 600.0, 10.0
#: Rows up to which a run into an object store ends with a report.
_REMOTE_REPORT_ROWS = 500

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_FAILED_ROWS, EXIT_DRAINED = 0, 1, 2, 3, 4

_ENGINES = {
    "text": "ltx_ray.engine.text:TextEngine",
    "diffusion": "ltx_ray.engine.diffusion:DiffusionEngine",
    "decode": "ltx_ray.engine.decode:DecodeEngine",
}
_PACKAGES = ("torch", "ray", "diffusers", "transformers", "safetensors", "av", "pyarrow")


@dataclass(frozen=True)
class Options:
    """What a user asked for, as given."""

    manifest: str
    output: str | None
    model: ModelFiles
    dtype: str = "bfloat16"
    precision: str = "bf16"
    attention: str = "auto"
    compile: str = "auto"
    share_cards: str = "auto"
    noise_device: str = "model"
    row_defaults: Mapping[str, Any] = field(default_factory=dict)
    parallel: ParallelConfig = ParallelConfig()  # noqa: RUF009 (frozen)
    device: str = "auto"
    ray_address: str | None = None
    selection: Selection = Selection()  # noqa: RUF009 (frozen)
    samples_per_prompt: int = 1
    save_latents: bool = False
    stop_after: str | None = None
    image_roots: tuple[str, ...] = ()
    limits: RunLimits = RunLimits()  # noqa: RUF009 (frozen)
    retry_failed: bool = False
    #: The rows are previews, of which these items go on from their stored latents or not at all.
    promote: frozenset[str] | None = None
    #: Whether a tiny clip goes through the line before pools grow beyond one replica.
    preflight: bool = True
    command: tuple[str, ...] = ()
    engines: Mapping[str, str] = field(default_factory=lambda: dict(_ENGINES))


@dataclass(frozen=True)
class Prepared:
    """Options found to be legal, with what was learnt on the way."""

    options: Options
    checkpoint: Checkpoint
    plan: Plan
    numerics: Numerics
    #: What a user should know, though it stops nothing.
    warnings: tuple[str, ...] = ()


def prepare(options: Options) -> Prepared:
    """Check everything that needs no GPU and no Ray. Raises ValueError for a user's mistake.

    The plan knows no dataset yet: `plan.against` is for the caller, once the dataset may be read.
    """
    model = options.model.local()
    checkpoint = open_checkpoint(model.checkpoint_path)
    parallel = options.parallel
    check_transformer(checkpoint)
    check_parallel(checkpoint, parallel.tp, parallel.stage2_tp, parallel.sequence_parallel)
    parallel.check(model.distilled)
    check_upsampler(model.spatial_upsampler_path)
    check_gemma(model.gemma_root)
    loras = ([model.distilled_lora] if model.distilled_lora else []) + [lora.path for lora in model.loras]
    warnings = [said for path in loras if (said := check_lora(checkpoint, path)) is not None]
    defaults = check_defaults(options.row_defaults)
    check_roots(options.image_roots)
    numerics = Numerics(
        dtype=options.dtype,
        precision=options.precision,
        noise_device=options.noise_device,
        attention=options.attention,
        compile=options.compile,
        tp=parallel.tp,
        stage2_tp=parallel.tp_of_stage2,
        guidance_parallel=parallel.guidance_parallel,
        sequence_parallel=parallel.sequence_parallel,
    )
    check_numerics(numerics)
    # rows that are retried or promoted stand in another file than the one their paths count from
    elsewhere = options.retry_failed or options.promote is not None
    rules = RowRules(
        defaults=defaults,
        num_layers=checkpoint.transformer.num_layers,
        pipelines=served_pipelines(model.distilled),
        loras=tuple(LoraUse(lora.name, lora.strength) for lora in model.loras),
        image_roots=options.image_roots or (() if elsewhere else (manifest_folder(options.manifest),)),
    )
    plan = Plan(
        manifest=options.manifest,
        rules=rules,
        builder=ItemBuilder(model, numerics),
        selection=options.selection,
        samples=options.samples_per_prompt,
        retry_failed=options.retry_failed,
        latents_only=options.stop_after is not None,
    )
    return Prepared(options, checkpoint, plan, numerics, tuple(warnings))


def render(options: Options) -> int:
    """Render the manifest; returns the exit code. Raises ValueError for a user's mistake."""
    prepared = prepare(options)
    raws = prepared.plan.read()
    assert options.output is not None
    store = Store(options.output)
    store.check_writable()
    progress = Progress()
    for warning in prepared.warnings:
        progress.say(warning)
    run_id = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    lease = Lease(store, run_id)
    lease.acquire(progress.say)
    cluster = Cluster(
        address=options.ray_address,
        device=options.device,
        parallel=options.parallel,
        numerics=prepared.numerics,
        model=options.model,
        model_bytes=prepared.checkpoint.size,
        engines=options.engines,
        output=options.output,
        save_latents=options.save_latents,
        stop_after=options.stop_after,
        share_cards=options.share_cards,
        can_share=lambda numerics, gpu: can_share(prepared.checkpoint, options.model.local(), numerics, gpu),
    )
    try:
        # under the lease: what another run finished while this one waited is done, and nobody else mends
        clean_stale(store, _STALE_SECONDS)
        existing = list_existing(store)
        repair(store, existing, progress.say)
        prepared = replace(prepared, plan=prepared.plan.against(existing))
        rows = prepared.plan.rows(raws)
        if options.promote is not None:
            rows = _promoted(rows, options.promote, existing)
        return _drive(prepared, rows, cluster, store, run_id, progress, lease)
    finally:
        cluster.leave()
        if not lease.lost:
            # its workers are gone: what they left half-written nobody will finish
            with contextlib.suppress(OSError):
                clean_stale(store, 0)
                store.remove_scratch()
        lease.release()


def _drive(
    prepared: Prepared,
    rows: Iterator[PlanEntry],
    cluster: Cluster,
    store: Store,
    run_id: str,
    progress: Progress,
    lease: Lease,
) -> int:
    from ltx_ray.driver.loop import Driver, JoinedCluster
    from ltx_ray.driver.publisher import Publisher
    from ltx_ray.driver.tracker import RowTracker

    options = prepared.options
    _keep_older_run(store)
    events = EventLog(store)
    record = _RunRecord(store.retrying_for(_RECORD_PATIENCE), run_id, prepared)
    record.write("running", Counter())
    events.emit("run_started", run_id=run_id)
    events.flush()

    def join_cluster() -> JoinedCluster:
        from ltx_ray.pools.ray_replicas import RayReplicaSet

        record.pools, record.numerics = cluster.join()
        room = None
        if cluster.gpu is not None and record.numerics.device == "cuda":
            model = options.model.local()
            room = MemoryBudget(prepared.checkpoint, model, record.pools, record.numerics, cluster.gpu)
            room.check()
        _drain_on_signals(driver)  # Ray has put a handler of its own in the way
        record.write("running", tracker.counts)
        replicas = {pool.name: pool.replicas for pool in record.pools}
        events.emit("cluster_joined", pools=replicas, tp=options.parallel.tp, device=record.numerics.device)
        return JoinedCluster(
            RayReplicaSet(options.limits.start_timeout, options.limits.call_timeout),
            record.pools,
            canonical_json(record.numerics),
            cluster.max_bytes,
            _preflight_item(prepared) if options.preflight and max(replicas.values()) > 1 else None,
            elastic=options.parallel.max_replicas is not None,
            problem=room.problem if room is not None else lambda request: None,
        )

    def note_drain() -> None:
        record.write("draining", tracker.counts)

    # an object store answers each write late, but many at once
    publisher = Publisher(threads=2 if store.is_local else 16)
    writer = DatasetWriter(store.retrying_for(_INDEX_PATIENCE))
    tracker = RowTracker(prepared.plan, writer, publisher, events, progress, canonical_json(record.versions))
    driver = Driver(
        tracker=tracker,
        join_cluster=join_cluster,
        path=PREVIEW_PATH if options.stop_after else FULL_PATH,
        limits=options.limits,
        noise_device=options.noise_device,
        use_stored=not options.stop_after,
        on_drain=note_drain,
        should_stop=lambda: f"another run has taken over {store.uri}" if lease.lost else None,
    )
    if options.selection.ids:
        rows = _saying_what_is_missing(rows, prepared.plan, progress)
    state, code = "failed", EXIT_ERROR
    handlers = _drain_on_signals(driver)
    try:
        drained = driver.run(rows)
        state = "drained" if drained else "finished"
        bad = tracker.counts["failed"] + tracker.counts["illegal"]
        code = EXIT_DRAINED if drained else EXIT_FAILED_ROWS if bad else EXIT_OK
        if driver.too_many_failed:
            code = EXIT_FAILED_ROWS
    except ConnectionError:
        raise  # the cluster's
    except SystemExit:
        # told to stop while the cluster was being joined, when Ray's handler of signals is in the place of ours
        state, code = "drained", EXIT_DRAINED
    except (StartFailed, OSError) as error:
        # an OSError is the output store's: it has been tried for as long as its patience lasts
        progress.say(str(error))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if not lease.lost:  # the records are another run's by now
            record.write(state, tracker.counts)
            events.emit("run_finished", state=state, counts=record.counts(tracker.counts))
            events.flush()
            if not driver.drain_requested:  # who asked to stop does not want to wait for a page of pictures
                _write_report(store, tracker.counts["rows"], progress)
    progress.say(_summary(state, record.counts(tracker.counts), options.output))
    return code


def _saying_what_is_missing(rows: Iterator[PlanEntry], plan: Plan, progress: Progress) -> Iterator[PlanEntry]:
    yield from rows
    say_missing_ids(plan, progress.say)


def say_missing_ids(plan: Plan, say: Callable[[str], None]) -> None:
    """Name ids that were selected and that the manifest, read to its end, does not have."""
    if plan.unmet:
        shown = ", ".join(sorted(str(row_id) for row_id in plan.unmet)[:10])
        say(f"--ids: {len(plan.unmet)} ids are not in {plan.manifest}, such as {shown}")


def _promoted(rows: Iterator[PlanEntry], items: frozenset[str], done: ExistingRows) -> Iterator[PlanEntry]:
    """The rows of these items; one that would now be another item than its preview, or has no latents, is illegal."""
    for planned in rows:
        if isinstance(planned, IllegalRow) or planned.status != TODO:
            yield planned
            continue
        if planned.item_id not in items and done.has_preview(planned.item_id, planned.key):
            continue  # an older preview of the same id
        if not (planned.item_id in items and done.has_latents(planned.item_id)):
            legal = (
                "the model, LoRAs, --dtype, --precision and --noise-device that its preview was made with "
                "(or it has no latents)"
            )
            yield planned.refused(RowProblem("preview", planned.id, legal))
        else:
            yield planned


def _preflight_item(prepared: Prepared) -> WorkItem | None:
    """The smallest clip there is, with the run's own defaults otherwise; None when these leave no such clip."""
    values: dict[str, Any] = {"prompt": "preflight", "height": 64, "width": 64, "num_frames": 9}
    if not prepared.options.model.distilled:
        values["num_inference_steps"] = 2
    row = judge(RawRow("preflight", 1, values), prepared.plan.rules)
    if isinstance(row, IllegalRow):
        return None
    return replace(prepared.plan.builder.item(row.request), preflight=True)


def _drain_on_signals(driver) -> dict[int, Any]:
    """First SIGTERM or SIGINT drains, a second one ends the process at once."""

    def handle(number: int, frame: Any) -> None:
        if driver.drain_requested:
            os._exit(128 + number)
        driver.request_drain(signal.Signals(number).name)

    try:
        return {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread, where signals do not arrive anyway
        return {}


def _write_report(store: Store, rows: int, progress: Progress) -> None:
    from ltx_ray.dataset.report import write_report

    if not store.is_local and rows > _REMOTE_REPORT_ROWS:
        progress.say(f"report.html is left to `ltx-ray report {store.uri}`: it reads every row of the index")
        return
    try:
        write_report(store.root if store.is_local else store.uri)
    except Exception as error:  # a page of pictures must never cost a run its exit code
        progress.say(f"report.html was not written: {error}")


class _RunRecord:
    """`run.json`."""

    def __init__(self, store: Store, run_id: str, prepared: Prepared):
        self._store, self._run_id, self._prepared = store, run_id, prepared
        self.pools: list[PoolSpec] = []
        self.numerics = prepared.numerics
        self._started = _now()
        self.versions = {"ltx_ray": ltx_ray.__version__, **{name: _version(name) for name in _PACKAGES}}

    @staticmethod
    def counts(counts: Counter) -> dict[str, int]:
        return {name: counts[name] for name in ("rows", "rendered", "already_done", "failed", "illegal")}

    def write(self, state: str, counts: Counter) -> None:
        options = self._prepared.options
        record = {
            "run_id": self._run_id,
            "state": state,
            "started_at": self._started,
            "finished_at": None if state == "running" else _now(),
            "command": list(options.command),
            "manifest": options.manifest,
            "output": options.output,
            "checkpoint": self._prepared.checkpoint.path,
            "model_version": self._prepared.checkpoint.model_version,
            "pools": {p.name: p.replicas for p in self.pools},
            "tp": options.parallel.tp,
            "numerics": json.loads(canonical_json(self.numerics)),
            "device": self.numerics.device,
            "counts": self.counts(counts),
            "versions": self.versions,
        }
        # it informs people; the dataset does without
        with contextlib.suppress(OSError):
            self._store.write_bytes(layout.RUN_RECORD, json.dumps(record, indent=2, ensure_ascii=False).encode())


def _keep_older_run(store: Store) -> None:
    """Move the records of the run before this one under `runs/<its id>/`."""
    try:
        older = json.loads(store.read_bytes(layout.RUN_RECORD))["run_id"]
    except (OSError, ValueError, KeyError):
        return
    for name in (layout.RUN_RECORD, layout.EVENTS, layout.REPORT):
        if store.exists(name):
            store.write_bytes(layout.older_record(older, name), store.read_bytes(name))


def _summary(state: str, counts: Mapping[str, int], output: str | None) -> str:
    parts = [f"{counts['rendered']} rendered"]
    if counts["already_done"]:
        parts.append(f"{counts['already_done']} done before")
    for what in ("failed", "illegal"):
        if counts[what]:
            parts.append(f"{counts[what]} {what}")
    if counts["failed"] + counts["illegal"]:
        parts.append(f"listed in {output}/failed")
    return f"{state}: {counts['rows']} rows, {', '.join(parts)}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
