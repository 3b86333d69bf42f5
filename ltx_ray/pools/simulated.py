"""Replicas in virtual time, for tests and benchmarks of the driver: thousands of them in one process.

Calls take the seconds that `times` returns. Replicas crash, hang, run out of memory or raise the same error on all
ranks, and nodes are lost with everything on them, all drawn from one seed. When a call succeeds, an engine such as
`engine.fake` makes its result in this process; exceptions of the engine are reported as a rank would report them.
"""

from __future__ import annotations

import heapq
import itertools
import random
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ltx_ray.config import PoolSpec
from ltx_ray.pools.card_time import CardTime
from ltx_ray.pools.protocol import (
    OUT_OF_MEMORY,
    CallFinished,
    InputsLost,
    LossCause,
    RankInfo,
    ReplicaEvent,
    ReplicaLost,
    ReplicaStarted,
)
from ltx_ray.records import CallError, CallReport, ErrorKind, RenderError, WorkItem
from ltx_ray.stages import TRAITS, Stage

#: (stage, item, random numbers) -> seconds of a call.
Times = Callable[[Stage, WorkItem, random.Random], float]
#: (stage, item, *results of earlier stages) -> result.
Make = Callable[..., Any]

#: Faults that a rank answers with an exception: its kind and the name of its class.
_ERRORS = {
    "out_of_memory": (ErrorKind.PROCESS, OUT_OF_MEMORY),
    "error": (ErrorKind.UNKNOWN, "RuntimeError"),
    "store": (ErrorKind.INFRASTRUCTURE, "OSError"),
}


@dataclass(frozen=True)
class Faults:
    """Probabilities of each fault, for each call unless said otherwise."""

    crash: float = 0.0
    hang: float = 0.0
    out_of_memory: float = 0.0
    #: The same exception on all ranks; `store` is an OSError as of the output store.
    error: float = 0.0
    store: float = 0.0
    #: For each start.
    no_start: float = 0.0
    #: Mean seconds between losses of a node; 0 loses none.
    node_seconds: float = 0.0


@dataclass(frozen=True)
class _Payload:
    value: Any
    node: int
    #: How often the node had been lost when the result was made.
    life: int


@dataclass
class _Replica:
    spec: PoolSpec
    node: int
    ready: bool = False
    dead: bool = False
    merged_stage: Stage | None = None
    #: Calls under way, by their numbers. An event of another call is ignored.
    calls: dict[int, tuple[Stage, WorkItem]] = field(default_factory=dict)


@dataclass
class SimulatedReplicaSet:
    """`start_seconds`, `switch_seconds` in virtual seconds; `now` is the virtual time."""

    times: Times
    make: Make
    seed: int = 0
    faults: Faults = Faults()
    node_count: int = 8
    start_seconds: float = 40.0
    switch_seconds: float = 1.5
    now: float = 0.0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._events: list[tuple[float, int, Callable[[], list[ReplicaEvent]]]] = []
        self._numbers = itertools.count()
        self._replicas: dict[str, _Replica] = {}
        self._lives = [0] * self.node_count
        self._idle_waits = 0
        #: Nodes on which nothing is placed, unless there is no other.
        self._avoided: frozenset[str] = frozenset()
        self._card_time = CardTime()
        if self.faults.node_seconds:
            self._schedule_node_loss()

    # --- the protocol of a replica set -----------------------------------------------------------

    def start(self, name: str, spec: PoolSpec) -> None:
        replica = self._replicas[name] = _Replica(spec, self._node_for_one())
        fails = self._random.random() < self.faults.no_start
        self._after(self.start_seconds, lambda: self._started(name, replica, fails))

    def _node_for_one(self) -> int:
        free = [node for node in range(self.node_count) if str(node) not in self._avoided]
        return self._random.choice(free or range(self.node_count))

    def submit(self, replica: str, stage: Stage, item: WorkItem, inputs: list[Any], timeout: float) -> None:
        state = self._replicas[replica]
        assert state.ready and len(state.calls) < state.spec.calls_at_once, f"{replica} is busy"
        number = next(self._numbers)
        state.calls[number] = stage, item
        if state.dead:
            self._after(0.0, lambda: self._gone(replica, number, "its node was lost", idle=True))
            return
        if any(self._lives[p.node] != p.life for p in inputs):
            self._after(0.0, lambda: self._inputs_gone(replica, number))
            return
        seconds = self.times(stage, item, self._random)
        switch = self._switch(state, stage)
        fault = self.fault(stage, item)
        if fault is None:
            self._after(seconds + switch, lambda: self._succeeds(replica, number, inputs, seconds, switch))
        elif fault == "hang":
            reason = f"{stage} took longer than {timeout:g} s"
            self._after(timeout, lambda: self._gone(replica, number, reason, by=LossCause.TIMEOUT))
        elif fault == "crash":
            after = seconds * self._random.random()
            self._after(after, lambda: self._gone(replica, number, "rank 0 died"))
        else:
            after = seconds * self._random.random()
            kind, name = _ERRORS[fault]
            error = CallError(kind, name, f"{name} by chance")
            self._after(after, lambda: self._fails(replica, number, seconds, error))

    def _switch(self, replica: _Replica, stage: Stage) -> float:
        """Seconds of the merge that `stage` needs first."""
        if not TRAITS[stage].merges_weights or replica.merged_stage == stage:
            return 0.0
        first = replica.merged_stage is None
        replica.merged_stage = stage
        return 0.0 if first else self.switch_seconds

    def fault(self, stage: Stage, item: WorkItem) -> str | None:
        """The fault of this call by its name in `Faults`, or None."""
        fate = self._random.random()
        for name in ("crash", "hang", *_ERRORS):
            fate -= getattr(self.faults, name)
            if fate < 0:
                return name
        return None

    def wait(self, timeout: float) -> list[ReplicaEvent]:
        if not self._events:
            # A driver that has just begun to drain waits once more.
            self._idle_waits += 1
            assert self._idle_waits < 3, "no event will ever come"
            return []
        self._idle_waits = 0
        self.now, _, happens = heapq.heappop(self._events)
        return happens()

    def placing(self) -> Mapping[str, float]:
        return {}

    def has_place(self, replica: str) -> bool:
        return True

    def leaving(self) -> Collection[str]:
        return ()

    def gpu_seconds(self) -> float:
        return self._card_time.seconds(self.now)

    def gpu_seconds_by_pool(self) -> Mapping[str, float]:
        return self._card_time.by_pool(self.now)

    def nodes(self) -> Mapping[str, int]:
        return {str(number): 0 for number in range(self.node_count)}

    def avoid(self, nodes: Collection[str]) -> None:
        self._avoided = frozenset(nodes)

    def kill(self, replica: str, hold: bool = False) -> None:
        self._remove(replica)

    def release(self, replica: str) -> None:
        raise AssertionError("no place is ever held")

    def share(self, value: bytes) -> Any:
        raise AssertionError("no simulated call of text returns a context")

    def result(self, payload: Any) -> Any:
        return payload.value

    def close(self) -> None:
        for name in list(self._replicas):
            self._remove(name)

    def _remove(self, name: str) -> None:
        del self._replicas[name]
        self._card_time.free(name, self.now)

    @property
    def alive(self) -> int:
        """Replicas that have not been ended."""
        return len(self._replicas)

    # --- what happens ----------------------------------------------------------------------------

    def _after(self, seconds: float, happens: Callable[[], list[ReplicaEvent]]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), happens))

    def _started(self, name: str, replica: _Replica, fails: bool) -> list[ReplicaEvent]:
        if self._replicas.get(name) is not replica:
            return []
        if fails or replica.dead:
            self._remove(name)
            return [ReplicaLost(name, "it did not start", served=False, node_lost=replica.dead)]
        replica.ready = True
        # Each rank has a card of its own.
        cards = range(replica.spec.ranks if replica.spec.gpus_per_rank else 0)
        ranks, spec = [RankInfo(n, node=name, gpus=str(n)) for n in cards], replica.spec
        self._card_time.hold(name, spec.name, spec.gpus_per_rank, ranks, self.now - self.start_seconds)
        return [ReplicaStarted(name, [RankInfo(0, node=str(replica.node))], self.start_seconds)]

    def _in_call(self, name: str, number: int) -> _Replica | None:
        """The replica, if it is still in its call of this number."""
        replica = self._replicas.get(name)
        return replica if replica is not None and number in replica.calls else None

    def _gone(
        self, name: str, number: int, reason: str, idle: bool = False, by: LossCause = LossCause.RANK
    ) -> list[ReplicaEvent]:
        if self._in_call(name, number) is None:
            return []
        self._remove(name)
        return [ReplicaLost(name, reason, served=True, idle=idle, ended_by=by)]

    def _inputs_gone(self, name: str, number: int) -> list[ReplicaEvent]:
        replica = self._in_call(name, number)
        if replica is None:
            return []
        if replica.spec.ranks > 1:
            self._remove(name)
            return [ReplicaLost(name, "rank 0 has no inputs", served=True, inputs_lost=True)]
        _, item = replica.calls.pop(number)
        return [InputsLost(name, item.item_id, "rank 0 has no inputs")]

    def _fails(self, name: str, number: int, seconds: float, error: CallError) -> list[ReplicaEvent]:
        replica = self._in_call(name, number)
        if replica is None:
            return []
        _, item = replica.calls.pop(number)
        return [CallFinished(name, item.item_id, CallReport(seconds, self.now, error=error), None)]

    def _succeeds(self, name: str, number: int, inputs: list[Any], seconds: float, switch: float) -> list[ReplicaEvent]:
        replica = self._in_call(name, number)
        if replica is None:
            return []
        stage, item = replica.calls[number]
        try:
            value = self.make(stage, item, *(p.value for p in inputs))
        except Exception as error:
            return self._fails(name, number, seconds, _call_error(error))
        del replica.calls[number]
        payload = _Payload(value, replica.node, self._lives[replica.node])
        report = CallReport(seconds + switch, self.now - seconds - switch, switch, int(switch > 0), nbytes=1)
        return [CallFinished(name, item.item_id, report, payload)]

    def _schedule_node_loss(self) -> None:
        self._after(self._random.expovariate(1 / self.faults.node_seconds), self._node_lost)

    def _node_lost(self) -> list[ReplicaEvent]:
        """A node is lost with its replicas and all results on it, and comes back at once, empty."""
        node = self._random.randrange(self.node_count)
        self._lives[node] += 1
        events: list[ReplicaEvent] = []
        for name, replica in list(self._replicas.items()):
            if replica.node != node:
                continue
            replica.dead = True
            if replica.calls:
                self._remove(name)
                events.append(ReplicaLost(name, "its node was lost", served=True, node_lost=True))
        self._schedule_node_loss()
        return events


def _call_error(error: Exception) -> CallError:
    """What a rank's report says of an exception."""
    unexpected = ErrorKind.INFRASTRUCTURE if isinstance(error, OSError) else ErrorKind.UNKNOWN
    kind = error.kind if isinstance(error, RenderError) else unexpected
    return CallError(kind, type(error).__name__, str(error), "".join(traceback.format_exception(error)))
