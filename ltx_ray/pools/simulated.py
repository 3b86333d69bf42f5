"""A crew in virtual time, for tests and benchmarks of the driver: thousands of replicas in one process.

Calls take the seconds that `times` says; replicas crash, hang, run out of memory or fail alike on all
ranks, nodes vanish with everything on them, all drawn from one seed. Results are made by an engine such as
`engine.fake`, in this process, when a call has gone well; what they raise is reported as a rank would.
"""

from __future__ import annotations

import heapq
import itertools
import random
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ltx_ray.config import PoolSpec
from ltx_ray.pools.protocol import CallFinished, InputsLost, ReplicaEvent, ReplicaLost, ReplicaStarted
from ltx_ray.records import CallReport, RowError, WorkItem

#: (stage, item, dice) -> seconds of a call.
Times = Callable[[str, WorkItem, random.Random], float]
#: (stage, item, *results of earlier stages) -> result.
Make = Callable[..., Any]

#: Faults that are answered with an exception, and its type.
_ERRORS = {"out_of_memory": "OutOfMemoryError", "error": "RuntimeError", "store": "OSError"}


@dataclass(frozen=True)
class Faults:
    """Chances of each fault, of a call unless said otherwise."""

    crash: float = 0.0
    hang: float = 0.0
    out_of_memory: float = 0.0
    #: An exception that is alike on all ranks; `store` is the output store's.
    error: float = 0.0
    store: float = 0.0
    #: Of a start.
    no_start: float = 0.0
    #: Mean seconds between losses of a node; 0: none is lost.
    node_seconds: float = 0.0


@dataclass(frozen=True)
class _Payload:
    value: Any
    node: int
    #: Which life of the node it was made in.
    life: int


@dataclass
class _Replica:
    spec: PoolSpec
    node: int
    ready: bool = False
    dead: bool = False
    call: tuple[str, WorkItem, list[Any]] | None = None
    #: What it has merged, and how many calls it has had: an event of an older one means nothing.
    phase: str | None = None
    calls: int = 0


@dataclass
class SimulatedReplicaSet:
    """`start_seconds`, `switch_seconds`, `call_timeout`, `node_down_seconds` in virtual seconds; `now` is the time."""

    times: Times
    make: Make
    seed: int = 0
    faults: Faults = Faults()
    nodes: int = 8
    start_seconds: float = 40.0
    switch_seconds: float = 1.5
    call_timeout: float = 7200.0
    now: float = 0.0

    def __post_init__(self) -> None:
        self._dice = random.Random(self.seed)
        self._events: list[tuple[float, int, Callable[[], list[ReplicaEvent]]]] = []
        self._numbers = itertools.count()
        self._replicas: dict[str, _Replica] = {}
        self._lives = [0] * self.nodes
        self._silent = 0
        if self.faults.node_seconds:
            self._plan_node_loss()

    # --- the crew's protocol ---------------------------------------------------------------------

    def start(self, name: str, spec: PoolSpec) -> None:
        replica = self._replicas[name] = _Replica(spec, self._dice.randrange(self.nodes))
        fails = self._dice.random() < self.faults.no_start
        self._after(self.start_seconds, lambda: self._started(name, replica, fails))

    def submit(self, replica: str, stage: str, item: WorkItem, inputs: list[Any]) -> None:
        state = self._replicas[replica]
        assert state.ready and state.call is None, f"{replica} is busy"
        state.call = stage, item, inputs
        state.calls += 1
        number = state.calls
        if state.dead:
            self._after(0.0, lambda: self._gone(replica, number, "its node was lost", idle=True))
            return
        if any(self._lives[p.node] != p.life for p in inputs):
            self._after(0.0, lambda: self._no_inputs(replica, number))
            return
        seconds = self.times(stage, item, self._dice)
        switch = 0.0
        if stage in ("stage1", "stage2") and state.phase != stage:
            switch = self.switch_seconds if state.phase is not None else 0.0
            state.phase = stage
        fault = self.fault(stage, item)
        if fault == "hang":
            reason = f"{stage} took longer than {self.call_timeout:g} s"
            self._after(self.call_timeout, lambda: self._gone(replica, number, reason))
            return
        if fault is not None:
            after = seconds * self._dice.random()
            error = _ERRORS.get(fault)
            if error is None:
                self._after(after, lambda: self._gone(replica, number, "rank 0 died"))
            else:
                by_chance = {
                    "error_type": error, "message": f"{error} by chance", "infrastructure": error != "RuntimeError",
                }  # fmt: skip
                self._after(after, lambda: self._fails(replica, number, seconds, by_chance))
            return
        self._after(seconds + switch, lambda: self._answers(replica, number, seconds, switch))

    def fault(self, stage: str, item: WorkItem) -> str | None:
        """Which of the faults of a call befalls this one, by its name in `Faults`."""
        fate = self._dice.random()
        for name in ("crash", "hang", *_ERRORS):
            fate -= getattr(self.faults, name)
            if fate < 0:
                return name
        return None

    def wait(self, timeout: float) -> list[ReplicaEvent]:
        if not self._events:
            # a driver that has just begun to drain looks once more
            self._silent += 1
            assert self._silent < 3, "nothing will ever happen again"
            return []
        self._silent = 0
        self.now, _, happens = heapq.heappop(self._events)
        return happens()

    def placing(self) -> Mapping[str, float]:
        return {}

    def kill(self, replica: str) -> None:
        del self._replicas[replica]

    def result(self, payload: Any) -> Any:
        return payload.value

    def close(self) -> None:
        self._replicas.clear()

    @property
    def alive(self) -> int:
        """Replicas that nobody has ended."""
        return len(self._replicas)

    # --- what happens ----------------------------------------------------------------------------

    def _after(self, seconds: float, happens: Callable[[], list[ReplicaEvent]]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), happens))

    def _started(self, name: str, replica: _Replica, fails: bool) -> list[ReplicaEvent]:
        if self._replicas.get(name) is not replica:
            return []
        if fails or replica.dead:
            del self._replicas[name]
            return [ReplicaLost(name, "it did not start", served=False)]
        replica.ready = True
        return [ReplicaStarted(name, [{"rank": 0, "node": replica.node, "device_name": ""}], self.start_seconds)]

    def _current(self, name: str, number: int) -> _Replica | None:
        """The replica, if it is still in its call of this number."""
        replica = self._replicas.get(name)
        return replica if replica is not None and replica.call is not None and replica.calls == number else None

    def _gone(self, name: str, number: int, reason: str, idle: bool = False) -> list[ReplicaEvent]:
        if self._current(name, number) is None:
            return []
        del self._replicas[name]
        return [ReplicaLost(name, reason, served=True, idle=idle)]

    def _no_inputs(self, name: str, number: int) -> list[ReplicaEvent]:
        replica = self._current(name, number)
        if replica is None:
            return []
        if replica.spec.ranks > 1:
            del self._replicas[name]
            return [ReplicaLost(name, "rank 0 has no inputs", served=True, inputs_lost=True)]
        replica.call = None
        return [InputsLost(name, "rank 0 has no inputs")]

    def _fails(self, name: str, number: int, seconds: float, failure: Mapping[str, Any]) -> list[ReplicaEvent]:
        replica = self._current(name, number)
        if replica is None:
            return []
        replica.call = None
        return [CallFinished(name, CallReport(False, seconds, self.now, **{"traceback": "", **failure}), None)]

    def _answers(self, name: str, number: int, seconds: float, switch: float) -> list[ReplicaEvent]:
        replica = self._current(name, number)
        if replica is None:
            return []
        stage, item, inputs = replica.call
        try:
            value = self.make(stage, item, *(p.value for p in inputs))
        except Exception as error:
            return self._fails(name, number, seconds, _told(error))
        replica.call = None
        payload = _Payload(value, replica.node, self._lives[replica.node])
        report = CallReport(True, seconds + switch, self.now - seconds - switch, switch, int(switch > 0), nbytes=1)
        return [CallFinished(name, report, payload)]

    def _plan_node_loss(self) -> None:
        self._after(self._dice.expovariate(1 / self.faults.node_seconds), self._node_lost)

    def _node_lost(self) -> list[ReplicaEvent]:
        """A node goes with its replicas and all results on it, and is back at once, empty."""
        node = self._dice.randrange(self.nodes)
        self._lives[node] += 1
        events: list[ReplicaEvent] = []
        for name, replica in list(self._replicas.items()):
            if replica.node != node:
                continue
            replica.dead = True
            if replica.call is not None:
                del self._replicas[name]
                events.append(ReplicaLost(name, "its node was lost", served=True))
        self._plan_node_loss()
        return events


def _told(error: Exception) -> dict[str, Any]:
    """What a rank's report says of an exception."""
    return {
        "error_type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
        "row_error": isinstance(error, RowError),
        "infrastructure": isinstance(error, OSError),
    }
