"""How long a run has reserved GPUs: each card from its first replica until its last is gone, whatever they do there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ltx_ray.pools.protocol import RankInfo


@dataclass
class _Card:
    since: float
    replicas: set[str]


class CardTime:
    """Adds the seconds of reserved cards up. Times are of one clock."""

    def __init__(self) -> None:
        self._seconds = 0.0
        #: By node and card.
        self._cards: dict[tuple[str, str], _Card] = {}
        self._by_replica: dict[str, list[tuple[str, str]]] = {}

    def hold(self, replica: str, ranks: Sequence[RankInfo], now: float) -> None:
        """A replica has got the cards of its ranks. Ranks without a GPU reserve none."""
        held = [(rank.node, rank.gpus) for rank in ranks if rank.gpus]
        self._by_replica[replica] = held
        for card in held:
            self._cards.setdefault(card, _Card(now, set())).replicas.add(replica)

    def free(self, replica: str, now: float) -> None:
        """A replica and its place are gone, if it had any."""
        for card in self._by_replica.pop(replica, ()):
            state = self._cards[card]
            state.replicas.discard(replica)
            if not state.replicas:
                self._seconds += now - state.since
                del self._cards[card]

    def seconds(self, now: float) -> float:
        """GPU seconds up to now."""
        return self._seconds + sum(now - card.since for card in self._cards.values())
