"""How long a run has reserved GPUs: each card from its first replica until its last is gone, whatever they do there.

The time of a card that several pools share is divided among them by what they reserve of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ltx_ray.pools.protocol import RankInfo


@dataclass
class _Card:
    """What has been the same on a card since then: by replica, its pool, and what it reserves of the card."""

    since: float
    replicas: dict[str, tuple[str, float]]

    def by_pool(self, now: float) -> Iterator[tuple[str, float]]:
        """The card's seconds up to now, by pool."""
        reserved = sum(gpus for _, gpus in self.replicas.values())
        for pool, gpus in self.replicas.values():
            yield pool, (now - self.since) * gpus / reserved


class CardTime:
    """Adds the seconds of reserved cards up. Times are of one clock."""

    def __init__(self) -> None:
        #: By pool, up to when the replicas of each card changed last.
        self._seconds: defaultdict[str, float] = defaultdict(float)
        #: By node and card.
        self._cards: dict[tuple[str, str], _Card] = {}
        self._by_replica: dict[str, list[tuple[str, str]]] = {}

    def hold(self, replica: str, pool: str, gpus: float, ranks: Sequence[RankInfo], now: float) -> None:
        """A replica has got its part `gpus` of the card of each of its ranks. Ranks without a GPU reserve none."""
        held = [(rank.node, rank.gpus) for rank in ranks if rank.gpus]
        self._by_replica[replica] = held
        for card in held:
            self._settle(card, now)
            self._cards.setdefault(card, _Card(now, {})).replicas[replica] = pool, gpus

    def free(self, replica: str, now: float) -> None:
        """A replica and its place are gone, if it had any."""
        for card in self._by_replica.pop(replica, ()):
            self._settle(card, now)
            state = self._cards[card]
            state.replicas.pop(replica, None)
            if not state.replicas:
                del self._cards[card]

    def _settle(self, card: tuple[str, str], now: float) -> None:
        """Add up what a card has had until now, before its replicas change."""
        if (state := self._cards.get(card)) is not None:
            self._add(self._seconds, state, now)
            state.since = now

    @staticmethod
    def _add(seconds: defaultdict[str, float], card: _Card, now: float) -> None:
        for pool, spent in card.by_pool(now):
            seconds[pool] += spent

    def seconds(self, now: float) -> float:
        """GPU seconds up to now."""
        return sum(self._seconds.values()) + sum(now - card.since for card in self._cards.values())

    def by_pool(self, now: float) -> Mapping[str, float]:
        """The same by pool."""
        seconds = self._seconds.copy()
        for card in self._cards.values():
            self._add(seconds, card, now)
        return seconds
