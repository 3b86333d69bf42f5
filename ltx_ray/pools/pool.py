"""A pool: the replicas that serve the same stages, which of them are ready, and how their starts have gone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from ltx_ray.config import PoolSpec

#: Replicas of a pool that may be starting at once while fewer are ready.
_STARTING_AT_ONCE = 16


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
    #: Starts that have failed since one succeeded.
    failed_starts: int = 0
    #: Replicas that broke since a call last succeeded.
    broken: int = 0
    #: Replicas that died before their first call had reached them, since a call last succeeded.
    idle_deaths: int = 0
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def ready(self) -> int:
        return sum(self.replicas.values())

    def missing(self, at_most: int | None = None) -> list[str]:
        """Names of the replicas to start now, for as many as there should be, or for `at_most`.

        A large pool grows as its replicas become ready, so that only a few wait for places that the cluster may lack.
        """
        target = self.spec.replicas if at_most is None else min(at_most, self.spec.replicas)
        if len(self.replicas) >= target:
            return []
        starting = len(self.replicas) - self.ready
        count = min(target - len(self.replicas), max(_STARTING_AT_ONCE, self.ready) - starting)
        names = [f"{self.spec.name}-{next(self._numbers)}" for _ in range(count)]
        self.replicas.update(dict.fromkeys(names, False))
        return names

    def started(self, name: str) -> None:
        """A replica is ready."""
        self.replicas[name] = True
        self.failed_starts = 0

    def lost(self, name: str, served: bool, reason: str) -> None:
        """A replica is gone. Raises StartFailed when starts keep failing."""
        del self.replicas[name]
        if not served:
            self.failed_starts += 1
            if self.failed_starts >= self.max_failures:
                raise StartFailed(
                    f"pool {self.spec.name}: {self.failed_starts} gangs failed to start; the last: {reason}"
                )

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
