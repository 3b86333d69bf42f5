"""Text and decode on cards without a rank of the DiT: one card is filled before another one is begun.

Ray puts a placement group onto the node of which the largest part is free. Text and decode, asked for at once, would
each begin a card of their own on two nodes, and one replica of the DiT, which needs a whole card, would find none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable

from ltx_ray.pools.gang import Gang, GangState

#: Seconds for which a gang waits for the place of another one, and then for a place on a card that has been begun. Its
#: node may have no CPUs left.
_WAIT_SECONDS = 10.0


class SharedCards:
    """Asks for the places of gangs that fill cards, one after the other."""

    def ask(self, gangs: Iterable[Gang], held: Iterable[Gang], avoided: Collection[str], now: float) -> None:
        """Ask for the next place when it is known where the one before is. `held`: dead ones that keep their places.

        `avoided`: nodes on which nothing is placed. `now` as of `time.time`.
        """
        sharing = [gang for gang in gangs if gang.pool.fills_cards]
        placing = [gang for gang in sharing if gang.state is GangState.PLACING]
        waits = False
        for gang in placing:
            if gang.asked_at is None:
                continue
            if now - gang.asked_at <= _WAIT_SECONDS:
                waits = True
            elif gang.asked_near:
                gang.ask(avoided)
                waits = True
        following = next((gang for gang in placing if gang.asked_at is None), None)
        if following is not None and not waits:
            following.ask(avoided, _begun(sharing, held, following.pool.gpus_per_rank) - set(avoided))


def _begun(sharing: Iterable[Gang], held: Iterable[Gang], part: float) -> set[str]:
    """The nodes with a card that has been begun and has room for such a part of it. Cards that failed do not count."""
    taken: defaultdict[tuple[str, str], float] = defaultdict(float)
    for gang in sharing:
        for rank in gang.ranks:
            taken[rank.node, rank.gpus] += gang.pool.gpus_per_rank
    failed = {(rank.node, rank.gpus) for gang in held for rank in gang.ranks}
    return {card[0] for card, parts in taken.items() if card not in failed and parts + part <= 1 + 1e-6}
