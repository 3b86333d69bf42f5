"""Nodes on which a run places nothing for a while, and the cards by whose failures a node comes to that.

One bad card of several is left to `pools.parking`. A node is excluded when half of its cards have failed and more than
one has, when its only card has, or when it does not compute what the others do. It is tried again after a time that
doubles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ltx_ray.pools.back_off import BackOff
from ltx_ray.pools.protocol import RankInfo

#: Seconds for which a node is excluded the first time, and the most.
_FIRST_SECONDS, _MOST_SECONDS = 300.0, 14_400.0
#: Starts without a GPU that have to fail one after the other on a node.
_MOST_FAILURES = 2


@dataclass(frozen=True)
class Excluded:
    """A node that is excluded until a time of the driver's clock. `where`: its address, for messages."""

    node: str
    where: str
    reason: str
    times: int
    until: float


def node_name(ranks: Sequence[RankInfo]) -> str:
    """The node of a gang in messages."""
    return f"node {ranks[0].address or ranks[0].node}"


class Exclusions(BackOff[Excluded]):
    """The nodes that are excluded, by Ray's ids, and the failures of cards."""

    def __init__(self) -> None:
        super().__init__(_FIRST_SECONDS, _MOST_SECONDS)
        #: By node: the cards on which nothing started or worked since something did, with the number of times.
        self._failed: dict[str, dict[str, int]] = {}
        self._times: dict[str, int] = {}

    def card_failed(self, ranks: Sequence[RankInfo], cards: int) -> str | None:
        """A gang failed on the cards of `ranks`, on a node that has so many `cards`.

        Returns why the node should be excluded, or None.
        """
        failed = self._failed.setdefault(ranks[0].node, {})
        for rank in ranks:
            failed[rank.gpus] = failed.get(rank.gpus, 0) + 1
        if not ranks[0].gpus:
            return f"{failed['']} replicas failed there" if failed[""] >= _MOST_FAILURES else None
        bad = sum(bool(card) for card in failed)
        if bad < min(2, cards) or 2 * bad < cards:
            return None
        return f"{bad} of its {cards} GPUs failed" if cards > 1 else "its only GPU failed"

    def works(self, ranks: Sequence[RankInfo]) -> None:
        """A gang has come up on its cards, or works there."""
        failed = self._failed.get(ranks[0].node, {})
        for rank in ranks:
            failed.pop(rank.gpus, None)

    def exclude(self, ranks: Sequence[RankInfo], reason: str, now: float) -> Excluded:
        """The node of a gang is excluded from now on."""
        node = ranks[0].node
        times = self._times[node] = self._times.get(node, 0) + 1
        found = self.left[node] = Excluded(node, node_name(ranks), reason, times, now + self.seconds(times))
        return found
