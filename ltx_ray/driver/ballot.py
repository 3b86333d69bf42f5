"""What the nodes of a run say of something on which all should agree, and who is right when they do not."""

from __future__ import annotations

from collections import Counter

#: Stands for the runs before, whose answer the output has kept.
EARLIER_RUNS = "earlier runs"


class Ballot:
    """Every node has one vote. Two that differ are settled by a third."""

    def __init__(self) -> None:
        #: By node.
        self.votes: dict[str, str] = {}
        #: What most nodes say; None when as many say something else, or nobody says anything.
        self.settled: str | None = None
        #: Whether the nodes say different things.
        self.contested = False
        self._asked_all = False

    def cast(self, node: str, value: str) -> None:
        if self.votes.get(node) != value:
            self.votes[node] = value
            self._count()

    def settle_for(self, value: str) -> None:
        """Nobody else can be asked, so `value` counts from now on. Votes for others are void."""
        self._asked_all = True
        self.votes = {node: vote for node, vote in self.votes.items() if vote == value}
        self._count()

    def _count(self) -> None:
        counts = Counter(self.votes.values()).most_common(2)
        self.contested = len(counts) > 1
        tied = self.contested and counts[0][1] == counts[1][1]
        self.settled = None if tied or not counts else counts[0][0]

    @property
    def confirmed(self) -> bool:
        """Whether more than one says what counts, or nobody else can be asked."""
        return self.settled is not None and (self._asked_all or list(self.votes.values()).count(self.settled) > 1)

    @property
    def nodes(self) -> set[str]:
        """The nodes of this run that have voted."""
        return self.votes.keys() - {EARLIER_RUNS}
