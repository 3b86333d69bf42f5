"""Room for a pool without a replica, on the card of a replica of a pool that has several.

The replicas of the DiT take all places at once. When the card or the node of the only replica of text is lost, there
may be none left for its successor, and without it the run would stand still.

A place that becomes free may not suit: its node may lack CPUs, or another job may take it. Such a place is not waited
for any longer, and no place of its kind is made on its node again before the pool has a replica.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from ltx_ray.config import PoolSpec
from ltx_ray.pools.exclusion import node_name
from ltx_ray.pools.pool import Pool
from ltx_ray.pools.protocol import RankInfo
from ltx_ray.stages import Stage

#: Seconds for which a pool without any replica waits for a place, or for its process, before anything is done for it.
LAST_RESORT = 15.0
#: Seconds for which a place that has become free is kept for the pool that needs it, and then for the pool that had it.
PERIOD = 60.0


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


@dataclass(frozen=True)
class MadePlace:
    """`replica` of the pool `giver` leaves its place on `node` to the pool `taker`; messages call the node `where`."""

    replica: str
    giver: str
    taker: str
    node: str
    where: str
    #: What becomes free: ranks, and the GPUs and CPUs of each.
    shape: tuple[int, float, float]


class SparePlaces:
    """Chooses the replicas that make room, one at a time, and none whose place would not suit either."""

    def __init__(self) -> None:
        self._made: MadePlace | None = None
        self._until = -math.inf
        #: The pools that did not take a place, with its node and its shape.
        self._in_vain: set[tuple[str, str, tuple[int, float, float]]] = set()

    @property
    def is_made(self) -> bool:
        """Whether a place is made that has not been taken yet."""
        return self._made is not None

    def leaves(self, now: float) -> None:
        """The replica that makes room still has calls under way."""
        self._until = now + PERIOD

    def unused(self, waiting: Collection[str], now: float) -> MadePlace | None:
        """The place that its pool, one of those `waiting` for a place, has not taken while it was free; reported once.

        One whose pool does not wait any more has been taken, or is not needed.
        """
        made = self._made
        if made is None or (made.taker in waiting and now < self._until):
            return None
        self._made = None
        if made.taker not in waiting:
            return None
        self._in_vain.add((made.taker, made.node, made.shape))
        self._until = now + PERIOD
        return made

    def forget(self) -> None:
        """Every pool has a replica."""
        self._made = None
        self._in_vain.clear()

    def choose(
        self,
        taker: Pool,
        pools: Sequence[Pool],
        idle: Callable[[str], bool],
        ranks_of: Callable[[str], Sequence[RankInfo]],
        avoided: Collection[str],
        now: float,
    ) -> MadePlace | None:
        """Whose replica is to leave for `taker`; None when it is too early for another one, or none can be spared.

        Idle ones leave first. What one frees has to suffice, as far as one rank's GPU goes: CPUs may be free elsewhere.
        On nodes that are `avoided` nothing is placed.
        """
        if self.is_made or now < self._until:
            return None
        offers: list[tuple[Pool, list[str]]] = []
        for pool in pools:
            if _has_enough(pool, taker) and _is_spare(pool, pools):
                ready = [name for name, is_ready in pool.replicas.items() if is_ready]
                names = [name for name in ready if self._may_suit(taker, pool, _node(ranks_of(name)), avoided)]
                offers += [(pool, names)] if names else []
        if not offers:
            return None
        giver, names = max(offers, key=lambda offer: (_has_cpus(offer[0], taker), offer[0].ready))
        name = next(filter(idle, names), names[-1])
        ranks = ranks_of(name)
        where = node_name(ranks) if ranks else f"the node of {name}"
        self._until = now + PERIOD
        self._made = MadePlace(name, giver.spec.name, taker.spec.name, _node(ranks), where, _shape(giver.spec))
        return self._made

    def _may_suit(self, taker: Pool, giver: Pool, node: str, avoided: Collection[str]) -> bool:
        """Whether `taker` could use the place of a replica of `giver` on `node`, as far as that is known."""
        return node not in avoided and (taker.spec.name, node, _shape(giver.spec)) not in self._in_vain


def _node(ranks: Sequence[RankInfo]) -> str:
    """The node of a gang; "" of one that is held back and has never served."""
    return ranks[0].node if ranks else ""


def _has_enough(giver: Pool, taker: Pool) -> bool:
    if giver is taker or giver.spec.ranks < taker.spec.ranks:
        return False
    if taker.spec.gpus_per_rank:
        return giver.spec.gpus_per_rank >= taker.spec.gpus_per_rank
    return giver.spec.cpus_per_rank * giver.spec.ranks >= taker.spec.cpus_per_rank


def _has_cpus(giver: Pool, taker: Pool) -> bool:
    return giver.spec.cpus_per_rank >= taker.spec.cpus_per_rank


def _shape(spec: PoolSpec) -> tuple[int, float, float]:
    return spec.ranks, spec.gpus_per_rank, spec.cpus_per_rank


def _is_spare(pool: Pool, pools: Sequence[Pool]) -> bool:
    """Whether all of its roles are served without one of its replicas."""
    return pool.ready > 1 or served([other for other in pools if other is not pool]).issuperset(pool.spec.roles)
