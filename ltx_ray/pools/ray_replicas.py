"""The gangs of a run on a Ray cluster: the only place that waits on Ray.

Large results (contexts, latents) stay in the object store. Their references are passed on, and only the small
reports are read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from ltx_ray.config import PoolSpec
from ltx_ray.pools.card_time import CardTime
from ltx_ray.pools.gang import Call, Gang, GangLost, GangState, InputsMissing
from ltx_ray.pools.load_limit import LoadLimit
from ltx_ray.pools.load_progress import LoadProgress
from ltx_ray.pools.protocol import CallFinished, InputsLost, ReplicaEvent, ReplicaLost, ReplicaStarted
from ltx_ray.pools.shared_cards import SharedCards
from ltx_ray.records import WorkItem
from ltx_ray.stages import Stage

#: Seconds between two looks at which nodes drain.
_DRAIN_PERIOD = 2.0


class RayReplicaSet:
    """Gangs on a Ray cluster.

    `start_timeout`: seconds that a gang may take to be ready, from when it may load or from the last bytes of the
    model that came. `load_concurrency`: gangs that load at once; None for as many as do not slow each other down.
    `left_alone`: nodes of others. `foreign`: those that have joined since and are to be left alone as well, for the
    nodes where replicas are ready.
    """

    def __init__(
        self,
        start_timeout: float,
        left_alone: Collection[str] = (),
        load_concurrency: int | None = None,
        foreign: Callable[[Collection[str]], Collection[str]] = lambda serving: (),
    ):
        self._start_timeout, self._left_alone, self._foreign = start_timeout, frozenset(left_alone), foreign
        self._load_progress = LoadProgress(start_timeout)
        self._shared_cards = SharedCards()
        self._card_time = CardTime()
        #: Ids of the nodes that drain, and when that was asked for last.
        self._draining: frozenset[str] = frozenset()
        self._looked_for_drains = 0.0
        self._gangs: dict[str, Gang] = {}
        #: Dead ones whose places are held.
        self._held: dict[str, Gang] = {}
        #: By such a gang, what is reserved of the rest of its card.
        self._reserved: dict[str, list[PlacementGroup]] = {}
        self._load_limit = LoadLimit(load_concurrency)
        #: Nodes that are excluded, and all on which no gang is placed.
        self._excluded: frozenset[str] = frozenset()
        self._avoided = self._left_alone
        #: Nodes of which it is known whether they are to be left alone.
        self._judged: set[str] = set()

    def start(self, name: str, spec: PoolSpec) -> None:
        self._gangs[name] = Gang(name, spec, None if spec.fills_cards else self._avoided)

    def avoid(self, nodes: Collection[str]) -> None:
        self._excluded = frozenset(nodes)
        self._avoided = self._left_alone | self._excluded
        for gang in self._gangs.values():
            gang.avoid(self._avoided)

    def submit(self, replica: str, stage: Stage, item: WorkItem, inputs: list[Any], timeout: float) -> None:
        self._gangs[replica].submit(stage, item, inputs, timeout)

    def wait(self, timeout: float) -> list[ReplicaEvent]:
        now = time.time()
        self._shared_cards.ask(self._gangs.values(), self._held.values(), self._avoided, now)
        for gang in self._gangs.values():
            gang.probe(now)
            if gang.state is GangState.WAITING and self._load_limit.open:
                self._load_limit.begin()
                gang.load()
        waiting = {ref: gang for gang in self._gangs.values() for ref in gang.waits_for()}
        if not waiting:
            time.sleep(timeout)
            return []
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=timeout)
        if ready:
            # The first reference ends the wait; the second call collects all others that are ready by now.
            ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        arrived = set(ready)
        events: list[ReplicaEvent] = []
        for gang in {id(waiting[ref]): waiting[ref] for ref in ready}.values():
            events += self._advance(gang, arrived)
        now = time.time()
        self._load_progress.look(self._gangs.values(), now)
        for gang in list(self._gangs.values()):
            if (lost := gang.overdue(now, self._start_timeout)) is not None:
                events.append(self._lose(gang, lost))
        return events

    def _advance(self, gang: Gang, arrived: set[ray.ObjectRef]) -> list[ReplicaEvent]:
        """Take a gang on by the references that have arrived."""
        events: list[ReplicaEvent] = []
        try:
            if gang.state is not GangState.READY:
                if not gang.advance(arrived):
                    leaves = gang.state is GangState.WAITING and (self._leaves_foreign(gang) or self._leaves_held(gang))
                    if gang.state is GangState.WAITING and not leaves:
                        pool = gang.pool
                        self._card_time.hold(gang.name, pool.name, pool.gpus_per_rank, gang.ranks, time.time())
                    return []
                self._load_limit.end(gang.pool.name, time.time() - gang.load_began)
                return [ReplicaStarted(gang.name, gang.ranks, time.time() - gang.created, gang.evidence)]
            gang.pinged(arrived)
            for call in [call for call in gang.calls if call.reports]:
                events += self._collect(gang, call, arrived)
        except GangLost as lost:
            events.append(self._lose(gang, lost))
        return events

    def _leaves_foreign(self, gang: Gang) -> bool:
        """Have a gang that has a place look for another one, if its node is to be left alone."""
        node = gang.ranks[0].node
        if node not in self._judged:
            ready = [each for each in self._gangs.values() if each.state is GangState.READY]
            serving = {rank.node for each in ready for rank in each.ranks}
            if serving:
                self._judged.add(node)
            found = self._left_alone.union(self._foreign(serving))
            if found != self._left_alone:
                self._left_alone = found
                self.avoid(self._excluded)
        if node not in self._left_alone:
            return False
        gang.place_again(self._avoided)
        return True

    def _leaves_held(self, gang: Gang) -> bool:
        """Have a gang that has got a part of a card that has failed look for another place.

        The card of a gang with several ranks is held whole. That of a part is taken by others, each of which would load
        the model to fail there, too.
        """
        [place, *more] = [(rank.node, rank.gpus) for rank in gang.ranks]
        for name, held in self._held.items():
            if not more and gang.pool.gpus_per_rank and [(rank.node, rank.gpus) for rank in held.ranks] == [place]:
                if (group := gang.leave_reserved(self._avoided)) is not None:
                    self._reserved.setdefault(name, []).append(group)
                return True
        return False

    def _collect(self, gang: Gang, call: Call, arrived: set[ray.ObjectRef]) -> list[ReplicaEvent]:
        """What became of a call, if it has ended. Raises GangLost."""
        try:
            reports = gang.collect(call, arrived)
        except InputsMissing as lost:
            if len(gang.ranks) > 1:
                # The other ranks have begun the call and wait for this one in a collective.
                return [self._lose(gang, GangLost(str(lost)), inputs_lost=True)]
            gang.calls.remove(call)
            return [InputsLost(gang.name, call.item.item_id, str(lost))]
        if reports is None:
            return []
        return [CallFinished(gang.name, call.item.item_id, reports[0], call.payload, str(gang.ranks[0]))]

    def _lose(self, gang: Gang, why: GangLost, inputs_lost: bool = False) -> ReplicaLost:
        """`inputs_lost` as in ReplicaLost."""
        served = gang.state is GangState.READY
        # Only a card that has failed is kept from others.
        held = not (served or why.node_lost) and bool(gang.ranks) and gang.pool.gpus_per_rank > 0
        self._end(gang.name, hold=held)
        return ReplicaLost(
            gang.name, str(why), served, inputs_lost, why.idle, why.node_lost, ranks=gang.ranks, rank=why.rank,
            held=held, unfit=why.unfit, ended_by=why.cause,
        )  # fmt: skip

    def placing(self) -> Mapping[str, float]:
        now = time.time()
        return {name: now - gang.created for name, gang in self._gangs.items() if gang.state is GangState.PLACING}

    def has_place(self, replica: str) -> bool:
        return self._gangs[replica].node_of_place() is not None

    def nodes(self) -> Mapping[str, int]:
        alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        alive = {name: has for name, has in alive.items() if name not in self._left_alone}
        return {name: int(has.get("GPU", 0)) for name, has in alive.items() if has.get("GPU") or has.get("CPU")}

    def kill(self, replica: str, hold: bool = False) -> None:
        self._end(replica, hold)

    def _end(self, replica: str, hold: bool = False) -> None:
        gang = self._gangs.pop(replica)
        if gang.state is GangState.LOADING:
            self._load_limit.end(gang.pool.name, None)
        gang.kill(release=not hold)
        if hold:
            self._held[replica] = gang
        else:
            self._card_time.free(replica, time.time())

    def release(self, replica: str) -> None:
        self._held.pop(replica).kill()
        for group in self._reserved.pop(replica, []):
            remove_placement_group(group)
        self._card_time.free(replica, time.time())

    def leaving(self) -> Collection[str]:
        now = time.time()
        if now - self._looked_for_drains > _DRAIN_PERIOD:
            self._looked_for_drains = now
            self._draining = frozenset(ray._private.state.state.get_draining_nodes())
        if not self._draining:
            return ()
        return [g.name for g in self._gangs.values() if any(rank.node in self._draining for rank in g.ranks)]

    def gpu_seconds(self) -> float:
        return self._card_time.seconds(time.time())

    def gpu_seconds_by_pool(self) -> Mapping[str, float]:
        return self._card_time.by_pool(time.time())

    def share(self, value: bytes) -> Any:
        return ray.put(value)

    def result(self, payload: Any) -> Any:
        return ray.get(payload)

    def close(self) -> None:
        for name in list(self._gangs):
            self.kill(name)
        for name in list(self._held):
            self.release(name)
