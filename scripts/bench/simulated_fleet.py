"""Replicas on a fleet of nodes in virtual time, for scripts/bench_fleet.py.

Nodes have CPUs and cards. A replica takes its parts of cards and its CPUs, as Ray would place it, and waits when there
is no place. Time passes for a call as fast as its node allows: x264 shares the CPUs that are left, decoding takes GPU
time from the rank on the same card. Nothing here decides what a run does: that is the driver's.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ltx_ray.config import ENCODER_THREADS, PoolSpec
from ltx_ray.pools.load_limit import LoadLimit
from ltx_ray.pools.protocol import CallFinished, InputsLost, RankInfo, ReplicaEvent, ReplicaLost, ReplicaStarted
from ltx_ray.records import CallReport, Clip, WorkItem
from ltx_ray.stages import TRAITS, Stage

#: GPU seconds of a decode on one card, the rest of whose call is x264 and the upload.
GPU_SECONDS_OF_DECODE = 1.8
#: Seconds until a replica that was asked for has its place, and of a merge that a replica needs for another stage.
_PLACING_SECONDS, _SWITCH_SECONDS = 0.2, 1.5
#: Seconds of each stage of the preflight clip.
_PREFLIGHT_SECONDS = 2.0
#: Memory of a card and of a replica on it, in GiB.
_CARD_GIB, _TEXT_GIB, _DECODE_GIB, _RANK_GIB = 80.0, 27.0, 10.0, 40.0
_CLIP = Clip("clips/00/0.mp4", "0" * 64, "0" * 64, (), "stage_1")


@dataclass(frozen=True)
class Fleet:
    """The nodes of a simulated cluster, and what goes wrong with them. Times in seconds."""

    gpus: int
    gpus_per_node: int = 8
    cpus_per_gpu: float = 8.0
    bad_cards: int = 0
    node_losses_per_hour: float = 0.0
    start_seconds: float = 30.0
    away_seconds: float = 60.0

    def node_gpus(self) -> list[int]:
        """Cards of each node. The last node may have fewer."""
        whole, rest = divmod(self.gpus, self.gpus_per_node)
        return [self.gpus_per_node] * whole + ([rest] if rest else [])


@dataclass
class _Card:
    bad: bool = False
    free: float = 1.0
    gib: float = 0.0
    #: Names of replicas on it.
    replicas: set[str] = field(default_factory=set)


@dataclass
class _Node:
    number: int
    cpus: float
    cards: list[_Card]
    free_cpus: float
    #: How often it has been lost, and until when it is away.
    life: int = 0
    away_until: float = 0.0
    calls: dict[int, _Call] = field(default_factory=dict)
    #: Up to when its calls have advanced, and the number of its newest schedule.
    advanced: float = 0.0
    schedule: int = 0


@dataclass
class _Call:
    """`left`: seconds that it would still take alone; `speed`: of virtual time."""

    replica: str
    stage: Stage
    item: WorkItem
    left: float
    began: float
    seconds: float
    switch: float
    speed: float = 1.0


@dataclass
class _Replica:
    name: str
    spec: PoolSpec
    asked: float
    node: _Node | None = None
    life: int = 0
    cards: list[int] = field(default_factory=list)
    loading: bool = False
    ready: bool = False
    merged: Stage | None = None

    @property
    def gib(self) -> float:
        if Stage.TEXT in self.spec.roles:
            return _TEXT_GIB
        return _DECODE_GIB if Stage.DECODE in self.spec.roles else _RANK_GIB


@dataclass(frozen=True)
class _Payload:
    node: _Node
    life: int


class SimulatedFleet:
    """The replica set of a driver on a `fleet`. `seconds` by stage: those of a call that has its node to itself."""

    def __init__(self, fleet: Fleet, seconds: Mapping[Stage, float], seed: int = 0):
        self.fleet, self._seconds, self.now = fleet, seconds, 0.0
        self._random = random.Random(seed)
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[], list[ReplicaEvent]]]] = []
        self._replicas: dict[str, _Replica] = {}
        self._held: dict[str, _Replica] = {}
        #: By such a replica, what is reserved of the rest of its card.
        self._reserved: dict[str, list[_Replica]] = {}
        #: Those without a place, in the order in which they were asked for.
        self._unplaced: dict[str, _Replica] = {}
        self._waiting: list[_Replica] = []
        self._load_limit = LoadLimit()
        #: Nodes on which nothing is placed.
        self._avoided: frozenset[str] = frozenset()
        cards = iter(self._bad_cards())
        self.machines = [
            _Node(number, count * fleet.cpus_per_gpu, [_Card(next(cards)) for _ in range(count)], 0.0)
            for number, count in enumerate(fleet.node_gpus())
        ]
        for node in self.machines:
            node.free_cpus = node.cpus
        #: When the first call of stage 1 of a row began, and when the last clip was made.
        self.first_call, self.last_clip = math.inf, 0.0
        if fleet.node_losses_per_hour:
            self._schedule_loss()

    def _bad_cards(self) -> list[bool]:
        bad = set(self._random.sample(range(self.fleet.gpus), self.fleet.bad_cards))
        return [number in bad for number in range(self.fleet.gpus)]

    # --- the protocol of a replica set -----------------------------------------------------------

    def start(self, name: str, spec: PoolSpec) -> None:
        self._replicas[name] = self._unplaced[name] = _Replica(name, spec, self.now)
        self._after(_PLACING_SECONDS, self._place)

    def submit(self, replica: str, stage: Stage, item: WorkItem, inputs: list[Any], timeout: float) -> None:
        state = self._replicas[replica]
        node = state.node
        assert state.ready and node is not None
        if state.life != node.life:
            self._after(0.0, lambda: self._gone(replica, "its node was lost"))
            return
        if any(made.node.life != made.life for made in inputs):
            self._after(0.0, lambda: self._inputs_gone(replica, item))
            return
        if stage == Stage.STAGE1 and not item.preflight:
            self.first_call = min(self.first_call, self.now)
        switch = _SWITCH_SECONDS if TRAITS[stage].merges_weights and state.merged not in (None, stage) else 0.0
        if TRAITS[stage].merges_weights:
            state.merged = stage
        seconds = _PREFLIGHT_SECONDS if item.preflight else self._seconds[stage] * self._random.uniform(0.95, 1.05)
        self._advance(node)
        node.calls[next(self._numbers)] = _Call(replica, stage, item, seconds + switch, self.now, seconds, switch)
        self._reschedule(node)

    def wait(self, timeout: float) -> list[ReplicaEvent]:
        until = self.now + timeout
        while self._events and self._events[0][0] <= until:
            self.now, _, happens = heapq.heappop(self._events)
            if events := happens():
                return events
        self.now = until
        return []

    def placing(self) -> Mapping[str, float]:
        return {name: self.now - replica.asked for name, replica in self._unplaced.items()}

    def has_place(self, replica: str) -> bool:
        return replica not in self._unplaced

    def leaving(self) -> Collection[str]:
        return ()  # Nodes are lost without a notice.

    def gpu_seconds(self) -> float:
        return 0.0  # No run here has a limit on them.

    def gpu_seconds_by_pool(self) -> Mapping[str, float]:
        return {}

    def nodes(self) -> Mapping[str, int]:
        return {str(node.number): len(node.cards) for node in self.machines if node.away_until <= self.now}

    def avoid(self, nodes: Collection[str]) -> None:
        self._avoided = frozenset(nodes)
        self._after(_PLACING_SECONDS, self._place)

    def kill(self, replica: str, hold: bool = False) -> None:
        self._end(self._replicas[replica], hold)

    def release(self, replica: str) -> None:
        for held in [self._held.pop(replica), *self._reserved.pop(replica, [])]:
            self._free(held)

    def share(self, value: bytes) -> Any:
        raise AssertionError("no simulated call of text returns a context")

    def result(self, payload: Any) -> Any:
        return _CLIP

    def close(self) -> None:
        for replica in list(self._replicas.values()):
            self._end(replica)

    # --- places ----------------------------------------------------------------------------------

    def _place(self) -> list[ReplicaEvent]:
        """Give places to replicas that wait for one, in their order."""
        full: set[tuple[float, float, int]] = set()
        for name, replica in list(self._unplaced.items()):
            spec = replica.spec
            shape = (spec.gpus_per_rank, spec.cpus_per_rank, spec.ranks)
            if shape in full:
                continue
            while (node := self._best_node(spec)) is not None:
                self._take(replica, node)
                if (held := self._held_on(replica)) is None:
                    break
                # Nothing loads on a card that has failed: the place stays reserved, and the replica looks on.
                self._reserved.setdefault(held, []).append(replace(replica))
            if node is None:
                replica.node = None
                full.add(shape)
                continue
            del self._unplaced[name]
            self._waiting.append(replica)
        return self._load()

    def _take(self, replica: _Replica, node: _Node) -> None:
        spec = replica.spec
        replica.node, replica.life = node, node.life
        replica.cards = self._cards_for(node, spec)
        node.free_cpus -= spec.cpus_per_rank * spec.ranks
        for number in replica.cards:
            card = node.cards[number]
            card.free = round(card.free - spec.gpus_per_rank, 6)
            card.gib += replica.gib
            card.replicas.add(replica.name)

    def _held_on(self, replica: _Replica) -> str | None:
        """The dead replica that holds the card on which this one has its place."""
        found = (name for name, held in self._held.items() if (held.node, held.cards) == (replica.node, replica.cards))
        return next(found, None) if replica.spec.gpus_per_rank else None

    def _best_node(self, spec: PoolSpec) -> _Node | None:
        """As Ray packs a placement group: of the nodes on which it fits, the one of which the largest part is free.

        What fills cards goes to a node with a card that has been begun, as the product asks Ray for.
        """
        best, best_score = None, -1.0
        cpus, gpus = spec.cpus_per_rank * spec.ranks, spec.gpus_per_rank * spec.ranks
        for node in self.machines:
            if node.away_until > self.now or node.free_cpus < cpus or str(node.number) in self._avoided:
                continue
            free = sum(card.free for card in node.cards)
            if gpus > free + 1e-6 or len(self._cards_for(node, spec)) < spec.ranks:
                continue
            begun = spec.fills_cards and any(spec.gpus_per_rank <= card.free + 1e-6 < 1 for card in node.cards)
            score = 2.0 * begun + (node.free_cpus - cpus) / max(node.free_cpus, 1e-9) + (free - gpus) / max(free, 1e-9)
            if score > best_score:
                best, best_score = node, score
        return best

    def _cards_for(self, node: _Node, spec: PoolSpec) -> list[int]:
        """The fullest cards that have room, a different one for each rank that takes more than half of one."""
        order = sorted(range(len(node.cards)), key=lambda number: node.cards[number].free)
        return [number for number in order if node.cards[number].free + 1e-6 >= spec.gpus_per_rank][: spec.ranks]

    def _free(self, replica: _Replica) -> None:
        """Give the place of a replica back."""
        node, spec = replica.node, replica.spec
        if node is not None and replica.life == node.life:
            node.free_cpus += spec.cpus_per_rank * spec.ranks
            for number in replica.cards:
                card = node.cards[number]
                card.free = round(card.free + spec.gpus_per_rank, 6)
                card.gib -= replica.gib
                card.replicas.discard(replica.name)
        replica.node = None
        if self._unplaced:
            self._after(_PLACING_SECONDS, self._place)

    def _end(self, replica: _Replica, hold: bool = False) -> None:
        """A replica is no more, and its calls neither."""
        del self._replicas[replica.name]
        self._unplaced.pop(replica.name, None)
        if replica in self._waiting:
            self._waiting.remove(replica)
        if replica.loading:
            self._load_limit.end(replica.spec.name, None)
        if (node := replica.node) is not None:
            self._advance(node)
            node.calls = {number: call for number, call in node.calls.items() if call.replica != replica.name}
            self._reschedule(node)
        if hold:
            self._held[replica.name] = replica
        else:
            self._free(replica)

    # --- starts ----------------------------------------------------------------------------------

    def _load(self) -> list[ReplicaEvent]:
        while self._waiting and self._load_limit.open:
            replica = self._waiting.pop(0)
            replica.loading = True
            self._load_limit.begin()
            self._after(self.fleet.start_seconds, lambda replica=replica: self._loaded(replica))  # type: ignore[misc]
        return []

    def _loaded(self, replica: _Replica) -> list[ReplicaEvent]:
        if self._replicas.get(replica.name) is not replica:
            return []
        node = replica.node
        assert node is not None
        cards = [node.cards[number] for number in replica.cards]
        ranks = [RankInfo(n, node=str(node.number), gpus=str(card)) for n, card in enumerate(replica.cards)]
        if replica.life != node.life:
            self._end(replica)
            return [ReplicaLost(replica.name, "its node was lost", served=False, node_lost=True)]
        if any(card.bad for card in cards) or any(card.gib > _CARD_GIB for card in cards):
            self._end(replica, hold=True)
            reason = "out of memory" if not any(card.bad for card in cards) else "the GPU has fallen off the bus"
            self._load()
            return [ReplicaLost(replica.name, reason, served=False, ranks=ranks, held=True)]
        replica.ready, replica.loading = True, False
        self._load_limit.end(replica.spec.name, self.fleet.start_seconds)
        self._load()
        return [ReplicaStarted(replica.name, ranks, self.now - replica.asked)]

    # --- calls -----------------------------------------------------------------------------------

    def _advance(self, node: _Node) -> None:
        """Let the calls of a node come as far as they have by now."""
        for call in node.calls.values():
            call.left -= (self.now - node.advanced) * call.speed
        node.advanced = self.now

    def _reschedule(self, node: _Node) -> None:
        """Find the speeds of a node's calls, and when the next one ends."""
        self._set_speeds(node)
        node.schedule += 1
        schedule = node.schedule
        ends = min((call.left / call.speed for call in node.calls.values() if call.speed > 0), default=None)
        if ends is not None:
            self._after(max(ends, 0.0), lambda: self._calls_end(node, schedule))

    def _set_speeds(self, node: _Node) -> None:
        decodes = [call for call in node.calls.values() if call.stage == Stage.DECODE]
        if not decodes:
            for call in node.calls.values():
                call.speed = 1.0
            return
        # Ranks and text have their CPU each. x264 has what is left.
        others = sum(
            self._replicas[call.replica].spec.ranks for call in node.calls.values() if call.stage != Stage.DECODE
        )
        cpus = max(node.cpus - others, 1.0)
        encoding = min(1.0, cpus / (ENCODER_THREADS * len(decodes)))
        taken: dict[int, float] = {}
        for call in decodes:
            [card] = self._replicas[call.replica].cards or [-1]
            taken[card] = taken.get(card, 0.0) + min(1.0, GPU_SECONDS_OF_DECODE / call.seconds)
        for call in decodes:
            [card] = self._replicas[call.replica].cards or [-1]
            call.speed = min(encoding, 1.0 / taken[card])
        slowed = {card: max(0.0, 1.0 - min(1.0, part * encoding)) for card, part in taken.items()}
        for call in node.calls.values():
            if call.stage != Stage.DECODE:
                cards = self._replicas[call.replica].cards
                call.speed = min((slowed.get(card, 1.0) for card in cards), default=1.0)

    def _calls_end(self, node: _Node, schedule: int) -> list[ReplicaEvent]:
        if schedule != node.schedule:
            return []
        self._advance(node)
        ended = {number: call for number, call in node.calls.items() if call.left <= 1e-6}
        node.calls = {number: call for number, call in node.calls.items() if number not in ended}
        self._reschedule(node)
        return [self._ended(node, call) for call in ended.values()]

    def _ended(self, node: _Node, call: _Call) -> ReplicaEvent:
        if call.stage == Stage.DECODE and not call.item.preflight:
            self.last_clip = self.now
        report = CallReport(self.now - call.began, call.began, call.switch, int(call.switch > 0), nbytes=1)
        return CallFinished(call.replica, call.item.item_id, report, _Payload(node, node.life))

    def _gone(self, name: str, reason: str) -> list[ReplicaEvent]:
        if (replica := self._replicas.get(name)) is None:
            return []
        self._end(replica)
        return [ReplicaLost(name, reason, served=True, idle=True, node_lost=True)]

    def _inputs_gone(self, name: str, item: WorkItem) -> list[ReplicaEvent]:
        return [InputsLost(name, item.item_id, "no inputs")] if name in self._replicas else []

    # --- lost nodes ------------------------------------------------------------------------------

    def _schedule_loss(self) -> None:
        self._after(self._random.expovariate(self.fleet.node_losses_per_hour / 3600), self._node_lost)

    def _node_lost(self) -> list[ReplicaEvent]:
        """A node is lost with its replicas and all results on it. It comes back empty."""
        self._schedule_loss()
        node = self._random.choice(self.machines)
        if node.away_until > self.now:
            return []
        node.life, node.away_until = node.life + 1, self.now + self.fleet.away_seconds
        node.calls, node.free_cpus = {}, node.cpus
        for card in node.cards:
            card.free, card.gib, card.replicas = 1.0, 0.0, set()
        self._reschedule(node)
        self._after(self.fleet.away_seconds + _PLACING_SECONDS, self._place)
        events: list[ReplicaEvent] = []
        for replica in [replica for replica in self._replicas.values() if replica.node is node]:
            served = replica.ready
            self._end(replica)
            events.append(ReplicaLost(replica.name, "its node was lost", served, node_lost=True))
        for name in [name for name, replica in self._held.items() if replica.node is node]:
            self._held[name].node = None  # `release` has nothing to give back any more.
        return events

    def _after(self, seconds: float, happens: Callable[[], list[ReplicaEvent]]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), happens))
