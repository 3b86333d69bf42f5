"""One run from end to end: model and plan checked, cluster joined, driver run, records written."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import secrets
import signal
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ltx_ray
from ltx_ray.config import EngineSpec, LoraFile, ModelFiles, Numerics, PoolSpec, RunLimits, Selection
from ltx_ray.dataset.writer import DatasetWriter, Done
from ltx_ray.driver.policy import STAGES
from ltx_ray.driver.progress import Progress
from ltx_ray.imagefiles import check_roots
from ltx_ray.lease import Lease
from ltx_ray.lorafiles import check_lora
from ltx_ray.manifest import RowRules, check_defaults, manifest_folder
from ltx_ray.metrics import EventLog
from ltx_ray.modelfiles import (
    Checkpoint,
    check_gemma,
    check_parallel,
    check_transformer,
    check_upsampler,
    open_checkpoint,
)
from ltx_ray.plan import Plan, PlannedRow, RecipeBook
from ltx_ray.pools.pool import Resources, StartFailed, Wanted, check_schedulable, lay_out, slots_needed
from ltx_ray.recipe import served_pipelines
from ltx_ray.records import LoraUse, canonical_json
from ltx_ray.storage import Store

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_FAILED_ROWS, EXIT_DRAINED = 0, 1, 2, 3, 4

_ENGINES = {
    "text": "ltx_ray.engine.text:TextEngine",
    "diffusion": "ltx_ray.engine.diffusion:DiffusionEngine",
    "decode": "ltx_ray.engine.decode:DecodeEngine",
}
_PACKAGES = ("torch", "ray", "diffusers", "transformers", "safetensors", "av", "pyarrow")
#: A larger checkpoint is not rendered on CPUs unless that is asked for: it would take days a clip.
_CPU_MODEL_BYTES = 4 * 2**30
#: Object store of a private cluster without GPUs: contexts and latents of a few small clips.
_LOCAL_STORE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Options:
    """What a user asked for, as given."""

    manifest: str
    output: str | None
    model: ModelFiles
    dtype: str = "bfloat16"
    precision: str = "bf16"
    noise_device: str = "model"
    row_defaults: Mapping[str, Any] = field(default_factory=dict)
    wanted: Wanted = Wanted()  # noqa: RUF009 (frozen)
    device: str = "auto"
    ray_address: str | None = None
    selection: Selection = Selection()  # noqa: RUF009 (frozen)
    save_latents: bool = False
    stop_after: str | None = None
    image_roots: tuple[str, ...] = ()
    limits: RunLimits = RunLimits()  # noqa: RUF009 (frozen)
    retry_failed: bool = False
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

    What the dataset has already is for the caller to list into `plan.done`: once, and when it may be read.
    """
    model = options.model.local()
    checkpoint = open_checkpoint(model.checkpoint_path)
    wanted = options.wanted
    check_transformer(checkpoint)
    check_parallel(checkpoint, wanted.tp, wanted.stage2_tp, wanted.sequence_parallel)
    wanted.check(model.distilled)
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
        tp=wanted.tp,
        stage2_tp=wanted.tp_of_stage2,
        guidance_parallel=wanted.guidance_parallel,
        sequence_parallel=wanted.sequence_parallel,
    )
    rules = RowRules(
        defaults=defaults,
        num_layers=checkpoint.num_layers,
        pipelines=served_pipelines(model.distilled),
        loras=tuple(LoraUse(lora.name, lora.strength) for lora in model.loras),
        # rows that are retried stand in another file than the one their paths count from
        image_roots=options.image_roots or (() if options.retry_failed else (manifest_folder(options.manifest),)),
    )
    plan = Plan(
        manifest=options.manifest,
        rules=rules,
        book=RecipeBook(model, numerics),
        done=Done(),
        selection=options.selection,
        retry_failed=options.retry_failed,
        latents_only=options.stop_after is not None,
    )
    return Prepared(options, checkpoint, plan, numerics, tuple(warnings))


def render(options: Options) -> int:
    """Render the manifest; returns the exit code. Raises ValueError for a user's mistake."""
    prepared = prepare(options)
    rows = prepared.plan.open()
    assert options.output is not None
    store = Store(options.output)
    store.check_writable()
    progress = Progress()
    for warning in prepared.warnings:
        progress.say(warning)
    run_id = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    lease = Lease(store, run_id)
    lease.acquire(progress.say)
    cluster = _Cluster(prepared)
    try:
        # listed under the lease: what another run finished while this one waited is done
        prepared.plan.done = DatasetWriter(store).listing()
        return _drive(prepared, rows, cluster, store, run_id, progress)
    finally:
        cluster.leave()
        lease.release()


def _drive(
    prepared: Prepared,
    rows: Iterator[PlannedRow],
    cluster: _Cluster,
    store: Store,
    run_id: str,
    progress: Progress,
) -> int:
    from ltx_ray.driver.loop import Driver

    options = prepared.options
    _keep_older_run(store)
    events = EventLog(store)
    record = _RunRecord(store, run_id, prepared)
    record.write("running", Counter())
    events.emit("run_started", run_id=run_id)

    def join_cluster() -> tuple[list[PoolSpec], str]:
        record.pools, record.numerics = cluster.pools()
        _drain_on_signals(driver)  # Ray has put a handler of its own in the way
        record.write("running", driver.counts)
        replicas = {pool.name: pool.replicas for pool in record.pools}
        events.emit("cluster_joined", pools=replicas, tp=options.wanted.tp, device=record.numerics.device)
        return record.pools, canonical_json(record.numerics)

    driver = Driver(
        plan=prepared.plan,
        join_cluster=join_cluster,
        stages=("text", "stage1", "decode") if options.stop_after else STAGES,
        writer=DatasetWriter(store),
        events=events,
        progress=progress,
        limits=options.limits,
        versions=canonical_json(record.versions),
        noise_device=options.noise_device,
    )
    state, code = "failed", EXIT_ERROR
    handlers = _drain_on_signals(driver)
    try:
        drained = driver.run(rows)
        state = "drained" if drained else "finished"
        bad = driver.counts["failed"] + driver.counts["illegal"]
        code = EXIT_DRAINED if drained else EXIT_FAILED_ROWS if bad else EXIT_OK
        if driver.too_many_failed:
            code = EXIT_FAILED_ROWS
    except StartFailed as error:
        progress.say(str(error))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        record.write(state, driver.counts)
        events.emit("run_finished", state=state, counts=record.counts(driver.counts))
        events.flush()
        _write_report(store, progress)
    progress.say(_summary(state, record.counts(driver.counts), options.output))
    return code


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


def _write_report(store: Store, progress: Progress) -> None:
    from ltx_ray.dataset.report import write_report

    if not store.is_local:
        return
    try:
        write_report(store.root)
    except Exception as error:  # a page of pictures must never cost a run its exit code
        progress.say(f"report.html was not written: {error}")


class _Cluster:
    """The Ray cluster of a run: the one asked for, or a private local one; joined when there is work."""

    def __init__(self, prepared: Prepared):
        self._prepared, self._options = prepared, prepared.options
        self._address = self._options.ray_address or os.environ.get("RAY_ADDRESS")
        self._joined = False

    def pools(self) -> tuple[list[PoolSpec], Numerics]:
        """Join or start the cluster and lay the pools out on it. Raises ValueError when they do not fit."""
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        common = {"logging_level": "error", "log_to_driver": False}
        if self._address:
            if not ray.is_initialized():
                _check_reachable(self._address)
                ray.init(address=self._address, **common)
                self._joined = True
            free = Resources.of(ray.available_resources())
            # auto takes what is free, so that a run fits beside others
            pools, numerics = self._lay_out(free.gpus)
            check_schedulable(pools, free)
        else:
            gpus = float(_local_gpus())
            pools, numerics = self._lay_out(gpus)
            free = Resources(slots_needed(pools).cpus, gpus)
            check_schedulable(pools, free)
            ray.init(
                address="local",
                num_cpus=int(free.cpus) + 1,
                include_dashboard=False,
                object_store_memory=None if gpus else _LOCAL_STORE_BYTES,
                **common,
            )
            self._joined = True
        return pools, numerics

    def _lay_out(self, gpus: float) -> tuple[list[PoolSpec], Numerics]:
        options = self._options
        if options.device == "cpu":
            gpus = 0.0
        elif not gpus and (options.device == "cuda" or self._prepared.checkpoint.size > _CPU_MODEL_BYTES):
            raise ValueError("GPUs: at least 1 needed, 0 free; legal: a cluster with GPUs now, or --device cpu")
        numerics = replace(self._prepared.numerics, device="cuda" if gpus else "cpu")
        engines = {
            name: EngineSpec(
                engine=path,
                model=options.model,
                numerics=numerics,
                output=Store(options.output).uri if "://" in options.output else os.path.abspath(options.output),
                save_latents=options.save_latents,
                stop_after=options.stop_after,
            )
            for name, path in options.engines.items()
        }
        wanted = replace(options.wanted, with_stage2=options.stop_after is None)
        return lay_out(wanted, gpus, engines), numerics

    def leave(self) -> None:
        if self._joined:
            import ray

            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise ConnectionError unless something listens there; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto", "local" and the like
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(f"--ray-address: {address}, cannot be reached ({error.strerror or error})") from None


def _local_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([v for v in visible.split(",") if v.strip() and v.strip() != "-1"])
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    return NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()


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
            "tp": options.wanted.tp,
            "numerics": json.loads(canonical_json(self.numerics)),
            "device": self.numerics.device,
            "counts": self.counts(counts),
            "versions": self.versions,
        }
        self._store.write_bytes("run.json", json.dumps(record, indent=2, ensure_ascii=False).encode())


def _keep_older_run(store: Store) -> None:
    """Move the records of the run before this one under `runs/<its id>/`."""
    try:
        older = json.loads(store.read_bytes("run.json"))["run_id"]
    except (OSError, ValueError, KeyError):
        return
    for name in ("run.json", "events.jsonl", "report.html"):
        if store.exists(name):
            store.write_bytes(f"runs/{older}/{name}", store.read_bytes(name))


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


def lora_files(pairs: list[tuple[str, float]]) -> tuple[LoraFile, ...]:
    """Declared LoRAs from (path, strength); ValueError when two have one name.

    A name is the file's stem, that of PEFT's adapter_model.safetensors its folder.
    """

    def name(path: str) -> str:
        stem = os.path.splitext(os.path.basename(path))[0]
        folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
        return folder if stem == "adapter_model" and folder else stem

    files = tuple(LoraFile(name(path), path, strength) for path, strength in pairs)
    names = [file.name for file in files]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--lora: two files are named {name!r}; legal: file names that differ")
    return files


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
