"""Cards on which replicas cannot start: their places are held for a while, so that no other replica lands on them.

A place that is given back at once would be the only free one of a full cluster, and the next replica would fail there,
too. What lands on the rest of the card leaves it reserved as well (`RayReplicaSet`). Its neighbours and its node go on.
A place is given back, and tried again, after a time that doubles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ltx_ray.pools.back_off import BackOff
from ltx_ray.pools.exclusion import node_name
from ltx_ray.pools.protocol import RankInfo

#: Seconds for which a place is held after its first failure, and the most.
_FIRST_SECONDS, _MOST_SECONDS = 30.0, 1800.0


@dataclass(frozen=True)
class Parked:
    """The place of a replica that could not start, held until a time of the driver's clock."""

    replica: str
    node: str
    #: Its node's address and its cards, for messages.
    where: str
    failures: int
    until: float


def card(ranks: Sequence[RankInfo]) -> str:
    """Where the ranks of a gang run: the address of their node, and their cards."""
    cards = ",".join(rank.gpus for rank in ranks if rank.gpus)
    return node_name(ranks) + (f", GPU {cards}" if cards else "")


class Parking(BackOff[Parked]):
    """The places that are held, by replica, and how often each has failed since a replica started there."""

    def __init__(self) -> None:
        super().__init__(_FIRST_SECONDS, _MOST_SECONDS)
        self._failures: dict[tuple[tuple[str, str], ...], int] = {}

    def hold(self, replica: str, ranks: Sequence[RankInfo], now: float) -> Parked:
        """The place of a replica that failed to start is held from now on."""
        place = _place(ranks)
        count = self._failures[place] = self._failures.get(place, 0) + 1
        parked = self.left[replica] = Parked(replica, ranks[0].node, card(ranks), count, now + self.seconds(count))
        return parked

    def started(self, ranks: Sequence[RankInfo]) -> None:
        """A replica is ready there."""
        self._failures.pop(_place(ranks), None)

    def on_node(self, node: str) -> list[Parked]:
        """Take the places that are held on a node."""
        found = [replica for replica, parked in self.left.items() if parked.node == node]
        return [self.left.pop(replica) for replica in found]


def _place(ranks: Sequence[RankInfo]) -> tuple[tuple[str, str], ...]:
    return tuple((rank.node, rank.gpus) for rank in ranks)
