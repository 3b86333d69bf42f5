"""What to do next, as a pure state machine: no Ray, no clock, no randomness.

It holds every admitted item's state and every replica's, and decides what runs where and which stage a
replica serves. The loop only carries its decisions out and tells it what happened.

Order: downstream first, so that nothing piles up; within a stage, the item admitted first, unless
another needs the weights that the replica has merged now: items of a kind stay together, so that
replicas switch seldom, but none is passed over more than `patience` times. Nothing is made for a stage
before which `queue_depth` items wait for each of its replicas, so that a queue holds no more than these and
one for each replica before it; and all that items in flight hold stays within `max_bytes`.

A replica that may serve both diffusion stages is at home in one of them. It moves to the other, and is at
home there from then on, when it has nothing to do and waiting for work would take longer than merging
again there and back, or when its stage has more replicas than its measured share of the work: queues
between the stages fill and empty slowly, so that roles do not flap.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from ltx_ray.driver.queue import FairQueue

STAGES = ("text", "stage1", "stage2", "decode")
#: Every stage there is, upstream first: "stored" fetches the latents of stage 1 in place of rendering them,
#: "keep" stores the latents of an item that is given up.
ORDER = ("text", "stage1", "stored", "stage2", "decode", "keep")
#: Stages that want other weights merged: turning from one to another costs a replica time.
_MERGED = ("stage1", "stage2")
#: What still runs while draining.
_LAST = ("decode", "keep")
#: Seconds a call takes until some have been measured: one H100, an HQ clip (ltx-facts.md). Only ratios count.
_SECONDS = {"text": 0.1, "stage1": 46.0, "stored": 0.1, "stage2": 17.0, "decode": 1.75, "keep": 0.1}
_SWITCH_SECONDS = 1.5
#: The same of results, in bytes: contexts of two prompts, latents of either size.
_BYTES = {"text": 25e6, "stage1": 2e6, "stored": 2e6, "stage2": 8e6, "decode": 0.0, "keep": 0.0}
#: Weight of the newest measurement in a running mean.
_NEWEST = 0.1


@dataclass(frozen=True)
class Dispatch:
    """Run `stage` of `item` on `replica`. `switched`: it turns from another stage, or from another kind of item;
    `moved`: it is at home in this stage from now on, and was in another."""

    item: str
    stage: str
    replica: str
    switched: bool = False
    moved: bool = False


@dataclass(frozen=True)
class RetryDecision:
    """What became of an item after a failure: tried again, or given up after `attempts`."""

    item: str
    retry: bool
    attempts: int


@dataclass
class _Item:
    order: int
    path: tuple[str, ...]
    kinds: Mapping[str, Hashable]
    attempts: int
    at: int = 0
    restarts: int = 0
    replica: str | None = None
    held: dict[str, float] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        return self.path[self.at]

    @property
    def following(self) -> str | None:
        return self.path[self.at + 1] if self.at + 1 < len(self.path) else None


@dataclass
class _Replica:
    roles: tuple[str, ...]
    #: Which of its merged stages it serves now.
    home: str | None
    phase: str | None = None
    kind: Hashable = None
    item: str | None = None

    @property
    def mobile(self) -> bool:
        return all(stage in self.roles for stage in _MERGED)

    def serves(self) -> tuple[str, ...]:
        return tuple(role for role in self.roles if role == self.home or role not in _MERGED)


@dataclass
class _Mean:
    """A running mean that starts from a guess and forgets it at the first measurement."""

    value: float
    measured: bool = False

    def see(self, value: float) -> None:
        self.value = value if not self.measured else (1 - _NEWEST) * self.value + _NEWEST * value
        self.measured = True


@dataclass
class Policy:
    """`queue_depth`: items waiting before a stage, for each of its replicas; `max_attempts` a row; `stages`: what an
    item passes through, in order; `max_bytes`: what the results of items in flight may take together."""

    queue_depth: int = 4
    max_attempts: int = 3
    stages: tuple[str, ...] = STAGES
    max_restarts: int = 10
    patience: int = 16
    max_bytes: float = math.inf
    draining: bool = False
    _items: dict[str, _Item] = field(default_factory=dict)
    _replicas: dict[str, _Replica] = field(default_factory=dict)
    #: Items that wait for a stage, by what comes after it.
    _lines: dict[str, dict[str | None, FairQueue]] = field(default_factory=lambda: {stage: {} for stage in ORDER})
    #: Idle replicas by each stage that they serve at home, in the order in which they became idle.
    _idle: dict[str, dict[str, None]] = field(default_factory=lambda: {stage: {} for stage in ORDER})
    _servers: Counter[str] = field(default_factory=Counter)
    #: Replicas that may serve both diffusion stages, by the one that they are at home in.
    _mobile: Counter[str] = field(default_factory=Counter)
    #: Calls under way by (stage, the stage that follows), and replicas by (phase, what they have merged).
    _making: Counter[tuple[str, str | None]] = field(default_factory=Counter)
    _merged: Counter[tuple[str, Hashable]] = field(default_factory=Counter)
    _held: float = 0.0
    _admitted: int = 0
    _seconds: dict[str, _Mean] = field(default_factory=lambda: {s: _Mean(v) for s, v in _SECONDS.items()})
    _bytes: dict[str, _Mean] = field(default_factory=lambda: {s: _Mean(v) for s, v in _BYTES.items()})
    _switch: _Mean = field(default_factory=lambda: _Mean(_SWITCH_SECONDS))

    # --- what happened ---------------------------------------------------------------------------

    def join(self, replica: str, roles: Iterable[str]) -> None:
        """A replica that may serve `roles` is ready, at home in the first of them."""
        assert replica not in self._replicas
        roles = tuple(roles)
        state = _Replica(roles, next((role for role in roles if role in _MERGED), None))
        self._replicas[replica] = state
        self._lives(state, 1)
        self._rests(replica)

    def leave(
        self, replica: str, charged: bool = True, inputs_lost: bool = False, given_back: bool = False
    ) -> RetryDecision | None:
        """A replica is gone, and with it the call it was in. The item it held is charged an attempt; one that is not
        to be `charged` is when that happens too often, unless we have `given_back` the replica ourselves. With
        `inputs_lost` it starts over as in `inputs_lost`."""
        gone = self._replicas.get(replica)
        if gone is None:
            return None
        item = gone.item
        if item is not None:
            self._release(item)
        self._works(replica)
        self._lives(gone, -1)
        if gone.phase is not None:
            self._merged[gone.phase, gone.kind] -= 1
        del self._replicas[replica]
        if item is None:
            return None
        if inputs_lost:
            return self._starts_over(item)
        if given_back:
            return self._failed(item, charged=False)
        if not charged:
            self._items[item].restarts += 1
        return self._failed(item, charged or self._items[item].restarts > self.max_restarts)

    def admit(
        self,
        item: str,
        kinds: Mapping[str, Hashable] | None = None,
        path: tuple[str, ...] | None = None,
        attempts: int = 1,
        first: bool = False,
    ) -> None:
        """Take an item in, at the end of the line, or `first`. `kinds`: by stage, what a replica must have merged for
        it; `path`: its stages, where they are not those of every item; `attempts`: which try its first one counts as.
        """
        assert item not in self._items
        self._items[item] = _Item(-1 if first else self._admitted, path or self.stages, kinds or {}, attempts)
        self._admitted += 1
        self._waits(item)

    def finished(self, item: str, seconds: float | None = None, switch_seconds: float = 0.0, nbytes: float = 0) -> bool:
        """The item's call came back well. True when that was its last stage.

        `seconds`: what it took, of which `switch_seconds` for merging, None for a call that is not like others;
        `nbytes`: size of its result.
        """
        state = self._release(item)
        if seconds is not None:
            self._seconds[state.stage].see(max(seconds - switch_seconds, 1e-6))
            self._bytes[state.stage].see(nbytes)
        if switch_seconds:
            self._switch.see(switch_seconds)
        if state.following is None:
            self._forget(item)
            return True
        state.held[state.stage] = nbytes
        self._held += nbytes
        state.at += 1
        if state.following is None:
            # only the stages themselves read the contexts
            self._held -= state.held.pop("text", 0.0)
        self._waits(item)
        return False

    def row_failed(self, item: str) -> RetryDecision:
        """The row itself is at fault: it is given up at once."""
        state = self._release(item)
        self._forget(item)
        return RetryDecision(item, retry=False, attempts=state.attempts)

    def call_failed(self, item: str) -> RetryDecision:
        """The call failed and the replica lives: an attempt is charged."""
        self._release(item)
        return self._failed(item, charged=True)

    def inputs_lost(self, item: str, path: tuple[str, ...] | None = None) -> RetryDecision:
        """Results of earlier stages are gone: the item starts over (on `path`, when its old one leads nowhere), charged
        only when it happens too often."""
        self._release(item)
        return self._starts_over(item, path)

    def keep(self, stage: str) -> list[str]:
        """Have the results of every item that waits for `stage` stored, in place of going on. Returns the items."""
        kept = []
        for line in self._lines[stage].values():
            while line:
                _, kind, _ = line.oldest()
                item = line.pop(kind)
                self._items[item].path, self._items[item].at = ("keep",), 0
                self._waits(item)
                kept.append(item)
        return kept

    # --- what to do ------------------------------------------------------------------------------

    def room(self) -> int:
        """How many more items may be admitted now."""
        if self.draining:
            return 0
        first = self.stages[0]
        return max(0, self.queue_depth * max(1, self._servers[first]) - self.waiting(first))

    def next_dispatch(self) -> Dispatch | None:
        """The next call to make, or None when nothing can or may run now."""
        for stage in reversed(ORDER):
            if self._idle[stage] and (lines := self._open_lines(stage)):
                return self._assign(self._suited(stage, lines), stage, lines)
        for stage in reversed(_MERGED):
            if (lines := self._open_lines(stage)) and (mover := self._mover(stage)) is not None:
                self._move(mover, stage)
                return self._assign(mover, stage, lines, moved=True)
        return None

    def spare(self) -> list[str]:
        """Idle replicas that the items in flight leave without work, when no more are admitted; each role keeps one."""
        spare = []
        serving = Counter(role for replica in self._replicas.values() for role in replica.roles)
        alike = Counter(frozenset(replica.roles) for replica in self._replicas.values())
        ahead = [set(item.path[item.at :]) for item in self._items.values()]
        needed = {roles: sum(1 for stages in ahead if stages & roles) for roles in alike}
        for name, replica in self._replicas.items():
            roles = frozenset(replica.roles)
            if replica.item is None and alike[roles] > needed[roles] and all(serving[role] > 1 for role in roles):
                spare.append(name)
                alike[roles] -= 1
                serving.subtract(roles)
        return spare

    @property
    def busy(self) -> int:
        """Items in the pools, waiting or running."""
        return len(self._items)

    @property
    def running(self) -> dict[str, str]:
        """Items under way, by replica."""
        return {name: r.item for name, r in self._replicas.items() if r.item is not None}

    @property
    def homes(self) -> dict[str, str]:
        """By replica of the diffusion stages, the one that it serves now."""
        return {name: r.home for name, r in self._replicas.items() if r.home is not None}

    def idle_when_drained(self) -> bool:
        """While draining: nothing runs, and nothing more will."""
        return self.draining and not +self._making and not any(self.waiting(stage) for stage in _LAST)

    def waiting(self, stage: str) -> int:
        """Items that wait for `stage`."""
        return sum(len(line) for line in self._lines[stage].values())

    def item_of(self, replica: str) -> str | None:
        """The item that the replica is busy with."""
        return self._replicas[replica].item if replica in self._replicas else None

    def stage_of(self, item: str) -> str:
        """The stage that the item waits for or is in."""
        return self._items[item].stage

    # --- what may run ----------------------------------------------------------------------------

    def _open_lines(self, stage: str) -> list[FairQueue]:
        """Lines before `stage` of which an item may run now."""
        if self.draining and stage not in _LAST:
            return []
        lines = [line for following, line in self._lines[stage].items() if line and self._has_room(following)]
        return lines if lines and self._has_memory(stage) else []

    def _has_room(self, stage: str | None) -> bool:
        """Whether one more item may be made for `stage`."""
        if stage is None or stage in _LAST[1:]:
            return True
        return self.waiting(stage) < self.queue_depth * max(1, self._servers[stage])

    def _has_memory(self, stage: str) -> bool:
        if self.max_bytes == math.inf or stage in _LAST:
            return True
        coming = {s: sum(n for (making, _), n in self._making.items() if making == s) for s in ORDER}
        if not any(coming.values()):
            return True  # over the limit, what is in flight goes on one call at a time
        expected = sum(n * self._bytes[s].value for s, n in coming.items() if s not in _LAST)
        return self._held + expected + self._bytes[stage].value <= self.max_bytes

    # --- who runs it -----------------------------------------------------------------------------

    def _suited(self, stage: str, lines: list[FairQueue]) -> str:
        """The idle replica that has merged what a waiting item needs, else the one that has been idle longest."""
        for name in self._idle[stage]:
            replica = self._replicas[name]
            if replica.phase == stage and any(line.has(replica.kind) for line in lines):
                return name
        return next(iter(self._idle[stage]))

    def _mover(self, stage: str) -> str | None:
        """An idle replica of the other diffusion stage that had better serve `stage`."""
        for home in _MERGED:
            if home != stage and self._worth_moving(home):
                for name in self._idle[home]:
                    if stage in self._replicas[name].roles:
                        return name
        return None

    def _worth_moving(self, home: str) -> bool:
        if not self._idle[home]:
            return False
        if self._wait(home) > 2 * self._switch_seconds():
            return True
        # a short wait each time, but one replica more than its stage needs: the other stage gains by it
        if not all(self._seconds[stage].measured for stage in _MERGED):
            return False
        share = self._seconds[home].value / sum(self._seconds[stage].value for stage in _MERGED)
        return self._mobile[home] - 1 >= share * self._mobile.total()

    def _switch_seconds(self) -> float:
        if self._switch.measured:
            return self._switch.value
        # as a part of a clip: how fast this model and machine are shows before the first switch
        return self._switch.value * sum(self._seconds[s].value for s in _MERGED) / sum(_SECONDS[s] for s in _MERGED)

    def _wait(self, home: str) -> float:
        """Seconds until an idle replica of `home` may expect something to do there."""
        idle, lines = len(self._idle[home]), self._lines[home]
        blocked = [following for following, line in lines.items() if line]
        if blocked:
            # it waits for room in the next queue, which its servers make
            rate = sum(n / self._seconds[s].value for (s, _), n in self._making.items() if s in blocked)
        else:
            rate = sum(n / self._seconds[s].value for (s, after), n in self._making.items() if after == home)
        return idle / rate if rate else math.inf

    def _move(self, name: str, stage: str) -> None:
        replica = self._replicas[name]
        self._works(name)
        self._lives(replica, -1)
        replica.home = stage
        self._lives(replica, 1)

    def _assign(self, name: str, stage: str, lines: list[FairQueue], moved: bool = False) -> Dispatch:
        replica = self._replicas[name]
        same = replica.phase == stage

        def preference(kind: Hashable) -> int:
            if same and kind == replica.kind:
                return 0
            # what another replica has merged is better left to it
            return 2 if self._merged[stage, kind] else 1

        line = min(lines, key=FairQueue.oldest)
        _, kind, passed_over = line.oldest()
        if passed_over < self.patience:
            line = min(lines, key=lambda line: line.best(preference)[:2])
            kind = line.best(preference)[2]
        item = line.pop(kind)
        state = self._items[item]
        self._works(name)
        switched = False
        if stage in _MERGED:
            switched = replica.phase is not None and (replica.phase, replica.kind) != (stage, kind)
            if replica.phase is not None:
                self._merged[replica.phase, replica.kind] -= 1
            self._merged[stage, kind] += 1
            replica.phase, replica.kind = stage, kind
        state.replica, replica.item = name, item
        self._making[stage, state.following] += 1
        return Dispatch(item, stage, name, switched, moved)

    # --- books -----------------------------------------------------------------------------------

    def _lives(self, replica: _Replica, count: int) -> None:
        for stage in replica.serves():
            self._servers[stage] += count
        if replica.mobile:
            self._mobile[replica.home] += count

    def _waits(self, item: str) -> None:
        state = self._items[item]
        line = self._lines[state.stage].setdefault(state.following, FairQueue())
        line.push(item, state.order, state.kinds.get(state.stage))

    def _rests(self, name: str) -> None:
        for stage in self._replicas[name].serves():
            self._idle[stage][name] = None

    def _works(self, name: str) -> None:
        for stage in self._replicas[name].serves():
            self._idle[stage].pop(name, None)

    def _release(self, item: str) -> _Item:
        state = self._items[item]
        assert state.replica is not None, f"{item} is not running"
        self._making[state.stage, state.following] -= 1
        self._replicas[state.replica].item = None
        self._rests(state.replica)
        state.replica = None
        return state

    def _forget(self, item: str) -> None:
        self._held -= sum(self._items.pop(item).held.values())

    def _starts_over(self, item: str, path: tuple[str, ...] | None = None) -> RetryDecision:
        state = self._items[item]
        state.at, state.path = 0, path or state.path
        self._held -= sum(state.held.values())
        state.held.clear()
        state.restarts += 1
        return self._failed(item, charged=state.restarts > self.max_restarts)

    def _failed(self, item: str, charged: bool) -> RetryDecision:
        state = self._items[item]
        if charged and state.attempts >= self.max_attempts:
            self._forget(item)
            return RetryDecision(item, retry=False, attempts=state.attempts)
        if charged:
            state.attempts += 1
        self._waits(item)
        return RetryDecision(item, retry=True, attempts=state.attempts)
