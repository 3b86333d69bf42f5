"""A pool: the replicas that serve the same stages, which of them are ready, and how their starts have gone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from ltx_ray.config import PoolSpec

#: Nodes on which starts have to fail before a pool without a replica is given up, where there are as many.
_FAILED_NODES = 3
#: Or this many times the failures that would be enough on several nodes.
_MANY_TIMES = 4


class StartFailed(Exception):
    """A pool's gangs failed more often than allowed."""


class ModelRefused(StartFailed):
    """A file of the model cannot be used, as a rank has found out. No other gang would do better."""


@dataclass
class Pool:
    """`spec.replicas` is the number of replicas that there should be."""

    spec: PoolSpec
    #: Consecutive failures that end the run.
    max_failures: int
    #: By name, whether the replica is ready.
    replicas: dict[str, bool] = field(default_factory=dict)
    #: Starts that have failed since one succeeded, and the nodes where they have.
    failed_starts: int = 0
    failed_nodes: set[str] = field(default_factory=set)
    #: Replicas that broke since a call last succeeded.
    broken: int = 0
    #: Replicas that died before their first call had reached them, since a call last succeeded.
    idle_deaths: int = 0
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def ready(self) -> int:
        return sum(self.replicas.values())

    @property
    def has_ready(self) -> bool:
        """Whether any replica is ready. It is asked at every turn, and need not count them."""
        return True in self.replicas.values()

    @property
    def gpus_of_replica(self) -> float:
        """GPUs that each replica has."""
        return self.spec.gpus_per_rank * self.spec.ranks

    def missing(self, at_most: int | None = None) -> list[str]:
        """Names of the replicas to start now, for as many as there should be, or for `at_most`."""
        target = self.spec.replicas if at_most is None else min(at_most, self.spec.replicas)
        names = [f"{self.spec.name}-{next(self._numbers)}" for _ in range(target - len(self.replicas))]
        self.replicas.update(dict.fromkeys(names, False))
        return names

    def started(self, name: str) -> None:
        """A replica is ready."""
        self.replicas[name] = True
        self.failed_starts = 0
        self.failed_nodes.clear()

    def start_failed(self, reason: str, node: str, nodes: int, certain: bool = False) -> None:
        """A replica could not start on `node`, one of the cluster's `nodes`; `certain`: nor would another one there.

        Raises StartFailed when starts keep failing, on several nodes if there are several, and none is ready.
        """
        self.failed_starts += 1
        self.failed_nodes.add(node)
        if self.ready or (self.failed_starts < self.max_failures and not certain):
            return
        # A cluster may have nodes on which there is no place for this pool.
        hopeless = self.failed_starts >= _MANY_TIMES * self.max_failures
        if len(self.failed_nodes) >= min(_FAILED_NODES, nodes) or hopeless:
            raise StartFailed(f"pool {self.spec.name}: {self.failed_starts} gangs failed to start; the last: {reason}")

    def broke(self, reason: str) -> None:
        """A replica broke in a call. Raises StartFailed when replicas keep breaking and no call succeeds."""
        self.broken += 1
        if self.broken >= self.max_failures:
            raise StartFailed(f"pool {self.spec.name}: {self.broken} consecutive gangs broke; the last: {reason}")

    def died_idle(self, reason: str) -> None:
        """A replica died while idle. Raises StartFailed when all have, and then `max_failures` replacements as well."""
        self.idle_deaths += 1
        if self.idle_deaths >= self.max_failures + self.spec.replicas:
            raise StartFailed(f"pool {self.spec.name}: {self.idle_deaths} consecutive idle deaths; the last: {reason}")

    def call_succeeded(self) -> None:
        """A call succeeded, so replicas of this pool can work."""
        self.broken = self.idle_deaths = 0
