"""One run of the real driver over a simulated fleet, and what it made of the fleet's cards."""

from __future__ import annotations

import io
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ltx_ray.config import EngineSpec, ModelFiles, Numerics, PoolSpec, RunLimits
from ltx_ray.dataset import layout
from ltx_ray.dataset.parts import key_bytes
from ltx_ray.dataset.row_log import RowLog
from ltx_ray.dataset.run_summary import wait_lines
from ltx_ray.dataset.writer import DatasetWriter
from ltx_ray.driver.events import EventLog
from ltx_ray.driver.joined_cluster import JoinedCluster
from ltx_ray.driver.loop import Driver
from ltx_ray.driver.progress import Progress
from ltx_ray.driver.publisher import Publisher
from ltx_ray.driver.tracker import RowTracker
from ltx_ray.placement.output_pools import Node
from ltx_ray.placement.sizing import ParallelConfig, Resources, check_schedulable, lay_out
from ltx_ray.planning.plan import Plan
from ltx_ray.planning.preflight import preflight_item
from ltx_ray.pools.pool import StartFailed
from ltx_ray.records import RenderRequest
from ltx_ray.run import ExitCode, Options, prepare
from ltx_ray.stages import FULL_PATH, TRAITS, Stage
from ltx_ray.storage.store import Store
from scripts.bench import sleeping_stages
from scripts.bench.silent_metrics import silent_metrics
from scripts.bench.simulated_fleet import GPU_SECONDS_OF_DECODE, Fleet, SimulatedFleet

_SPEC = EngineSpec("none", ModelFiles("", "", ""), Numerics(), "none")


@dataclass(frozen=True)
class Figures:
    """`rows_lost`: of the manifest, without a clip; `rows_twice`: finished more than once. Times in seconds."""

    clips_per_hour: float
    bound_clips_per_hour: float
    ratio: float
    rows_lost: int
    rows_twice: int
    exit_code: int
    virtual_seconds: float
    seconds: float
    #: Replicas of each pool at the end, what stages waited for, and what the run said of its cards and nodes.
    replicas: dict[str, int]
    waits: list[str]
    said: list[str]

    def record(self) -> dict[str, Any]:
        return asdict(self)


class _KeyLog(RowLog):
    """Counts finished rows by their keys. Writing them is measured elsewhere (scripts/bench_dataset.py)."""

    made: Counter[bytes]

    def commit(self) -> None:
        rows, self._rows[layout.INDEX] = self._rows[layout.INDEX], []
        keys = [key_bytes(row["item_id"], row["key"]) for row in rows]
        self.made.update(keys)
        self.existing.index.add_pending(keys, "segment")

    def fold(self) -> None:
        self.existing.index.fold("part", list(self.made))


class _KeyWriter(DatasetWriter):
    def write_index(self, item_id: str, request: RenderRequest, rendered: Any) -> None:
        self.log.add(layout.INDEX, {"item_id": item_id, "key": layout.row_key(request.id)})

    def write_failed(self, *row: Any, **more: Any) -> None:
        pass


@dataclass(frozen=True)
class Workload:
    """What a run has to do, and the layout that its user asked for. Seconds are those of whole calls."""

    clips: int = 4000
    stage1_seconds: float = 40.0
    stage2_seconds: float = 19.1
    decode_seconds: float = 5.0
    share_cards: bool = True
    parallel: ParallelConfig = ParallelConfig()  # noqa: RUF009 (frozen)

    def seconds(self) -> dict[Stage, float]:
        """Of a call of each stage."""
        own = {Stage.STAGE1: self.stage1_seconds, Stage.STAGE2: self.stage2_seconds, Stage.DECODE: self.decode_seconds}
        return {stage: own.get(stage, TRAITS[stage].seconds) for stage in Stage}


def run_fleet(fleet: Fleet, workload: Workload, seed: int, folder: str) -> Figures:
    """Render the rows of `workload` on the fleet, in virtual time. Raises ValueError when the pools do not fit."""
    began = time.perf_counter()
    pools = _pools(fleet, workload)
    replicas = SimulatedFleet(fleet, workload.seconds(), seed)
    said = io.StringIO()
    driver, log = _driver(_plan(workload.clips, folder), replicas, pools, said, folder)
    try:
        drained = driver.run(driver.tracker.plan.open())
        failed = driver.counts["failed"] + driver.counts["illegal"]
        code = ExitCode.DRAINED if drained else ExitCode.FAILED_ROWS if failed else ExitCode.OK
    except StartFailed as error:
        said.write(f"{error}\n")
        code = ExitCode.ERROR
    spent = replicas.last_clip - replicas.first_call
    rate = len(log.made) / spent * 3600 if spent > 0 else 0.0
    bound = 3600 / (workload.stage1_seconds + workload.stage2_seconds + GPU_SECONDS_OF_DECODE)
    bound *= fleet.gpus - fleet.bad_cards
    return Figures(
        clips_per_hour=rate,
        bound_clips_per_hour=bound,
        ratio=rate / bound,
        rows_lost=workload.clips - len(log.made),
        rows_twice=sum(count - 1 for count in log.made.values()),
        exit_code=int(code),
        virtual_seconds=replicas.now,
        seconds=time.perf_counter() - began,
        replicas={pool.spec.name: pool.ready for pool in driver.pools},
        waits=wait_lines(driver.waited(), least=0.01),
        said=[line for line in said.getvalue().splitlines() if " | " not in line],
    )


def _pools(fleet: Fleet, workload: Workload) -> list[PoolSpec]:
    """The pools that a run would have on the fleet."""
    nodes = [Node(count * fleet.cpus_per_gpu, float(count)) for count in fleet.node_gpus()]
    engines = dict.fromkeys(("text", "diffusion", "decode"), _SPEC)
    pools = lay_out(workload.parallel, float(fleet.gpus), engines, workload.share_cards, nodes)
    check_schedulable(pools, Resources(sum(node.cpus for node in nodes), float(fleet.gpus)))
    return pools


def _plan(clips: int, folder: str) -> Plan:
    manifest = str(Path(folder, "rows.parquet"))
    sleeping_stages.write_manifest(manifest, clips)
    model = ModelFiles("", "", "", provider=sleeping_stages.TOY)
    return prepare(Options(manifest=manifest, output=None, model=model)).plan


def _driver(
    plan: Plan, replicas: SimulatedFleet, pools: list[PoolSpec], said: io.StringIO, folder: str
) -> tuple[Driver, _KeyLog]:
    """A driver that is ready to run, and the log of the rows that it finishes."""
    store = Store(str(Path(folder, "out")))
    events, log = EventLog(store, "bench"), _KeyLog(store, plan.existing, "0" * 8, "run")
    log.made = Counter()
    plan = plan.against(plan.existing)
    tracker = RowTracker(plan, _KeyWriter(log), Publisher(log), events, Progress(said), "{}")
    tracker.metrics = silent_metrics()
    # As in a run, one replica of each pool needs no preflight clip.
    first = preflight_item(plan, distilled=False) if max(pool.replicas for pool in pools) > 1 else None
    driver = Driver(
        tracker=tracker,
        join_cluster=lambda: JoinedCluster(replicas, pools, "{}", preflight=first),
        path=FULL_PATH,
        limits=RunLimits(),
        noise_device="model",
        clock=lambda: replicas.now,
    )
    return driver, log
