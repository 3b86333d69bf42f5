"""Cards of the DiT that text and decode get for themselves, when those that they have do not suffice.

Where text and decode do not share cards with the DiT, a run begins with as many cards for them as their calls usually
need. What they do need is measured (driver/pool_sizer.py). A pool that is as large as its cards allow, and still bounds
the run, gets the card of a replica of the DiT, as long as the run makes more clips with it. So does one that has fewer
replicas than that, because some find no place: a card that it began with is bad, or its node is lost. It keeps the
card: its replicas are spread over all that it has, so that none becomes free when it shrinks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ltx_ray.pools.pool import Pool
from ltx_ray.stages import DIFFUSION_STAGES

#: Seconds between two looks, in which replicas on a new card come up and are measured.
_PERIOD = 60.0
#: By which part the run has to become faster.
_WORTH = 0.02
#: Replicas of the DiT that keep running.
_FEWEST_DIT = 2


@dataclass(frozen=True)
class CardMove:
    """A card leaves the pool `giver` for the pool `taker`, and why."""

    giver: str
    taker: str
    why: str


@dataclass(frozen=True)
class _Taken:
    """A card that `giver` has given to `taker`."""

    giver: Pool
    taker: Pool
    #: By how much the most replicas of `taker` have grown, and its ready ones once the card is in use.
    added: int
    ready: int
    #: Replicas without a place that other pools do not ask for meanwhile, so that none of them takes the card.
    withheld: Sequence[tuple[Pool, int]]


class OwnCards:
    """Moves a card at a time, by changing the sizes of its pools."""

    def __init__(self) -> None:
        self._looked = -math.inf
        self._last: _Taken | None = None
        self._has_failed = False

    def is_due(self, now: float) -> bool:
        """Whether it is time for a look."""
        return now - self._looked >= _PERIOD and not self._has_failed

    def look(
        self,
        pools: Sequence[Pool],
        needs: Mapping[str, float],
        placing: Mapping[str, float],
        leaving: bool,
        now: float,
    ) -> CardMove | None:
        """A card that moves, if one does. Both pools have new sizes.

        `needs`: by pool, the replicas that would be busy all the time. `placing`: replicas without a place, and how
        long. `leaving`: whether replicas leave after their calls, and have their cards until then. What finds no place
        on its new card, because CPUs are lacking, gives it back, and no other card is moved.
        """
        if not self.is_due(now):
            return None
        self._looked = now
        if (last := self._last) is not None:
            if last.taker.ready >= min(last.ready, last.taker.spec.replicas):
                self._end(last)  # The card is in use, as far as it is needed by now.
            elif not leaving and _waits(last.taker, placing):
                return self._undo(last)
        dit = [pool for pool in pools if set(pool.spec.roles) & set(DIFFUSION_STAGES)]
        if self._last is not None or not all(map(_gives_cards, dit)):
            return None
        # `needs` are those of all replicas that the DiT should have. Some may wait for a place.
        wanted, running = sum(pool.spec.replicas for pool in dit), sum(pool.ready for pool in dit)
        giver = max(dit, key=lambda pool: pool.ready)
        for pool in pools:
            spec, need, lacks_places = pool.spec, needs.get(pool.spec.name), _waits(pool, placing)
            if need is None or spec.most is None or not 0 < spec.gpus_per_rank < 1:
                continue
            if pool.ready < spec.most and not lacks_places:
                continue
            places = int(1 / spec.gpus_per_rank + 1e-6)
            # In clips of a replica of the DiT that never waits.
            before = min(running, wanted * pool.ready / need)
            after = min(running - 1, wanted * (pool.ready + places) / need)
            if after > (1 + _WORTH) * before and running > _FEWEST_DIT and giver.ready > 1:
                added = max(0, pool.ready + places - spec.most)
                withheld = [(other, sum(name in other.replicas for name in placing)) for other in dit]
                for other, count in [*withheld, (giver, 1)]:
                    other.spec = replace(other.spec, replicas=other.spec.replicas - count)
                # Asked for at once: whoever else looks for free cards sees that they wait for this one.
                most = spec.most + added
                pool.spec = replace(spec, most=most, replicas=most)
                self._last = _Taken(giver, pool, added, min(most, pool.ready + places), withheld)
                return CardMove(giver.spec.name, spec.name, "with it the run makes more clips")
        return None

    def _end(self, taken: _Taken) -> None:
        self._last = None
        for pool, count in taken.withheld:
            pool.spec = replace(pool.spec, replicas=pool.spec.replicas + count)

    def _undo(self, taken: _Taken) -> CardMove:
        self._end(taken)
        self._has_failed = True
        spec = taken.taker.spec
        assert spec.most is not None
        most = spec.most - taken.added
        taken.taker.spec = replace(spec, most=most, replicas=min(spec.replicas, most))
        taken.giver.spec = replace(taken.giver.spec, replicas=taken.giver.spec.replicas + 1)
        return CardMove(spec.name, taken.giver.spec.name, "nothing else has found a place there")


def _waits(pool: Pool, placing: Mapping[str, float]) -> bool:
    """Whether a replica of the pool has found no place for a while."""
    return any(placing.get(name, 0.0) >= _PERIOD for name in pool.replicas)


def _gives_cards(pool: Pool) -> bool:
    """Whether each replica of a pool of the DiT has a card to itself, and the driver may choose how many there are."""
    spec = pool.spec
    return spec.gpus_per_rank == 1 and spec.ranks == 1 and set(DIFFUSION_STAGES) <= set(spec.roles)
