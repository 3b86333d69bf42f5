"""What to do next, as a pure state machine: no Ray, no clock, no randomness.

The policy holds the state of every admitted item and of every replica. It decides what runs where, and which
diffusion stage a replica serves. The loop carries its decisions out and reports what happened.

Downstream stages go first, so that nothing piles up. Within a stage the item that was admitted first goes first,
unless another one needs the weights that the replica has merged: items with the same weights stay together, so that
replicas switch seldom, but no item is passed over more than `max_passed_over` times. No call is made whose result
would wait in a full queue: a queue holds `queue_depth` items for each replica that serves it, and one more for each
replica before it. The results of all items in flight together stay within `max_bytes`.

A replica whose roles are both diffusion stages is assigned to one of them. It moves to the other when it is idle and
waiting for work would take longer than merging there and back, or when its stage has more replicas than its measured
share of the work. A call that is late may hang, and is not waited for. The queues between the stages fill and empty
slowly, so assignments do not flap.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ltx_ray.config import RunLimits
from ltx_ray.driver.call_times import LATE_TIMES, SWITCH_SECONDS, RunningMean, calls_per_second, switch_seconds
from ltx_ray.driver.policy_state import Dispatch, Item, Replica, RetryDecision, best_idle, spare_replicas
from ltx_ray.driver.queue import FairQueue
from ltx_ray.stages import DIFFUSION_STAGES, FULL_PATH, TRAITS, Stage, needed_results

#: Upstream first, and the other way round. Iterating over a tuple is several times faster than over the enum.
_STAGES = tuple(Stage)
_STAGES_FROM_LAST, _DIFFUSION_FROM_LAST = _STAGES[::-1], DIFFUSION_STAGES[::-1]


@dataclass
class Policy:
    """`queue_depth`: items that may wait before a stage, for each of its replicas. `path`: the stages of an item.

    `max_restarts`: how often an item starts over without being charged an attempt. `max_bytes`: bound on the results of
    all items in flight.
    """

    queue_depth: int = RunLimits.queue_depth
    max_attempts: int = RunLimits.max_attempts
    path: tuple[Stage, ...] = FULL_PATH
    max_restarts: int = 10
    max_passed_over: int = 16
    max_bytes: float = math.inf
    draining: bool = False
    #: An item that has all stages to itself, as long as it is in flight.
    alone: str | None = None
    _items: dict[str, Item] = field(default_factory=dict)
    _replicas: dict[str, Replica] = field(default_factory=dict)
    #: Items that wait for a stage, by the stage after it.
    _queues: dict[Stage, defaultdict[Stage | None, FairQueue]] = field(
        default_factory=lambda: {stage: defaultdict(FairQueue) for stage in Stage}
    )
    #: How many items wait in the queues of each stage.
    _queued: dict[Stage, int] = field(default_factory=lambda: dict.fromkeys(Stage, 0))
    #: Items that wait for a replica on another node than this, instead of in a queue.
    _elsewhere: dict[str, str] = field(default_factory=dict)
    #: Idle replicas of each stage that they serve, in the order in which they became idle.
    _idle: dict[Stage, dict[str, None]] = field(default_factory=lambda: {stage: {} for stage in Stage})
    _servers: Counter[Stage] = field(default_factory=Counter)
    #: Movable replicas by the stage that they are assigned to.
    _movable: Counter[Stage] = field(default_factory=Counter)
    #: Calls under way by (stage, the stage after it), and replicas by (merged stage, merged weights).
    _calls: Counter[tuple[Stage, Stage | None]] = field(default_factory=Counter)
    #: Those of the calls that are late.
    _late: Counter[tuple[Stage, Stage | None]] = field(default_factory=Counter)
    _merged: Counter[tuple[Stage, Hashable]] = field(default_factory=Counter)
    _result_bytes: float = 0.0
    _admitted: int = 0
    _seconds: dict[Stage, RunningMean] = field(default_factory=lambda: RunningMean.guesses("seconds"))
    _bytes: dict[Stage, RunningMean] = field(default_factory=lambda: RunningMean.guesses("result_bytes"))
    _switch: RunningMean = field(default_factory=lambda: RunningMean(SWITCH_SECONDS))

    # --- what happened ---------------------------------------------------------------------------

    def add_replica(self, replica: str, roles: Iterable[Stage], calls_at_once: int = 1, node: str = "") -> None:
        """A replica that may serve `roles` is ready, assigned to the first diffusion stage among them."""
        assert replica not in self._replicas
        roles = tuple(roles)
        assigned = next((role for role in roles if role in DIFFUSION_STAGES), None)
        state = Replica(roles, assigned, node, calls_at_once=calls_at_once)
        self._replicas[replica] = state
        self._count_server(state, 1)
        self._mark_idle(replica)

    def has_replica(self, replica: str) -> bool:
        return replica in self._replicas

    def retire(self, replica: str) -> None:
        """A replica gets no new call. It is to be removed once those under way have ended."""
        state = self._replicas[replica]
        self._mark_busy(replica)
        self._count_server(state, -1)
        state.retired = True

    def remove_replica(
        self,
        replica: str,
        charged: Callable[[str], bool] = lambda item: True,
        inputs_lost: bool = False,
        given_back: bool = False,
    ) -> list[RetryDecision]:
        """A replica is gone, and with it its calls.

        Their items are charged an attempt. An item that is not `charged` is so only when it has restarted too often,
        and never when the run has `given_back` the replica. With `inputs_lost` the items start over.
        """
        gone = self._replicas.get(replica)
        if gone is None:
            return []
        items = list(gone.items)
        for item in items:
            self._end_call(item)
        self._mark_busy(replica)
        if not gone.retired:
            self._count_server(gone, -1)
        gone.drop_weights(self._merged)
        del self._replicas[replica]
        return [self._after_loss(item, charged(item), inputs_lost, given_back) for item in items]

    def _after_loss(self, item: str, charged: bool, inputs_lost: bool, given_back: bool) -> RetryDecision:
        if inputs_lost:
            return self._restart(item)
        if given_back:
            return self._retry(item, charged=False)
        if not charged:
            self._items[item].restarts += 1
        return self._retry(item, charged or self._items[item].restarts > self.max_restarts)

    def admit(
        self,
        item: str,
        weights: Mapping[Stage, Hashable] | None = None,
        path: tuple[Stage, ...] | None = None,
        attempts: int = 1,
        first: bool = False,
    ) -> None:
        """Take an item in, behind all others or `first`.

        `weights`: by stage, what a replica must have merged for it. `path`: its stages, if not the run's.
        `attempts`: the number of its first attempt.
        """
        assert item not in self._items
        self._items[item] = Item(-1 if first else self._admitted, path or self.path, weights or {}, attempts)
        self._admitted += 1
        self._enqueue(item)

    def call_finished(
        self, item: str, seconds: float | None = None, switch_seconds: float = 0.0, nbytes: float = 0
    ) -> bool:
        """The item's call succeeded. True when that was its last stage.

        `seconds`: duration of the call, `switch_seconds` of it for merging; None for a call that is not like others.
        `nbytes`: size of its result.
        """
        state = self._end_call(item)
        if seconds is not None:
            self._seconds[state.stage].add(max(seconds - switch_seconds, 1e-6))
            self._bytes[state.stage].add(nbytes)
        if switch_seconds:
            self._switch.add(switch_seconds)
        if state.next_stage is None:
            self._drop(item)
            return True
        state.results[TRAITS[state.stage].result] = nbytes
        self._result_bytes += nbytes
        state.position += 1
        needed = needed_results(state.path[state.position :])
        for stage in [stage for stage in state.results if stage not in needed]:
            self._result_bytes -= state.results.pop(stage)
        self._enqueue(item)
        return False

    def call_is_late(self, item: str) -> None:
        """The item's call takes much longer than expected, and may hang: no replica waits for it."""
        state = self._items.get(item)
        # When its replica was given back, it waits for another call.
        if state is not None and state.replica is not None and not state.late:
            state.late = True
            self._late[state.stage, state.next_stage] += 1

    def late_after(self, stage: Stage) -> float:
        """Seconds after which a call of `stage` is late."""
        return LATE_TIMES * self._seconds[stage].value + 2 * self._switch.value

    def row_failed(self, item: str) -> RetryDecision:
        """The row itself is at fault."""
        state = self._end_call(item)
        self._drop(item)
        return RetryDecision(item, retry=False, attempts=state.attempts)

    def call_failed(self, item: str) -> RetryDecision:
        """The call failed and the replica is alive: an attempt is charged."""
        self._end_call(item)
        return self._retry(item, charged=True)

    def try_elsewhere(self, item: str) -> bool:
        """Have the item's call made again on another node, uncharged. False, and no change, when none serves it."""
        state = self._items[item]
        assert state.replica is not None
        node = self._replicas[state.replica].node
        if not self._served_elsewhere(state.stage, node):
            return False
        self._end_call(item)
        self._elsewhere[item] = node
        return True

    def inputs_lost(self, item: str, path: tuple[Stage, ...] | None = None) -> RetryDecision:
        """The results of earlier stages are gone, and the item starts over.

        It does so on `path`, if its old path can no longer be used. It is charged only when that happens too often.
        """
        self._end_call(item)
        return self._restart(item, path)

    def save_waiting(self, stage: Stage) -> list[str]:
        """Send every item that waits for `stage` to SAVE_LATENTS instead. Returns the items."""
        diverted = []
        for item in [item for item in self._elsewhere if self._items[item].stage == stage]:
            self._enqueue(item)
        for queue in self._queues[stage].values():
            while queue:
                item = self._take(stage, queue, queue.oldest().group)
                self._items[item].path, self._items[item].position = (Stage.SAVE_LATENTS,), 0
                self._enqueue(item)
                diverted.append(item)
        return diverted

    # --- what to do ------------------------------------------------------------------------------

    def capacity(self) -> int:
        """How many more items may be admitted now."""
        if self.draining:
            return 0
        first = self.path[0]
        return max(0, self.queue_depth * max(1, self._servers[first]) - self.queued(first))

    def next_dispatch(self) -> Dispatch | None:
        """The next call to make, or None when no call can or may be made now."""
        if self.alone in self._items:
            return self._dispatch_alone(self._items[self.alone])
        if self._elsewhere and (dispatch := self._dispatch_elsewhere()) is not None:
            return dispatch
        for stage in _STAGES_FROM_LAST:
            if self._queued[stage] and self._idle[stage] and (queues := self._ready_queues(stage)):
                return self._assign(best_idle(self._idle[stage], self._replicas, stage, queues), stage, queues)
        for stage in _DIFFUSION_FROM_LAST:
            replica = self._replica_to_move(stage) if self._queued[stage] else None
            if replica is not None and (queues := self._ready_queues(stage)):
                self._move(replica, stage)
                return self._assign(replica, stage, queues, moved=True)
        return None

    def _dispatch_alone(self, state: Item) -> Dispatch | None:
        """The next call of the item that goes first."""
        stage = state.stage
        if state.replica is None and self._begins(stage):
            queue, weights = self._queues[stage][state.next_stage], state.weights.get(stage)
            if self._idle[stage]:
                return self._run(next(iter(self._idle[stage])), stage, self._take(stage, queue, weights), weights)
            if stage in DIFFUSION_STAGES and (replica := self._replica_to_move(stage)) is not None:
                self._move(replica, stage)
                return self._run(replica, stage, self._take(stage, queue, weights), weights, moved=True)
        return None

    def _dispatch_elsewhere(self) -> Dispatch | None:
        """The next call that is to be made on another node than before."""
        for item, node in list(self._elsewhere.items()):
            state, stage = self._items[item], self._items[item].stage
            if not self._served_elsewhere(stage, node):
                self._enqueue(item)  # All that could serve it there have gone.
                continue
            may_run = self._begins(stage) and self._has_space(state.next_stage) and self._memory_allows(stage)
            for name in [*self._idle[stage], *self.assignments] if may_run else ():
                replica = self._replicas[name]
                if replica.node != node and stage in replica.roles and not replica.items and not replica.retired:
                    del self._elsewhere[item]
                    if moved := stage not in replica.serves():
                        self._move(name, stage)
                    return self._run(name, stage, item, state.weights.get(stage), moved)
        return None

    def _served_elsewhere(self, stage: Stage, node: str) -> bool:
        return any(r.node != node and stage in r.roles and not r.retired for r in self._replicas.values())

    def spare_replicas(self) -> list[str]:
        """Idle replicas for which the items in flight have no work, when no more are admitted."""
        return spare_replicas(self._replicas, self._items.values())

    @property
    def in_flight(self) -> int:
        """Items that wait or run."""
        return len(self._items)

    @property
    def running(self) -> dict[str, str]:
        """By item that is under way, its replica."""
        return {item: name for name, replica in self._replicas.items() for item in replica.items}

    @property
    def assignments(self) -> dict[str, Stage]:
        """By replica of the diffusion stages, the one that it serves now."""
        return {name: r.assigned for name, r in self._replicas.items() if r.assigned is not None}

    def drained(self) -> bool:
        """While draining: whether nothing runs, and nothing more will."""
        if not self.draining or +self._calls:
            return False
        return not any(self.queued(stage) for stage in _STAGES if TRAITS[stage].runs_while_draining)

    def queued(self, stage: Stage) -> int:
        """Items that wait for `stage`."""
        return self._queued[stage]

    def measured_seconds(self, stage: Stage) -> float | None:
        """The running mean of the seconds of a stage's calls, without merging; None before one has succeeded."""
        mean = self._seconds[stage]
        return mean.value if mean.measured else None

    def idleness(self) -> Iterator[tuple[Stage, int, int, str]]:
        """By stage with replicas: (stage, those that serve it now, those of them that are idle, what they wait for).

        They wait for the stage whose queue is full, for "memory", for the last stage before theirs that has items to
        do, or for "rows".
        """
        before = "rows"
        for stage in self.path:
            waiting = [after for after, queue in self._queues[stage].items() if queue]
            full = next((after for after in waiting if not self._has_space(after)), None)
            cause = str(full) if full else "memory" if waiting else before
            if waiting:
                before = str(stage)
            if not (servers := self._servers[stage]):
                continue
            yield stage, servers, sum(not self._replicas[name].items for name in self._idle[stage]), cause

    def items_of(self, replica: str) -> list[str]:
        """The items that the replica is busy with."""
        return list(self._replicas[replica].items) if replica in self._replicas else []

    def stage_of(self, item: str) -> Stage:
        """The stage that the item waits for or is in."""
        return self._items[item].stage

    def remaining_path(self, item: str) -> tuple[Stage, ...]:
        """The stages that the item has yet to pass, the one that it waits for included."""
        state = self._items[item]
        return state.path[state.position :]

    # --- what may run ----------------------------------------------------------------------------

    def _ready_queues(self, stage: Stage) -> list[FairQueue]:
        """The queues before `stage` of which an item may run now."""
        waiting = self._queues[stage].items() if self._begins(stage) else ()
        queues = [queue for after, queue in waiting if queue and self._has_space(after)]
        return queues if queues and self._memory_allows(stage) else []

    def _begins(self, stage: Stage) -> bool:
        """Whether calls of `stage` may begin, which not all do while draining."""
        return not self.draining or TRAITS[stage].runs_while_draining

    def _has_space(self, stage: Stage | None) -> bool:
        """Whether the queue before `stage` may take one more item."""
        if stage is None or stage == Stage.SAVE_LATENTS:
            return True
        return self._queued[stage] < self.queue_depth * max(1, self._servers[stage])

    def _memory_allows(self, stage: Stage) -> bool:
        if self.max_bytes == math.inf or TRAITS[stage].runs_while_draining:
            return True
        running = {s: sum(n for (call, _), n in self._calls.items() if call == s) for s in _STAGES}
        if not any(running.values()):
            return True  # Over the limit, the items in flight go on one call at a time.
        expected = sum(n * self._bytes[s].value for s, n in running.items() if not TRAITS[s].runs_while_draining)
        return self._result_bytes + expected + self._bytes[stage].value <= self.max_bytes

    # --- which replica runs it -------------------------------------------------------------------

    def _replica_to_move(self, stage: Stage) -> str | None:
        """An idle replica of the other diffusion stage that should serve `stage` from now on."""
        for other in DIFFUSION_STAGES:
            if other != stage and self._worth_moving(other):
                for name in self._idle[other]:
                    if stage in self._replicas[name].roles:
                        return name
        return None

    def _worth_moving(self, assigned: Stage) -> bool:
        if not self._idle[assigned]:
            return False
        if self._expected_wait(assigned) > 2 * switch_seconds(self._switch, self._seconds):
            return True
        # Each wait is short, but the stage has one replica more than it needs, and the other stage gains by it.
        if not all(self._seconds[stage].measured for stage in DIFFUSION_STAGES):
            return False
        share = self._seconds[assigned].value / sum(self._seconds[stage].value for stage in DIFFUSION_STAGES)
        return self._movable[assigned] - 1 >= share * self._movable.total()

    def _expected_wait(self, assigned: Stage) -> float:
        """Seconds until an idle replica of `assigned` can expect a call there."""
        idle, queues = len(self._idle[assigned]), self._queues[assigned]
        # With items before it, it waits for space in the next queue, which the servers of that queue make.
        blocked = [after for after, queue in queues.items() if queue]
        calls = self._calls - self._late if any(self._late.values()) else self._calls
        rate = calls_per_second(calls, self._seconds, blocked, assigned)
        return idle / rate if rate else math.inf

    def _move(self, name: str, stage: Stage) -> None:
        replica = self._replicas[name]
        self._mark_busy(name)
        self._count_server(replica, -1)
        replica.assigned = stage
        self._count_server(replica, 1)

    def _assign(self, name: str, stage: Stage, queues: list[FairQueue], moved: bool = False) -> Dispatch:
        queue, weights = self._replicas[name].choose(stage, queues, self._merged, self.max_passed_over)
        return self._run(name, stage, self._take(stage, queue, weights), weights, moved)

    def _run(self, name: str, stage: Stage, item: str, weights: Hashable, moved: bool = False) -> Dispatch:
        """Have a replica take an item that needs these weights."""
        replica, state = self._replicas[name], self._items[item]
        replica.items[item] = None
        if not replica.takes_more:
            self._mark_busy(name)
        switched = TRAITS[stage].merges_weights and replica.merge(stage, weights, self._merged)
        state.replica = name
        self._calls[stage, state.next_stage] += 1
        return Dispatch(item, stage, name, switched, moved)

    # --- bookkeeping -----------------------------------------------------------------------------

    def _count_server(self, replica: Replica, count: int) -> None:
        for stage in replica.serves():
            self._servers[stage] += count
        if replica.serves_both and replica.assigned is not None:
            self._movable[replica.assigned] += count

    def _enqueue(self, item: str) -> None:
        state = self._items[item]
        stage = state.stage
        self._elsewhere.pop(item, None)
        self._queues[stage][state.next_stage].push(item, state.order, state.weights.get(stage))
        self._queued[stage] += 1

    def _take(self, stage: Stage, queue: FairQueue, weights: Hashable) -> str:
        """The oldest item with these weights leaves its queue before `stage`."""
        self._queued[stage] -= 1
        return queue.pop(weights)

    def _mark_idle(self, name: str) -> None:
        for stage in self._replicas[name].serves():
            self._idle[stage][name] = None

    def _mark_busy(self, name: str) -> None:
        for stage in self._replicas[name].serves():
            self._idle[stage].pop(name, None)

    def _end_call(self, item: str) -> Item:
        state = self._items[item]
        assert state.replica is not None, f"{item} is not running"
        self._calls[state.stage, state.next_stage] -= 1
        if state.late:
            state.late = False
            self._late[state.stage, state.next_stage] -= 1
        replica = self._replicas[state.replica]
        del replica.items[item]
        if replica.takes_more:
            self._mark_idle(state.replica)
        state.replica = None
        return state

    def _drop(self, item: str) -> None:
        self._result_bytes -= sum(self._items.pop(item).results.values())

    def _restart(self, item: str, path: tuple[Stage, ...] | None = None) -> RetryDecision:
        state = self._items[item]
        state.position, state.path = 0, path or state.path
        self._result_bytes -= sum(state.results.values())
        state.results.clear()
        state.restarts += 1
        return self._retry(item, charged=state.restarts > self.max_restarts)

    def _retry(self, item: str, charged: bool) -> RetryDecision:
        """Put the item back into its queue, unless it is charged its last attempt."""
        state = self._items[item]
        if charged and state.attempts >= self.max_attempts:
            self._drop(item)
            return RetryDecision(item, retry=False, attempts=state.attempts)
        if charged:
            state.attempts += 1
        self._enqueue(item)
        return RetryDecision(item, retry=True, attempts=state.attempts)
