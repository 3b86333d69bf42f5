"""The same workload without a model for two drivers, ours and Ray Data's: stages sleep, and decode writes a file.

Both drivers run on a private Ray cluster of logical slots: one GPU for each diffusion replica, and one shared by text
and decode (`ltx_ray.placement.sizing.lay_out`). Call `run_ours` and `run_ray_data` each in a process of its own, with
SPEEDUP in the environment, which the workers of the cluster inherit.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ltx_ray.engine.fake import FakeEngine
from ltx_ray.stages import FULL_PATH, TRAITS, Stage
from ltx_ray.storage.store import Store

#: Estimated seconds of each call for an HQ clip on one H100.
STAGE_SECONDS = {stage: TRAITS[stage].seconds for stage in FULL_PATH}
#: Switching a replica's stage from factors in host memory (docs/benchmarks.md).
SWITCH_SECONDS = 0.84
#: The environment variable with the factor by which stages are faster than that; 0: they do not sleep at all.
SPEEDUP = "LTX_RAY_BENCH_SPEEDUP"
TOY = "ltx_ray.toy:ensure_toy_model"


def pause(seconds: float) -> None:
    speedup = float(os.environ[SPEEDUP])
    if speedup:
        time.sleep(seconds / speedup)


def call(store: Store | None, stage: Stage, name: str, made: str) -> str:
    """Run one stage of row `name`, which hashes its input `made`; decode writes a small file to `store`, if given."""
    pause(STAGE_SECONDS[stage])
    made = hashlib.sha256(f"{stage}:{name}:{made}".encode()).hexdigest()
    if stage == Stage.DECODE and store is not None:
        store.write_bytes(f"clips/{name[:2]}/{name}.mp4", made.encode())
    return made


def best_split(replicas: int) -> tuple[int, int]:
    """The numbers of stage-1 and stage-2 replicas with the highest throughput when none switches."""

    def throughput(stage1: int) -> float:
        return min(stage1 / STAGE_SECONDS[Stage.STAGE1], (replicas - stage1) / STAGE_SECONDS[Stage.STAGE2])

    stage1 = max(range(1, replicas), key=throughput)
    return stage1, replicas - stage1


# --- ours ----------------------------------------------------------------------------------------


class SleepingEngine(FakeEngine):
    """Serves every stage of our pools, with the protocol of ltx_ray/engine/base.py."""

    def run(self, stage: Stage, item: Any, *inputs: Any) -> Any:
        from ltx_ray.records import Clip

        if TRAITS[stage].merges_weights:
            if self._merged_stage not in (None, stage):
                began = time.perf_counter()
                pause(SWITCH_SECONDS)
                self.switches += 1
                self.switch_seconds += time.perf_counter() - began
            self._merged_stage = stage
        store = None if item.preflight else self.store
        made = call(store, stage, item.item_id, inputs[-1] if inputs else item.request.prompt)
        if stage != Stage.DECODE:
            return made
        path = f"clips/{item.item_id[:2]}/{item.item_id}.mp4"
        return Clip(None if item.preflight else path, made, made, (), "stage_1")


def run_ours(
    manifest: str, output: str, replicas: int, split: tuple[int, int] | None, queue_depth: int | None
) -> dict[str, Any]:
    """`ltx_ray.run.render` on `manifest`; with `split` None the driver may switch replicas between stages."""
    from ltx_ray.config import ModelFiles, RunLimits
    from ltx_ray.placement.sizing import ParallelConfig
    from ltx_ray.run import Options, render

    stage1, stage2 = split or (None, None)
    with _cluster(replicas) as address, _measured() as figures:
        code = render(
            Options(
                manifest=manifest,
                output=output,
                model=ModelFiles("", "", "", provider=TOY),
                parallel=ParallelConfig(stage1=stage1, stage2=stage2),
                ray_address=address,
                limits=RunLimits() if queue_depth is None else RunLimits(queue_depth=queue_depth),
                engines=dict.fromkeys(("text", "diffusion", "decode"), "scripts.bench.sleeping_stages:SleepingEngine"),
            )
        )
    assert code == 0, f"render ended with {code}"
    parts = sorted(Path(output, "index").glob("part-*"))
    figures["recorded"] = sum(pq.read_metadata(part).num_rows for part in parts)
    return figures | _throughput(output, figures, max(part.stat().st_mtime for part in parts))


# --- Ray Data ----------------------------------------------------------------------------------


class StageActor:
    """One stage as a callable class for `map_batches` over Arrow tables."""

    stage: Stage

    def __init__(self, output: str):
        self._store = Store(output)

    def __call__(self, rows: pa.Table) -> pa.Table:
        before = rows["made" if "made" in rows.column_names else "prompt"].to_pylist()
        names = [hashlib.sha256(name.encode()).hexdigest()[:32] for name in rows["id"].to_pylist()]
        made = [call(self._store, self.stage, *each) for each in zip(names, before)]
        kept = rows.select([name for name in rows.column_names if name != "made"])
        return kept.append_column("made", pa.array(made, pa.string()))


class TextActor(StageActor):
    stage = Stage.TEXT


class Stage1Actor(StageActor):
    stage = Stage.STAGE1


class Stage2Actor(StageActor):
    stage = Stage.STAGE2


class DecodeActor(StageActor):
    stage = Stage.DECODE


def run_ray_data(
    manifest: str, output: str, replicas: int, split: tuple[int, int], rows_a_block: int, in_flight: int
) -> dict[str, Any]:
    """The same workload as a Ray Data pipeline with fixed actor pools.

    Finished rows arrive at this process, which writes one Parquet file at the end. That is less than our index does,
    which has a row on disk as soon as its clip is there. A failed row would end the run.
    """
    import ray

    with _cluster(replicas):
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        # The newer reader ignores override_num_blocks: a small manifest would be one block, for one actor.
        context.use_datasource_v2 = False
        context.execution_options.preserve_order = False
        rows = pq.read_metadata(manifest).num_rows
        with _measured() as figures:
            data = ray.data.read_parquet(manifest, override_num_blocks=-(-rows // rows_a_block))
            for actor, size, gpus in (
                (TextActor, 1, 0.5),
                (Stage1Actor, split[0], 1),
                (Stage2Actor, split[1], 1),
                (DecodeActor, 1, 0.5),
            ):
                data = data.map_batches(
                    actor,
                    batch_size=1,
                    batch_format="pyarrow",
                    fn_constructor_args=(output,),
                    compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=in_flight),
                    num_gpus=gpus,
                )
            finished: list[Any] = list(data.iter_batches(batch_size=None, batch_format="pyarrow"))
            pq.write_table(pa.concat_tables(finished), os.path.join(output, "index.parquet"))
            done = time.time()
    figures["recorded"] = sum(batch.num_rows for batch in finished)
    return figures | _throughput(output, figures, done)


# --- both ----------------------------------------------------------------------------------------


@contextmanager
def _cluster(replicas: int) -> Iterator[str]:
    """A private cluster with one logical GPU for each replica and one for text and decode."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    ray.init(
        address="local",
        # One CPU for each rank, and two for Ray Data's readers.
        num_cpus=replicas + 4,
        num_gpus=replicas + 1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=512 * 2**20,
    )
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


@contextmanager
def _measured() -> Iterator[dict[str, float]]:
    """CPU seconds of this process (`driver_cpu`) and of its children, Ray's processes and actors (`children_cpu`)."""
    import psutil

    this, stop = psutil.Process(), threading.Event()
    children: dict[int, float] = {}

    def look() -> None:
        # Called regularly, because the figures of a process are lost when it ends.
        for child in this.children(recursive=True):
            try:
                times = child.cpu_times()
            except psutil.NoSuchProcess:
                continue
            children[child.pid] = times.user + times.system

    def watch() -> None:
        while not stop.wait(2.0):
            look()

    look()
    before, figures = sum(children.values()), {"began": time.time()}
    own = time.process_time()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield figures
    figures["driver_cpu"] = time.process_time() - own
    stop.set()
    thread.join()
    look()
    figures["children_cpu"] = sum(children.values()) - before


def _throughput(output: str, figures: dict[str, float], recorded: float) -> dict[str, float]:
    """Seconds to the first clip and to the last recorded row, and rows a second with the pipeline full (`steady`).

    The pipeline is full between the first and the last tenth of the clips, which leaves out the start of the actors
    and the tail.
    """
    times = sorted(entry.stat().st_mtime for entry in Path(output, "clips").rglob("*.mp4"))
    first, last = len(times) // 10, len(times) - len(times) // 10 - 1
    return {
        "rows": len(times),
        "first_clip": times[0] - figures["began"],
        "seconds": recorded - figures["began"],
        "steady": (last - first) / max(times[last] - times[first], 1e-9),
    }


def write_manifest(path: str, rows: int) -> None:
    """Write a Parquet manifest of `rows` distinct prompts of about 200 characters, in row groups of 100,000."""
    things = "a lighthouse,an old tram,a red kite,a market stall,a sleeping cat,a steam engine,a paper boat".split(",")
    places = "in heavy rain,at dawn,under neon signs,on a frozen lake,in a quiet harbour".split(",")
    tail = "Shot on 35 mm film with a slow dolly move from left to right; soft wind, distant voices and steps."
    schema = pa.schema([("id", pa.string()), ("prompt", pa.string()), ("seed", pa.int64())])
    with pq.ParquetWriter(path, schema) as writer:
        for begin in range(0, rows, 100_000):
            numbers = range(begin, min(begin + 100_000, rows))
            seen = itertools.islice(itertools.cycle(itertools.product(things, places)), len(numbers))
            prompts = [
                f"Take {n}: {thing} {place}, seen from a low angle while the light changes. {tail}"
                for n, (thing, place) in zip(numbers, seen)
            ]
            ids = [f"clip-{n:08d}" for n in numbers]
            writer.write_table(pa.table([ids, prompts, list(numbers)], schema=schema))
