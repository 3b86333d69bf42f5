"""A cluster whose places a test gives out by hand, and the staffing of a run over it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from ltx_ray.config import EngineSpec, ModelFiles, Numerics, PoolSpec, RunLimits
from ltx_ray.driver.policy import Policy
from ltx_ray.driver.staffing import Staffing
from ltx_ray.pools.pool import Pool
from ltx_ray.pools.protocol import RankInfo, ReplicaLost, ReplicaStarted
from ltx_ray.stages import OUTPUT_STAGES

SPEC = EngineSpec("m:E", ModelFiles("c", "g", "u"), Numerics(), "out")


class FakeCluster:
    """A cluster with any number of places, unless `full`."""

    def __init__(self):
        self.starting, self.waits, self.released, self.killed = [], {}, [], []
        #: GPUs of each node.
        self.cards = {f"n{number}": 8 for number in range(8)}
        self.avoided = frozenset()
        self.left = []
        #: Replicas that wait for their processes alone.
        self.placed = set()

    def start(self, name, spec):
        self.starting.append(name)
        self.waits[name] = 0.0

    def placing(self):
        return dict(self.waits)

    def has_place(self, replica):
        return replica in self.placed

    def nodes(self):
        return self.cards

    def avoid(self, nodes):
        self.avoided = frozenset(nodes)

    def leaving(self):
        return self.left

    def release(self, replica):
        self.released.append(replica)

    def kill(self, replica, hold=False):
        self.killed.append(replica)
        self.waits.pop(replica, None)


class StaffedRun:
    def __init__(self, stage1=3, decode=4, text=1):
        self.replicas, self.policy = FakeCluster(), Policy()
        specs = [
            PoolSpec("text", ("text",), text, 1, replace(SPEC, engine="text"), most=4),
            PoolSpec("stage1", ("stage1", "stage2"), stage1, 1, SPEC, gpus_per_rank=0.6),
            PoolSpec("decode", OUTPUT_STAGES, decode, 1, replace(SPEC, engine="decode"), most=9),
        ]
        self.events, self.said = [], []
        events = SimpleNamespace(emit=lambda event, **fields: self.events.append((event, fields)))
        progress = SimpleNamespace(say=self.said.append)
        pools = [Pool(spec, 4) for spec in specs]
        self.staff = Staffing(pools, self.replicas, self.policy, RunLimits(), events, progress)

    def turn(self, now=0.0, one_each=False, elastic=False, more_rows=True) -> list[str]:
        """What is started in a turn of the driver."""
        self.replicas.starting = []
        self.staff.start_missing(now, one_each, elastic, more_rows)
        return self.replicas.starting

    def come_up(self, *names, node="n0", gpus=None):
        for name in names:
            self.replicas.waits.pop(name)
            pool = self.staff.started(ReplicaStarted(name, [RankInfo(0, node=node, gpus=gpus or name)], 1.0))
            self.policy.add_replica(name, pool.spec.roles)

    def fail(self, name, node="n1", gpus="3", now=0.0, **changes):
        self.replicas.waits.pop(name)
        options = {"served": False, "held": True, "ranks": [RankInfo(0, node=node, address=node, gpus=gpus)], **changes}
        self.staff.lost(ReplicaLost(name, "fallen off the bus", **options), now)

    def told(self, event) -> list[dict]:
        return [fields for name, fields in self.events if name == event]
