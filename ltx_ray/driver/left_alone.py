"""The cards and the nodes that a run leaves alone for a while, because replicas fail there."""

from __future__ import annotations

from collections.abc import Sequence, Set

from ltx_ray.driver.events import EventLog
from ltx_ray.driver.progress import Progress, duration
from ltx_ray.pools.exclusion import Exclusions
from ltx_ray.pools.parking import Parking
from ltx_ray.pools.protocol import RankInfo, ReplicaLost, ReplicaSet
from ltx_ray.records import first_line

#: Calls that have to break a card one after the other.
_BROKEN_CALLS = 2


class LeftAlone:
    """Decides what is left alone and when it is tried again, and says so in the log and in the events."""

    def __init__(self, replicas: ReplicaSet, events: EventLog, progress: Progress):
        self._replicas, self._events, self._progress = replicas, events, progress
        self._parking, self._exclusions = Parking(), Exclusions()
        #: Nodes that are excluded because they compute wrongly.
        self.wrong_nodes: set[str] = set()
        #: By node, card and role: the calls that have broken the card since one succeeded.
        self._broken: dict[tuple[str, str, str], int] = {}

    @property
    def nodes(self) -> Set[str]:
        """The nodes that are excluded now."""
        return self._exclusions.left.keys()

    def started(self, ranks: Sequence[RankInfo], role: str) -> None:
        """A replica has started on its cards. Those that broke in calls have to show that calls succeed, too."""
        if ranks and not any((rank.node, rank.gpus, role) in self._broken for rank in ranks):
            self._exclusions.works(ranks)
            self._parking.started(ranks)

    def call_succeeded(self, ranks: Sequence[RankInfo], role: str) -> None:
        """A call has succeeded on these GPUs. Cheap, because nearly all do."""
        for rank in ranks if self._broken else ():
            if self._broken.pop((rank.node, rank.gpus, role), None):
                self.started(ranks, role)

    def breaks(self, ranks: Sequence[RankInfo], role: str) -> bool:
        """A GPU of these failed in a call. Whether its place is to be held, because that repeats there."""
        for rank in ranks:
            card = rank.node, rank.gpus, role
            self._broken[card] = self._broken.get(card, 0) + 1
        return any(self._broken[rank.node, rank.gpus, role] >= _BROKEN_CALLS for rank in ranks)

    def failed(self, event: ReplicaLost, role: str, now: float) -> None:
        """A replica failed to start, or its card keeps failing. Its node is excluded when too many cards have."""
        if event.held:
            self._park(event, role, now)
        if event.node_lost or not event.ranks:
            return
        failed = event.ranks if event.rank is None else [event.ranks[event.rank]]
        nodes = self._replicas.nodes()
        why = self._exclusions.card_failed(failed, nodes.get(event.ranks[0].node, 0))
        if event.unfit:
            why = first_line(event.reason)
        if why is not None and self.has_others(event.ranks):
            self.exclude(event.ranks, why, now)

    def has_others(self, ranks: Sequence[RankInfo]) -> bool:
        """Whether replicas that need what these ranks need may go to another node."""
        return bool(self.usable(bool(ranks[0].gpus)) - {ranks[0].node})

    def usable(self, on_gpus: bool) -> set[str]:
        """The nodes that are not excluded; those with GPUs where replicas need them."""
        return {node for node, cards in self._replicas.nodes().items() if cards or not on_gpus} - self.nodes

    def exclude(self, ranks: Sequence[RankInfo], why: str, now: float) -> None:
        """Place nothing on the node of these ranks for a while."""
        if ranks[0].node in self.nodes:
            return
        found = self._exclusions.exclude(ranks, why, now)
        self._replicas.avoid(self.nodes)
        # No replica lands there now, so no place has to be held.
        for parked in self._parking.on_node(found.node):
            self._release(parked.replica, parked.where)
        self._progress.say(f"{found.where}: excluded for {duration(found.until - now)}, because {why}")
        self._events.emit(
            "node_excluded", node=found.node, where=found.where, times=found.times,
            seconds=round(found.until - now, 3), reason=why,
        )  # fmt: skip

    def _park(self, event: ReplicaLost, role: str, now: float) -> None:
        parked = self._parking.hold(event.replica, event.ranks, now)
        again = duration(parked.until - now)
        why = f"{event.replica} failed there again" if event.served else f"{event.replica} did not start there"
        self._progress.say(f"{parked.where}: left alone for {again}, because {why}")
        self._events.emit(
            "card_parked", role=role, replica=event.replica, where=parked.where,
            failures=parked.failures, seconds=round(parked.until - now, 3), reason=first_line(event.reason),
        )  # fmt: skip

    def retry(self, now: float, is_stuck: bool) -> None:
        """Try again what is due, or what is due first when the run `is_stuck` without it."""
        if not self._parking.left and not self._exclusions.left:
            return
        cards, nodes = self._parking.due(now), self._exclusions.due(now)
        if not cards and not nodes and is_stuck:
            if (card := self._parking.earliest()) is not None:
                cards = [card]
            elif (node := self._exclusions.earliest()) is not None:
                nodes = [node]
        for parked in cards:
            self._release(parked.replica, parked.where)
        if nodes:
            self._replicas.avoid(self.nodes)
        for excluded in nodes:
            self.wrong_nodes.discard(excluded.node)
            self._progress.say(f"{excluded.where}: tried again")
            self._events.emit("node_retried", node=excluded.node, where=excluded.where)

    def _release(self, replica: str, where: str) -> None:
        self._replicas.release(replica)
        self._events.emit("card_retried", replica=replica, where=where)
