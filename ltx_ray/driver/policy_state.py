"""What the policy keeps of items and replicas, and what it decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from ltx_ray.driver.queue import FairQueue
from ltx_ray.stages import DIFFUSION_STAGES, Stage


@dataclass(frozen=True)
class Dispatch:
    """Run `stage` of `item` on `replica`.

    `switched`: the replica has to merge other weights first. `moved`: it was assigned to the other diffusion stage.
    """

    item: str
    stage: Stage
    replica: str
    switched: bool = False
    moved: bool = False


@dataclass(frozen=True)
class RetryDecision:
    """What becomes of an item after a failure: it is tried again, or given up after `attempts`."""

    item: str
    retry: bool
    attempts: int


@dataclass
class Item:
    """An admitted item: where on its path it is."""

    order: int
    path: tuple[Stage, ...]
    #: By stage, which weights a replica must have merged for it.
    weights: Mapping[Stage, Hashable]
    attempts: int
    position: int = 0
    restarts: int = 0
    replica: str | None = None
    #: Whether its call takes much longer than expected.
    late: bool = False
    #: Bytes of the results that it holds in the object store.
    results: dict[Stage, float] = field(default_factory=dict)

    @property
    def stage(self) -> Stage:
        return self.path[self.position]

    @property
    def next_stage(self) -> Stage | None:
        return self.path[self.position + 1] if self.position + 1 < len(self.path) else None


@dataclass
class Replica:
    """A replica that is ready: what it serves, and what it is busy with."""

    roles: tuple[Stage, ...]
    #: The diffusion stage that it serves now.
    assigned: Stage | None
    #: Where it runs; "" where that is not known.
    node: str = ""
    #: The stage and the weights that are merged now.
    merged_stage: Stage | None = None
    merged_weights: Hashable = None
    #: Calls that it takes at once, and the items that it is busy with, in the order in which they came.
    calls_at_once: int = 1
    items: dict[str, None] = field(default_factory=dict)
    #: Whether it leaves after the calls that are under way.
    retired: bool = False

    @property
    def takes_more(self) -> bool:
        """Whether it can begin another call."""
        return not self.retired and len(self.items) < self.calls_at_once

    @property
    def serves_both(self) -> bool:
        """Whether it may serve both diffusion stages."""
        return all(stage in self.roles for stage in DIFFUSION_STAGES)

    def serves(self) -> tuple[Stage, ...]:
        """The stages that it serves now."""
        return _served_now(self.roles, self.assigned)

    def merge(self, stage: Stage, weights: Hashable, merged: Counter[tuple[Stage, Hashable]]) -> bool:
        """It has these weights merged from now on. Whether it had others. `merged`: how many replicas have which."""
        if self.merged_stage == stage and self.merged_weights == weights:
            return False
        had_others = self.merged_stage is not None
        self.drop_weights(merged)
        self.merged_stage, self.merged_weights = stage, weights
        merged[stage, weights] += 1
        return had_others

    def drop_weights(self, merged: Counter[tuple[Stage, Hashable]]) -> None:
        """It has no weights merged any more."""
        if self.merged_stage is None:
            return
        key = self.merged_stage, self.merged_weights
        merged[key] -= 1
        if not merged[key]:
            del merged[key]
        self.merged_stage = self.merged_weights = None

    def choose(
        self,
        stage: Stage,
        queues: Sequence[FairQueue],
        merged: Counter[tuple[Stage, Hashable]],
        max_passed_over: int,
    ) -> tuple[FairQueue, Hashable]:
        """The queue and the weights of the item that it should take. `merged`: how many replicas have which weights.

        No item is passed over more than `max_passed_over` times.
        """
        if len(queues) == 1 and (group := queues[0].only_group):
            return queues[0], group[0]  # Nearly all runs have one set of weights, so that there is nothing to choose.
        same_stage = self.merged_stage == stage

        def preference(weights: Hashable) -> int:
            if same_stage and weights == self.merged_weights:
                return 0
            # Items whose weights another replica has merged are better left to that one.
            return 2 if merged[stage, weights] else 1

        queue = min(queues, key=FairQueue.oldest)
        _, weights, passed_over = queue.oldest()
        if passed_over < max_passed_over:
            queue = min(queues, key=lambda queue: queue.best(preference)[:2])
            weights = queue.best(preference).group
        return queue, weights


@cache
def _served_now(roles: tuple[Stage, ...], assigned: Stage | None) -> tuple[Stage, ...]:
    return tuple(role for role in roles if role == assigned or role not in DIFFUSION_STAGES)


def best_idle(idle: Iterable[str], replicas: Mapping[str, Replica], stage: Stage, queues: Sequence[FairQueue]) -> str:
    """The one of `idle` that has merged what a waiting item needs, else the one that has been idle longest."""
    names = list(idle)
    for name in names:
        replica = replicas[name]
        if replica.merged_stage == stage and any(queue.has(replica.merged_weights) for queue in queues):
            return name
    # One that takes several calls at once is the better choice while it has none.
    return next((name for name in names if not replicas[name].items), names[0])


def spare_replicas(replicas: Mapping[str, Replica], items: Iterable[Item]) -> list[str]:
    """Idle replicas for which `items` have no work. Each role keeps one replica."""
    spare = []
    serving = Counter(role for replica in replicas.values() for role in replica.roles)
    same_roles = Counter(frozenset(replica.roles) for replica in replicas.values())
    remaining = [set(item.path[item.position :]) for item in items]
    needed = {roles: sum(1 for stages in remaining if stages & roles) for roles in same_roles}
    for name, replica in replicas.items():
        roles = frozenset(replica.roles)
        if not replica.items and same_roles[roles] > needed[roles] and all(serving[role] > 1 for role in roles):
            spare.append(name)
            same_roles[roles] -= 1
            serving.subtract(roles)
    return spare
