"""Room for a pool without a replica, on the card of a replica of a pool that has several.

The replicas of the DiT take all places at once. When the card or the node of the only replica of text is lost, there
may be none left for its successor, and without it the run would stand still.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from ltx_ray.pools.pool import Pool
from ltx_ray.stages import Stage

#: Seconds for which a pool without any replica waits for a place, or for its process, before anything is done for it.
LAST_RESORT = 15.0
#: Seconds between two replicas that make room. In them the place becomes free and is taken.
_PERIOD = 60.0


def served(pools: Sequence[Pool]) -> set[Stage]:
    """The roles that a replica which is ready may serve."""
    return {role for pool in pools if pool.has_ready for role in pool.spec.roles}


def stuck_pools(pools: Sequence[Pool], placing: Mapping[str, float]) -> list[Pool]:
    """The pools with a role that no replica serves, all of whose replicas have been placing for a while.

    `placing`: by such replica, for how many seconds. It may have its place, and wait for its process.
    """
    roles = served(pools)
    return [
        pool
        for pool in pools
        if not roles.issuperset(pool.spec.roles)
        and pool.replicas
        and all(placing.get(name, 0.0) > LAST_RESORT for name in pool.replicas)
    ]


class SparePlaces:
    """Chooses the replicas that make room, one at a time."""

    def __init__(self) -> None:
        self._until = -math.inf

    def is_made(self, now: float) -> bool:
        """Whether a replica has been chosen lately."""
        return now < self._until

    def choose(self, taker: Pool, pools: Sequence[Pool], idle: Callable[[str], bool], now: float) -> str | None:
        """The replica that is to leave for `taker`; None when it is too early for another one, or none can be spared.

        Idle ones leave first. What it frees has to suffice, as far as one rank's GPU goes: CPUs may be free elsewhere.
        """
        givers = [pool for pool in pools if pool.ready and _has_enough(pool, taker) and _is_spare(pool, pools)]
        if self.is_made(now) or not givers:
            return None
        giver = max(givers, key=lambda pool: (pool.spec.cpus_per_rank >= taker.spec.cpus_per_rank, pool.ready))
        ready = [name for name, is_ready in giver.replicas.items() if is_ready]
        self._until = now + _PERIOD
        return next(filter(idle, ready), ready[-1])


def _has_enough(giver: Pool, taker: Pool) -> bool:
    if giver is taker or giver.spec.ranks < taker.spec.ranks:
        return False
    if taker.spec.gpus_per_rank:
        return giver.spec.gpus_per_rank >= taker.spec.gpus_per_rank
    return giver.spec.cpus_per_rank * giver.spec.ranks >= taker.spec.cpus_per_rank


def _is_spare(pool: Pool, pools: Sequence[Pool]) -> bool:
    """Whether all of its roles are served without one of its replicas."""
    return pool.ready > 1 or served([other for other in pools if other is not pool]).issuperset(pool.spec.roles)
