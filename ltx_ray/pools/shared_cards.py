"""Text and decode on cards without a rank of the DiT: one card is filled before another one is begun.

Ray puts a placement group onto the node of which the largest part is free. Text and decode, asked for at once, would
each begin a card of their own on two nodes, and one replica of the DiT, which needs a whole card, would find none.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable

from ltx_ray.pools.gang import Gang, GangState

#: Seconds for which a gang waits for the place of another one, and then for a place on a card that has been begun. Its
#: node may have no CPUs left.
_WAIT_SECONDS = 10.0
#: Seconds between two looks at whether a gang has its place.
_PERIOD = 0.2


class SharedCards:
    """Asks for the places of gangs that fill cards, one after the other."""

    def __init__(self) -> None:
        self._looked = -math.inf
        #: By gang whose processes are yet to come, the node where it has its place, and when that was asked for.
        self._placed: dict[str, tuple[str, float | None]] = {}

    def ask(self, gangs: Iterable[Gang], held: Iterable[Gang], avoided: Collection[str], now: float) -> None:
        """Ask for the next place when it is known where the one before is. `held`: dead ones that keep their places.

        `avoided`: nodes on which nothing is placed. `now` as of `time.time`.
        """
        if now - self._looked < _PERIOD:
            return
        self._looked = now
        sharing = [gang for gang in gangs if gang.pool.fills_cards]
        placing = [gang for gang in sharing if gang.state is GangState.PLACING]
        unplaced = [gang for gang in placing if gang.asked_at is not None and not self._has_place(gang)]
        for gang in unplaced:
            if gang.asked_near and now - (gang.asked_at or 0.0) > _WAIT_SECONDS:
                gang.ask(avoided)
        waits = any(now - (gang.asked_at or 0.0) <= _WAIT_SECONDS for gang in unplaced)
        following = next((gang for gang in placing if gang.asked_at is None), None)
        if following is not None and not waits:
            following.ask(avoided, self._begun(sharing, held, following.pool.gpus_per_rank).difference(avoided))

    def _has_place(self, gang: Gang) -> bool:
        if not self._known_node(gang) and (node := gang.node_of_place()) is not None:
            self._placed[gang.name] = node, gang.asked_at
        return bool(self._known_node(gang))

    def _known_node(self, gang: Gang) -> str:
        """Where a gang that is placing was seen to have the place that it asked for last; "" before."""
        node, asked_at = self._placed.get(gang.name, ("", None))
        return node if asked_at == gang.asked_at else ""

    def _begun(self, sharing: Iterable[Gang], held: Iterable[Gang], part: float) -> set[str]:
        """The nodes whose cards that have been begun have room for such a part. Cards that failed do not count."""
        failed = {(rank.node, rank.gpus) for gang in held for rank in gang.ranks}
        taken: defaultdict[str, float] = defaultdict(float)
        cards: defaultdict[str, set[str]] = defaultdict(set)
        for gang in sharing:
            node, card = next(((rank.node, rank.gpus) for rank in gang.ranks), ("", ""))
            if gang.state is GangState.PLACING:
                node = self._known_node(gang)
            if node and (node, card) not in failed:
                taken[node] += gang.pool.gpus_per_rank
                cards[node] |= {card} - {""}
        # Ray fills cards that have been begun, so that those whose card is not known yet are on as few as possible.
        return {
            node for node, parts in taken.items()
            if parts + part <= max(len(cards[node]), math.ceil(parts - 1e-6)) + 1e-6
        }  # fmt: skip
