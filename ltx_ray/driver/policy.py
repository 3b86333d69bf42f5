"""What to do next, as a pure state machine: no Ray, no clock, no randomness.

It holds every admitted item's state and every replica's, and decides what runs where. The loop only
carries its decisions out and tells it what happened.

Order: downstream first, so that nothing piles up; within a stage, the item admitted first, unless
another needs the weights that the replica has merged now: items of a kind stay together, so that
replicas switch seldom, but none is passed over more than `patience` times. A queue before a stage never
holds more than `queue_depth` items for each replica of the stage, counting those that are being made
for it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

STAGES = ("text", "stage1", "stage2", "decode")


@dataclass(frozen=True)
class Dispatch:
    """Run `stage` of `item` on `replica`. `switched`: it turns from another stage, or from another kind of item."""

    item: str
    stage: str
    replica: str
    switched: bool = False


@dataclass(frozen=True)
class Verdict:
    """What became of an item after a failure: tried again, or given up after `attempts`."""

    item: str
    retry: bool
    attempts: int


@dataclass
class _Item:
    order: int
    stage: str
    kinds: Mapping[str, Hashable] = field(default_factory=dict)
    attempts: int = 1
    restarts: int = 0
    replica: str | None = None
    passed_over: int = 0


@dataclass
class _Replica:
    roles: tuple[str, ...]
    phase: str | None = None
    kind: Hashable = None
    item: str | None = None


@dataclass
class Policy:
    """`queue_depth`: items waiting before a stage, for each of its replicas; `max_attempts` a row;
    `stages`: what every item passes through, in order."""

    queue_depth: int = 4
    max_attempts: int = 3
    stages: tuple[str, ...] = STAGES
    max_restarts: int = 10
    patience: int = 16
    draining: bool = False
    _items: dict[str, _Item] = field(default_factory=dict)
    _replicas: dict[str, _Replica] = field(default_factory=dict)
    _admitted: int = 0

    # --- what happened ---------------------------------------------------------------------------

    def join(self, replica: str, roles: Iterable[str]) -> None:
        """A replica that serves `roles` is ready."""
        assert replica not in self._replicas
        self._replicas[replica] = _Replica(tuple(roles))

    def leave(self, replica: str, charged: bool = True) -> Verdict | None:
        """A replica is gone, and with it the call it was in. The item it held is charged an attempt."""
        gone = self._replicas.pop(replica, None)
        if gone is None or gone.item is None:
            return None
        self._items[gone.item].replica = None
        return self._failed(gone.item, charged)

    def admit(self, item: str, kinds: Mapping[str, Hashable] | None = None) -> None:
        """Take an item in, at the end of the line. `kinds`: by stage, what a replica must have merged for it."""
        assert item not in self._items
        self._items[item] = _Item(self._admitted, self.stages[0], kinds or {})
        self._admitted += 1

    def finished(self, item: str) -> bool:
        """The item's call came back well. True when that was its last stage."""
        state = self._release(item)
        if state.stage == self.stages[-1]:
            del self._items[item]
            return True
        state.stage = self._after(state.stage)
        return False

    def row_failed(self, item: str) -> Verdict:
        """The row itself is at fault: it is given up at once."""
        state = self._release(item)
        del self._items[item]
        return Verdict(item, retry=False, attempts=state.attempts)

    def call_failed(self, item: str) -> Verdict:
        """The call failed and the replica lives: an attempt is charged."""
        self._release(item)
        return self._failed(item, charged=True)

    def inputs_lost(self, item: str) -> Verdict:
        """Results of earlier stages are gone: the item starts over, charged only when it happens too often."""
        state = self._release(item)
        state.stage = self.stages[0]
        state.restarts += 1
        return self._failed(item, charged=state.restarts > self.max_restarts)

    # --- what to do ------------------------------------------------------------------------------

    def room(self) -> int:
        """How many more items may be admitted now."""
        if self.draining:
            return 0
        servers = sum(1 for r in self._replicas.values() if self.stages[0] in r.roles)
        return max(0, self.queue_depth * max(1, servers) - self.waiting(self.stages[0]))

    def next_dispatch(self) -> Dispatch | None:
        """The next call to make, or None when nothing can or may run now."""
        for stage in reversed(self.stages):
            for name, replica in self._replicas.items():
                if replica.item is None and stage == self._stage_for(replica):
                    return self._assign(name, replica, stage)
        return None

    @property
    def busy(self) -> int:
        """Items in the pools, waiting or running."""
        return len(self._items)

    @property
    def running(self) -> dict[str, str]:
        """Items under way, by replica."""
        return {name: r.item for name, r in self._replicas.items() if r.item is not None}

    def idle_when_drained(self) -> bool:
        """While draining: nothing runs, and nothing more will."""
        return self.draining and not self.running and self.waiting(self.stages[-1]) == 0

    def waiting(self, stage: str) -> int:
        """Items that wait for `stage`."""
        return sum(1 for i in self._items.values() if i.stage == stage and i.replica is None)

    # --- inside ----------------------------------------------------------------------------------

    def _stage_for(self, replica: _Replica) -> str | None:
        """Which of its stages an idle replica should run now.

        A shared replica stays in its phase while that has work or is about to get some, so that it
        switches seldom: it fills the queue after stage 1, then empties it.
        """
        able = [stage for stage in self.stages if stage in replica.roles and self._may_run(stage)]
        if not able or replica.phase in able:
            return replica.phase if able else None
        # work for the phase it is in is being made right now: waiting for it is shorter than two switches
        if replica.phase is not None and self._coming(replica.phase) and self._has_room_after(replica.phase):
            return None
        return able[0]

    def _coming(self, stage: str) -> bool:
        """Whether an item runs in an earlier stage now."""
        earlier = self.stages[: self.stages.index(stage)]
        return any(i.replica is not None and i.stage in earlier for i in self._items.values())

    def _may_run(self, stage: str) -> bool:
        if self.draining and stage != self.stages[-1]:
            return False
        return self.waiting(stage) > 0 and self._has_room_after(stage)

    def _after(self, stage: str) -> str:
        return self.stages[self.stages.index(stage) + 1]

    def _has_room_after(self, stage: str) -> bool:
        if stage == self.stages[-1]:
            return True
        following = self._after(stage)
        servers = sum(1 for r in self._replicas.values() if following in r.roles)
        queued = sum(
            1
            for i in self._items.values()
            if (i.replica is None and i.stage == following) or (i.replica is not None and i.stage == stage)
        )
        return queued < self.queue_depth * max(1, servers)

    def _assign(self, name: str, replica: _Replica, stage: str) -> Dispatch:
        chosen = self._choose(name, replica, stage)
        state = self._items[chosen]
        kind = state.kinds.get(stage)
        switched = replica.phase is not None and (replica.phase, replica.kind) != (stage, kind)
        state.replica, state.passed_over = name, 0
        replica.item, replica.phase, replica.kind = chosen, stage, kind
        return Dispatch(chosen, stage, name, switched)

    def _choose(self, name: str, replica: _Replica, stage: str) -> str:
        """Which of the items that wait for `stage` this replica takes."""
        waiting = sorted(
            (i for i, s in self._items.items() if s.stage == stage and s.replica is None),
            key=lambda i: self._items[i].order,
        )
        first = waiting[0]
        if self._items[first].passed_over >= self.patience:
            return first
        others = {r.kind for n, r in self._replicas.items() if n != name and r.phase == stage}

        def preference(item: str) -> int:
            kind = self._items[item].kinds.get(stage)
            if replica.phase == stage and kind == replica.kind:
                return 0
            # what another replica has merged is better left to it
            return 2 if kind in others else 1

        chosen = min(waiting, key=preference)
        for item in waiting[: waiting.index(chosen)]:
            self._items[item].passed_over += 1
        return chosen

    def _release(self, item: str) -> _Item:
        state = self._items[item]
        assert state.replica is not None, f"{item} is not running"
        self._replicas[state.replica].item = None
        state.replica = None
        return state

    def _failed(self, item: str, charged: bool) -> Verdict:
        state = self._items[item]
        if charged and state.attempts >= self.max_attempts:
            del self._items[item]
            return Verdict(item, retry=False, attempts=state.attempts)
        if charged:
            state.attempts += 1
        return Verdict(item, retry=True, attempts=state.attempts)
