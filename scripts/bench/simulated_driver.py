"""The real driver over replicas in virtual time: what `bench_driver.py` measures of its decisions."""

from __future__ import annotations

import io
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from ltx_ray.config import EngineSpec, ModelFiles, Numerics, PoolSpec, RunLimits
from ltx_ray.driver.events import EventLog
from ltx_ray.driver.loop import Driver, JoinedCluster
from ltx_ray.driver.progress import Progress
from ltx_ray.driver.publisher import Publisher
from ltx_ray.driver.tracker import RowTracker
from ltx_ray.placement.sizing import PoolSizes
from ltx_ray.planning.plan import Plan, PlanEntry
from ltx_ray.pools.protocol import CallFinished, ReplicaEvent, ReplicaLost, ReplicaStarted
from ltx_ray.pools.simulated import Faults, SimulatedReplicaSet
from ltx_ray.records import Clip, WorkItem
from ltx_ray.stages import FULL_PATH, OUTPUT_STAGES
from ltx_ray.storage.store import Store

#: Seconds of an HQ clip on one H100 (ltx-facts.md).
SECONDS = {"text": 0.1, "stage1": 46.0, "stage2": 17.0, "decode": 1.75, "save_latents": 0.1, "load_latents": 0.1}
#: Clips of other lengths, by what they cost, and how often they come.
_SIZES, _WEIGHTS = (0.35, 1.0, 2.2), (3, 5, 2)
_SPEC = EngineSpec("none", ModelFiles("", "", ""), Numerics(), "none")
_CLIP = Clip("clips/00/0.mp4", "0" * 64, "0" * 64, (), "stage_1")
_BOTH = ("stage1", "stage2")


class WatchedReplicas(SimulatedReplicaSet):
    """Keeps what the replicas of the diffusion stages did with their time, in seconds: `spent`."""

    def watched(self) -> WatchedReplicas:
        self.spent: Counter[str] = Counter()
        self._ready_at: dict[str, float] = {}
        self._began: dict[str, float] = {}
        return self

    def submit(self, replica: str, stage: str, item: WorkItem, inputs: list[Any]) -> None:
        self._began[replica] = self.now
        super().submit(replica, stage, item, inputs)

    def wait(self, timeout: float) -> list[ReplicaEvent]:
        event = super().wait(timeout)
        for each in event:
            name = each.replica
            if isinstance(each, ReplicaStarted) and name.startswith(("stage", "diffusion")):
                self._ready_at[name] = self.now
            elif name not in self._ready_at:
                continue
            elif isinstance(each, CallFinished):
                useful = each.report.seconds - each.report.switch_seconds
                self.spent["useful" if each.report.ok else "failed"] += useful
                self.spent["switching"] += each.report.switch_seconds
                del self._began[name]
            elif isinstance(each, ReplicaLost):
                self.spent["lost"] += self.now - self._began.pop(name, self.now)
                self.spent["there"] += self.now - self._ready_at.pop(name)
        return event

    def so_far(self) -> Counter[str]:
        """`spent`, with the time of the replicas that are there."""
        there = sum(self.now - since for since in self._ready_at.values())
        return self.spent + Counter({"there": there, "now": self.now})


class _NoWriter:
    """Rows go nowhere: parts are written by threads beside the driver, which is what is measured."""

    def write_index(self, *row: Any, **more: Any) -> None:
        pass

    write_failed = forget_older_failures = forget_failure = forget_illegal = write_index


def lay_out(replicas: int, split: tuple[int, int] | None) -> list[PoolSpec]:
    """Pools of `replicas` of the diffusion stages: at home as `split` says for good, or moving when it is None."""
    aside = PoolSizes(replicas, 0, aside=max(1, -(-replicas // 31))).aside
    stage1, stage2 = split or (replicas - round(replicas * 17 / 63), round(replicas * 17 / 63))
    roles = (("stage1",), ("stage2",)) if split else (_BOTH, _BOTH[::-1])
    pools = [("text", ("text",), aside), ("stage1", roles[0], stage1), ("stage2", roles[1], stage2)]
    pools.append(("decode", OUTPUT_STAGES, aside))
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
    """Run the driver over the plan; what it took.

    mixed: clips of three sizes, of which the second half of the manifest is rendered with twice the steps in stage 1.
    weigh: called with the number of finished rows now and then.
    """

    def size(item: WorkItem) -> float:
        return random.Random(item.request.seed).choices(_SIZES, _WEIGHTS)[0] if mixed else 1.0

    def times(stage: str, item: WorkItem, dice: random.Random) -> float:
        seconds = SECONDS[stage] * dice.uniform(0.95, 1.05)
        if stage not in _BOTH:
            return seconds
        late = mixed and stage == "stage1" and item.request.seed >= total // 2
        return seconds * size(item) * (2.0 if late else 1.0)

    total = mixed and sum(1 for _ in plan.open())
    plan = plan.against(plan.existing)
    replica_set = WatchedReplicas(
        times, lambda stage, item, *inputs: _CLIP, seed=seed, faults=faults,
        nodes=max(1, sum(pool.replicas for pool in pools) // 8),
    ).watched()  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        events = EventLog(Store(folder))
        tracker = RowTracker(plan, _NoWriter(), Publisher(1), events, Progress(io.StringIO()), "{}")
        tracker.metrics = SimpleNamespace(item=lambda outcome: None, call=lambda stage, seconds: None)
        driver = Driver(
            tracker=tracker,
            join_cluster=lambda: JoinedCluster(replica_set, pools, "{}"),
            path=FULL_PATH,
            limits=RunLimits(),
            noise_device="model",
        )
        marks: list[Counter[str]] = []

        def rows() -> Iterator[PlanEntry]:
            for number, row in enumerate(plan.open()):
                # with all pools at work: past the start, and while there are rows to take
                if mixed and number in (total // 5, total - 1):
                    marks.append(replica_set.so_far())
                if weigh is not None and number % 5000 == 0:
                    weigh(number)
                yield row

        began, cpu = time.perf_counter(), time.process_time()
        driver.run(rows())
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    figures = {"counts": dict(tracker.counts), "seconds": seconds, "cpu": cpu, "virtual": replica_set.now}
    if mixed:
        first, last = marks
        figures["window"] = {name: last[name] - first[name] for name in last}
    return figures
