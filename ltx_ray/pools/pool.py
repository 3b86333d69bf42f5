"""A pool: the replicas that serve the same stages, which of them are ready, and how their starts have gone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from ltx_ray.config import PoolSpec

#: Replicas of a pool that may be starting at once before more are ready than that.
_STARTING_AT_ONCE = 16


class StartFailed(Exception):
    """A pool's gangs failed to start more often than allowed."""


@dataclass
class Pool:
    """The replicas of a role: which there are, which are ready, and how their starts have gone. `spec.replicas` is
    how many there should be."""

    spec: PoolSpec
    max_starts_failed: int
    #: By name, whether it is ready.
    replicas: dict[str, bool] = field(default_factory=dict)
    failures: int = 0
    #: Replicas lost one after the other to a fault of their own, with no good call in between.
    faults: int = 0
    #: Replicas lost before their first call had reached them, with no good call in between.
    idle_deaths: int = 0
    _numbers: itertools.count = field(default_factory=itertools.count)

    @property
    def ready(self) -> int:
        return sum(self.replicas.values())

    def missing(self, at_most: int | None = None) -> list[str]:
        """Names of replicas to start, so that there are as many as there should be, or `at_most` if that is less.

        A large pool grows as its replicas come up: what the cluster cannot place is asked for a few at a time.
        """
        wanted = self.spec.replicas if at_most is None else min(at_most, self.spec.replicas)
        starting = len(self.replicas) - self.ready
        count = min(wanted - len(self.replicas), max(_STARTING_AT_ONCE, self.ready) - starting)
        names = [f"{self.spec.name}-{next(self._numbers)}" for _ in range(count)]
        self.replicas.update(dict.fromkeys(names, False))
        return names

    def started(self, name: str) -> None:
        """A replica came up: earlier failures to start are forgiven."""
        self.replicas[name] = True
        self.failures = 0

    def lost(self, name: str, served: bool, reason: str) -> None:
        """A replica is gone. Raises StartFailed when starts keep failing."""
        del self.replicas[name]
        if not served:
            self.failures += 1
            if self.failures >= self.max_starts_failed:
                raise StartFailed(f"pool {self.spec.name}: {self.failures} gangs failed to start; the last: {reason}")

    def faulted(self, reason: str) -> None:
        """A replica broke while it served. Raises StartFailed when replicas do nothing else."""
        self.faults += 1
        if self.faults >= self.max_starts_failed:
            raise StartFailed(f"pool {self.spec.name}: {self.faults} gangs broke in a row; the last: {reason}")

    def died_idle(self, reason: str) -> None:
        """A replica died with no row to charge. Raises StartFailed when all have done so, and their successors."""
        self.idle_deaths += 1
        if self.idle_deaths >= self.max_starts_failed + self.spec.replicas:
            raise StartFailed(f"pool {self.spec.name}: {self.idle_deaths} gangs died idle in a row; the last: {reason}")

    def worked(self) -> None:
        """A call came back well."""
        self.faults = self.idle_deaths = 0
