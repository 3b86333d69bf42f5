"""The real driver over simulated replicas in virtual time, for scripts/bench_driver.py."""

from __future__ import annotations

import io
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from ltx_ray.config import EngineSpec, ModelFiles, Numerics, PoolSpec, RunLimits
from ltx_ray.dataset import layout
from ltx_ray.dataset.parts import key_bytes
from ltx_ray.dataset.row_log import RowLog
from ltx_ray.dataset.writer import DatasetWriter
from ltx_ray.driver.events import EventLog
from ltx_ray.driver.joined_cluster import JoinedCluster
from ltx_ray.driver.loop import Driver
from ltx_ray.driver.progress import Progress
from ltx_ray.driver.publisher import Publisher
from ltx_ray.driver.tracker import RowTracker
from ltx_ray.placement.output_pools import needed
from ltx_ray.planning.plan import Plan, PlanEntry
from ltx_ray.pools.protocol import CallFinished, ReplicaEvent, ReplicaLost, ReplicaStarted
from ltx_ray.pools.simulated import Faults, SimulatedReplicaSet
from ltx_ray.records import Clip, RenderRequest, WorkItem
from ltx_ray.stages import DIFFUSION_STAGES, FULL_PATH, OUTPUT_STAGES, TRAITS, Stage
from ltx_ray.storage.store import Store
from scripts.bench.silent_metrics import silent_metrics

#: Three sizes of clips: their cost relative to an HQ clip, and their weights in the draw.
_SIZES, _WEIGHTS = (0.35, 1.0, 2.2), (3, 5, 2)
_SPEC = EngineSpec("none", ModelFiles("", "", ""), Numerics(), "none")
_CLIP = Clip("clips/00/0.mp4", "0" * 64, "0" * 64, (), "stage_1")


class WatchedReplicas(SimulatedReplicaSet):
    """Adds up in `spent` how the replicas of the diffusion stages used their time, in seconds."""

    def watched(self) -> WatchedReplicas:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._ready_at: dict[str, float] = {}
        self._began: dict[str, float] = {}
        return self

    def submit(self, replica: str, stage: Stage, item: WorkItem, inputs: list[Any], timeout: float) -> None:
        self._began[replica] = self.now
        super().submit(replica, stage, item, inputs, timeout)

    def wait(self, timeout: float) -> list[ReplicaEvent]:
        events = super().wait(timeout)
        for event in events:
            name = event.replica
            if isinstance(event, ReplicaStarted) and name.startswith(("stage", "diffusion")):
                self._ready_at[name] = self.now
            elif name not in self._ready_at:
                continue
            elif isinstance(event, CallFinished):
                useful = event.report.seconds - event.report.switch_seconds
                self.spent["useful" if event.report.ok else "failed"] += useful
                self.spent["switching"] += event.report.switch_seconds
                del self._began[name]
            elif isinstance(event, ReplicaLost):
                self.spent["lost"] += self.now - self._began.pop(name, self.now)
                self.spent["there"] += self.now - self._ready_at.pop(name)
        return events

    def so_far(self) -> dict[str, float]:
        """`spent`, with the time since the living replicas became ready, and the virtual time."""
        there = sum(self.now - since for since in self._ready_at.values())
        return {**self.spent, "there": self.spent["there"] + there, "now": self.now}


class _KeyLog(RowLog):
    """Keeps the keys of finished rows, and writes nothing: only the driver's own thread is measured here."""

    def commit(self) -> None:
        rows, self._rows[layout.INDEX] = self._rows[layout.INDEX], []
        self._keys = getattr(self, "_keys", []) + [key_bytes(row["item_id"], row["key"]) for row in rows]
        self.existing.index.add_pending(self._keys[-len(rows) :], "segment")

    def fold(self) -> None:
        self.existing.index.fold("part", self._keys)
        self._keys = []


class _KeyWriter(DatasetWriter):
    """Makes no whole rows. A thread of its own makes them in a run."""

    def write_index(self, item_id: str, request: RenderRequest, rendered: Any) -> None:
        self.log.add(layout.INDEX, {"item_id": item_id, "key": layout.row_key(request.id)})

    def write_failed(self, *row: Any, **more: Any) -> None:
        pass


def lay_out(replicas: int, split: tuple[int, int] | None) -> list[PoolSpec]:
    """Pools with `replicas` diffusion replicas: fixed as `split` (stage 1, stage 2) says, or free to switch stages."""
    text, decode = (needed(stage, replicas, with_stage2=True) for stage in (Stage.TEXT, Stage.DECODE))
    stage1, stage2 = split or (replicas - round(replicas * 17 / 63), round(replicas * 17 / 63))
    roles1, roles2 = ((Stage.STAGE1,), (Stage.STAGE2,)) if split else (DIFFUSION_STAGES, DIFFUSION_STAGES[::-1])
    pools: list[tuple[str, tuple[Stage, ...], int]] = [
        ("text", (Stage.TEXT,), text), ("stage1", roles1, stage1), ("stage2", roles2, stage2),
        ("decode", OUTPUT_STAGES, decode),
    ]  # fmt: skip
    return [PoolSpec(name, serves, count, 1, _SPEC) for name, serves, count in pools if count]


def drive(
    plan: Plan,
    pools: list[PoolSpec],
    *,
    faults: Faults = Faults(),  # noqa: B008 (frozen)
    mixed: bool = False,
    seed: int = 0,
    weigh: Any = None,
) -> dict[str, Any]:
    """Run the driver over the plan; returns its counts and times.

    mixed: draw clips of three sizes, and double the stage-1 steps in the second half of the manifest.
    weigh: called with the number of rows taken, every 5,000 rows.
    """

    def size(item: WorkItem) -> float:
        return random.Random(item.request.seed).choices(_SIZES, _WEIGHTS)[0] if mixed else 1.0

    def call_seconds(stage: Stage, item: WorkItem, dice: random.Random) -> float:
        seconds = TRAITS[stage].seconds * dice.uniform(0.95, 1.05)
        if stage not in DIFFUSION_STAGES:
            return seconds
        late = mixed and stage == Stage.STAGE1 and item.request.seed >= total // 2
        return seconds * size(item) * (2.0 if late else 1.0)

    total = sum(1 for _ in plan.open()) if mixed else 0
    plan = plan.against(plan.existing)
    replica_set = WatchedReplicas(
        call_seconds, lambda stage, item, *inputs: _CLIP, seed=seed, faults=faults,
        node_count=max(1, sum(pool.replicas for pool in pools) // 8),
    ).watched()  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        events, log = EventLog(store, "bench"), _KeyLog(store, plan.existing, "0" * 8, "run")
        tracker = RowTracker(plan, _KeyWriter(log), Publisher(log), events, Progress(io.StringIO()), "{}")
        tracker.metrics = silent_metrics()
        driver = Driver(
            tracker=tracker,
            join_cluster=lambda: JoinedCluster(replica_set, pools, "{}"),
            path=FULL_PATH,
            limits=RunLimits(),
            noise_device="model",
        )
        marks: list[dict[str, float]] = []

        def rows() -> Iterator[PlanEntry]:
            for number, row in enumerate(plan.open()):
                # Between these marks all pools are at work: after the start, and before rows run out.
                if mixed and number in (total // 5, total - 1):
                    marks.append(replica_set.so_far())
                if weigh is not None and number % 5000 == 0:
                    weigh(number)
                yield row

        began, cpu = time.perf_counter(), time.process_time()
        driver.run(rows())
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        events.flush()  # Its thread must not write while the folder is removed.
    figures: dict[str, Any] = {
        "counts": dict(tracker.counts),
        "seconds": seconds,
        "cpu": cpu,
        "virtual": replica_set.now,
    }
    if mixed:
        first, last = marks
        figures["window"] = {name: last[name] - first.get(name, 0.0) for name in last}
    return figures
