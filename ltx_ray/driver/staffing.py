"""Which replicas a run starts, gives back and leaves out, so that every pool has as many as it should.

Until every pool has a replica and the preflight clip is through, each gets one. Then all places are asked for at once.
Replicas of text and decode beyond the first come after those of the DiT, so that they land beside its ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import replace

from ltx_ray.config import Numerics, PoolSpec, RunLimits
from ltx_ray.driver.events import EventLog
from ltx_ray.driver.gpu_drivers import GpuDrivers
from ltx_ray.driver.growth import Growth
from ltx_ray.driver.left_alone import LeftAlone
from ltx_ray.driver.own_cards import OwnCards
from ltx_ray.driver.policy import Policy
from ltx_ray.driver.pool_sizer import PoolSizer
from ltx_ray.driver.progress import Progress
from ltx_ray.driver.spare_places import PERIOD, MadePlace, SparePlaces, served, stuck_pools
from ltx_ray.driver.waits import Waits
from ltx_ray.pools.exclusion import node_name
from ltx_ray.pools.pool import Pool, StartFailed
from ltx_ray.pools.protocol import LossCause, RankInfo, ReplicaLost, ReplicaSet, ReplicaStarted
from ltx_ray.records import first_line
from ltx_ray.stages import DIFFUSION_STAGES

#: Seconds for which the DiT's replicas may wait for places before those of other pools no longer wait for them.
_HEAD_START = 60.0
#: Seconds for which a replica without a place, or without its process, is counted on.
_COUNTED_ON = 60.0
#: Why a replica leaves with its node.
_DRAINS = "its node drains"
WRONG_NODE = "its node computes wrongly"


class Staffing:
    """The replicas of a run: those that are starting or ready, and the places of those that could not start."""

    def __init__(
        self,
        pools: list[Pool],
        replicas: ReplicaSet,
        policy: Policy,
        limits: RunLimits,
        events: EventLog,
        progress: Progress,
        growth: Growth | None = None,
    ):
        self.pools, self._replicas, self._policy, self._limits = pools, replicas, policy, limits
        self._events, self._progress = events, progress
        self.left_alone = LeftAlone(replicas, events, progress)
        self.gpu_drivers = GpuDrivers(events, progress)
        #: What the stages wait for.
        self.waits = Waits()
        self._sizer = PoolSizer(policy, self.waits)
        self._own_cards, self._spare_places = OwnCards(), SparePlaces()
        self._growth = growth
        self._by_replica: dict[str, Pool] = {}
        #: Where the replicas that are ready run.
        self._ranks: dict[str, Sequence[RankInfo]] = {}
        #: Replicas that leave after the calls that are under way, and why.
        self._retired: dict[str, str] = {}
        #: Replicas that were lost, by pool and by what has ended them.
        self.losses: Counter[tuple[str, LossCause]] = Counter()

    def pool_of(self, replica: str) -> Pool:
        return self._by_replica[replica]

    def node_of(self, replica: str) -> str:
        """The node of a replica that is ready; "" where that is not known."""
        ranks = self.ranks_of(replica)
        return ranks[0].node if ranks else ""

    def ranks_of(self, replica: str) -> Sequence[RankInfo]:
        """Where a replica runs that is ready."""
        return self._ranks.get(replica, ())

    def start_missing(self, now: float, one_each: bool, elastic: bool, more_rows: bool) -> None:
        """Start what is missing; no more than one of each pool with `one_each`.

        `elastic` as in JoinedCluster. Without `more_rows` to come, no pool grows.
        """
        stuck: list[Pool] = []
        if self._all_served():
            self._spare_places.forget()
        else:
            # One that has its place waits for its process alone, for which nothing has to become free.
            stuck = [
                pool
                for pool in stuck_pools(self.pools, self._replicas.placing())
                if not any(map(self._replicas.has_place, pool.replicas))
            ]
        makes_room = self._make_room(stuck, now)
        self.left_alone.retry(now, bool(stuck) and not makes_room)
        self._retire_leaving()
        if not one_each and (makes_room or (elastic and not self._all_served())):
            one_each = True
            # What others serve as well must not take the place that another pool's first replica needs.
            for name in self._replicas.placing():
                if served(self.pools).issuperset(self.pool_of(name).spec.roles):
                    self.give_back(name, "another pool has none")
        if not one_each and (more_rows or any(self._policy.queued(stage) for stage in DIFFUSION_STAGES)):
            self._grow(now)
        if more_rows and not one_each:
            self._size(now)
            if not elastic:
                self._move_cards(now)
        for pool in self.pools:
            if len(pool.replicas) < pool.spec.replicas:
                if makes_room and served(self.pools).issuperset(pool.spec.roles):
                    continue
                at_most = 1 if one_each or (pool.spec.most is not None and self._others_wait()) else None
                self._start(pool, at_most)

    def _start(self, pool: Pool, at_most: int | None) -> None:
        for name in pool.missing(at_most):
            self._by_replica[name] = pool
            self._replicas.start(name, pool.spec)
            self._events.emit("gang_starting", role=pool.spec.name, replica=name)

    def _others_wait(self) -> bool:
        """Whether replicas of pools of a fixed size wait for places, and have not done so for long."""
        return any(
            seconds < _HEAD_START and self.pool_of(name).spec.most is None
            for name, seconds in self._replicas.placing().items()
        )

    def _all_served(self) -> bool:
        if all(pool.has_ready for pool in self.pools):
            return True
        roles = served(self.pools)
        return all(roles.issuperset(pool.spec.roles) for pool in self.pools)

    def _make_room(self, stuck: Sequence[Pool], now: float) -> bool:
        """Have a replica leave for one of the pools that have none and find no place. Whether a place is made for them.

        A replica that leaves already makes room, too.
        """
        spare = self._spare_places
        if stuck and self._place_becomes_free():
            spare.leaves(now)
            return True
        if (unused := spare.unused([pool.spec.name for pool in stuck], now)) is not None:
            self._give_back_place(unused)
        for taker in stuck:
            made = spare.choose(taker, self.pools, self._is_idle, self.ranks_of, self.left_alone.nodes, now)
            if made is None:
                continue
            why = f"{taker.spec.name} has no place"
            if self._policy.has_replica(made.replica):
                self._retire(made.replica, why)
            else:
                self.give_back(made.replica, why)  # It is up, and has been held back.
            break
        return spare.is_made

    def _give_back_place(self, unused: MadePlace) -> None:
        """A place has not suited the pool for which it was made."""
        needs = next(_needs(pool.spec) for pool in self.pools if pool.spec.name == unused.taker)
        self._progress.say(
            f"{unused.where}: {unused.giver} gets the place back that {unused.replica} left, because {unused.taker} "
            f"found no place there in {PERIOD:g} s; it needs {needs}"
        )
        self._events.emit(
            "place_given_back", role=unused.giver, replica=unused.replica, made_for=unused.taker, node=unused.node,
            where=unused.where, needs=needs,
        )  # fmt: skip

    def _is_idle(self, name: str) -> bool:
        return not self._policy.items_of(name)

    def _place_becomes_free(self) -> bool:
        """Whether a replica leaves whose place another one can take, which is not so on a node that drains."""
        return any(why != _DRAINS for why in self._retired.values())

    def _grow(self, now: float) -> None:
        """Take nodes that have joined."""
        grown = self._growth.grow(self._replicas.placing, now) if self._growth is not None else {}
        for name, size in grown.items():
            self._progress.say(f"{name} grows to {size} replicas, because nodes have joined the cluster")
            self._events.emit("pool_grown", role=name, replicas=size)

    def _size(self, now: float) -> None:
        """Set the numbers of replicas of the pools that have no fixed one."""
        for name, size in self._sizer.sizes(self.pools, now).items():
            pool = next(pool for pool in self.pools if pool.spec.name == name)
            self._events.emit("pool_resized", role=name, replicas=size, before=pool.spec.replicas)
            pool.spec = replace(pool.spec, replicas=size)
        for pool in self.pools:
            if pool.spec.most is not None and len(pool.replicas) > pool.spec.replicas:
                self._trim(pool)

    def _move_cards(self, now: float) -> None:
        """Give a pool that has cards of its own another one of the DiT, when too few clips are made without."""
        if not self._own_cards.is_due(now):
            return
        moved = self._own_cards.look(self.pools, self._sizer.needs, self._replicas.placing(), bool(self._retired), now)
        if moved is None:
            return
        self._progress.say(f"{moved.taker} gets a card of {moved.giver}, because {moved.why}")
        self._events.emit("card_moved", role=moved.giver, to=moved.taker, reason=moved.why)
        why = f"{moved.taker} gets its card"
        placing = self._replicas.placing()
        for pool in self.pools:
            for name in [name for name in pool.replicas if name in placing]:
                if pool.spec.most is None and len(pool.replicas) > pool.spec.replicas:
                    self.give_back(name, why)
            if pool.spec.most is None and len(pool.replicas) > pool.spec.replicas:
                ready = [name for name in pool.replicas if self._policy.has_replica(name)]
                idle = [name for name in ready if not self._policy.items_of(name)]
                for name in [*idle, *ready][:1]:
                    self._retire(name, why)

    def _trim(self, pool: Pool) -> None:
        """Give back what a pool has too many of. Those that have no place yet go first, and busy ones stay."""
        spare = len(pool.replicas) - pool.spec.replicas
        ready = [name for name, is_ready in pool.replicas.items() if is_ready and not self._policy.items_of(name)]
        placing = [name for name in self._replicas.placing() if name in pool.replicas]
        for name in [*placing, *reversed(ready)][:spare]:
            self.give_back(name, "its pool needs fewer")

    def give_back_spare(self) -> None:
        """Give back the replicas that no row needs any more."""
        for name in self._policy.spare_replicas():
            pool = self.pool_of(name)
            pool.spec = replace(pool.spec, replicas=pool.spec.replicas - 1)
            self.give_back(name, "no row needs it")

    def give_back(self, name: str, why: str) -> None:
        """End a replica that is not at fault; its calls cost their items no attempt."""
        pool = self.pool_of(name)
        self._policy.remove_replica(name, given_back=True)
        self._forget(name)
        self._replicas.kill(name)
        if why == _DRAINS:
            self.losses[pool.spec.name, LossCause.DRAIN] += 1
        self._events.emit("gang_given_back", role=pool.spec.name, replica=name, reason=why)

    def _retire_leaving(self) -> None:
        """Replicas on nodes that drain leave after their calls. Their successors start at once, elsewhere."""
        for name in self._replicas.leaving():
            pool = self.pool_of(name)
            if not pool.replicas.get(name) or not self._policy.has_replica(name):
                # It is still starting, is held back, or leaves already. What it waits for will come up nowhere.
                if name in pool.replicas:
                    self.give_back(name, _DRAINS)
                continue
            self._retire(name, _DRAINS)
        for name, why in list(self._retired.items()):
            if not self._policy.items_of(name):
                self.give_back(name, why)

    def _retire(self, name: str, why: str) -> None:
        """Have a replica that is ready leave after its calls."""
        pool = self.pool_of(name)
        del pool.replicas[name]
        self._policy.retire(name)
        self._retired[name] = why
        self._progress.say(f"{name} leaves after its call, because {why}")
        self._events.emit("gang_leaving", role=pool.spec.name, replica=name, reason=why)

    def exclude(self, ranks: Sequence[RankInfo], why: str, now: float) -> None:
        """The node of these ranks computes wrongly. Its replicas end at once, and others start elsewhere."""
        node = ranks[0].node
        self.left_alone.exclude(ranks, why, now)
        self.left_alone.wrong_nodes.add(node)
        for name, where in list(self._ranks.items()):
            if where and where[0].node == node:
                self.give_back(name, WRONG_NODE)

    def refuse(self, event: ReplicaStarted, why: str, now: float) -> None:
        """A replica that is up must not join. Raises StartFailed when none could that serves its stages."""
        pool = self._forget(event.replica)
        self._replicas.kill(event.replica)
        self.losses[pool.spec.name, LossCause.START] += 1
        reason = f"{event.replica} on {node_name(event.ranks)} is refused: {why}"
        self._progress.say(reason)
        self._events.emit(
            "gang_refused", role=pool.spec.name, replica=event.replica, where=node_name(event.ranks), reason=why
        )
        if self.left_alone.has_others(event.ranks):
            self.exclude(event.ranks, why, now)
        pool.start_failed(reason, event.ranks[0].node, self._nodes_for(pool), certain=True)

    def others_come(self, name: str, up: Container[str], all_are_wanted: bool) -> bool:
        """Whether replicas with the same engine as this one's are starting. Not those that have no place for long.

        `up`: replicas that are up and have not joined. `all_are_wanted`: those that are yet to be started count, too.
        """
        engine, placing = _computes(self.pool_of(name)), self._replicas.placing()
        for pool in self.pools:
            if _computes(pool) != engine:
                continue
            if all_are_wanted and len(pool.replicas) < pool.spec.replicas:
                return True
            starting = [other for other, ready in pool.replicas.items() if not ready and other not in up]
            if any(placing.get(other, 0.0) < _COUNTED_ON for other in starting):
                return True
        return False

    def hold_back(self, name: str) -> None:
        """A replica that is up, and has no call under way, gets none until it has `started`."""
        self.pool_of(name).started(name)
        self._policy.remove_replica(name, given_back=True)

    def set_aside(self, name: str) -> None:
        """A replica that is up waits for others before it may join, so that another one is started."""
        self.pool_of(name).replicas.pop(name, None)

    def knows(self, replica: str) -> bool:
        """Whether a replica has not ended."""
        return replica in self._by_replica

    def say(self, message: str) -> None:
        """Say something of a node, in the log and in the events."""
        self._progress.say(message)
        self._events.emit("warning", message=message)

    def _forget(self, name: str) -> Pool:
        pool = self._by_replica.pop(name)
        pool.replicas.pop(name, None)
        self._retired.pop(name, None)
        self._ranks.pop(name, None)
        return pool

    def started(self, event: ReplicaStarted) -> Pool:
        """A replica is ready, or may go on that was held back."""
        pool = self.pool_of(event.replica)
        pool.started(event.replica)
        # One that was set aside has had another one started in its place.
        for name in self._replicas.placing() if len(pool.replicas) > pool.spec.replicas else ():
            if name in pool.replicas and len(pool.replicas) > pool.spec.replicas:
                self.give_back(name, "its pool needs fewer")
        if event.replica not in self._ranks:
            self._events.emit(
                "gang_started", role=pool.spec.name, replica=event.replica,
                ranks=[rank.event() for rank in event.ranks], seconds=round(event.seconds, 3),
            )  # fmt: skip
        self._ranks[event.replica] = event.ranks
        self.left_alone.started(event.ranks, pool.spec.name)
        return pool

    def call_succeeded(self, replica: str) -> None:
        """A call has succeeded on a replica."""
        pool = self.pool_of(replica)
        pool.call_succeeded()
        self.left_alone.call_succeeded(self.ranks_of(replica), pool.spec.name)

    def tell_lost(self, event: ReplicaLost) -> None:
        """Say that a replica has been killed, and count it."""
        name, role = event.replica, self.pool_of(event.replica).spec.name
        cause = LossCause.DRAIN if self._retired.get(name) == _DRAINS else event.cause
        self.losses[role, cause] += 1
        self._progress.say(f"{name} lost: {first_line(event.reason)}")
        self._events.emit("gang_lost", role=role, replica=name, cause=cause, reason=event.reason)

    def lost(self, event: ReplicaLost, now: float) -> None:
        """A replica has been killed. Raises StartFailed when starts keep failing everywhere."""
        pool = self._forget(event.replica)
        if event.held or not event.served:
            self.left_alone.failed(event, pool.spec.name, now)
        # Losing a node while it loads is nobody's fault.
        if not event.served and not event.node_lost:
            # Where a replica was that had no time to tell is not known, so it counts as another node.
            node = event.ranks[0].node if event.ranks else event.replica
            pool.start_failed(event.reason, node, self._nodes_for(pool), certain=event.unfit)
        if event.idle:
            pool.died_idle(event.reason)

    def _nodes_for(self, pool: Pool) -> int:
        """How many nodes have what a replica of the pool needs, excluded ones included."""
        return sum(cards > 0 or not pool.spec.gpus_per_rank for cards in self._replicas.nodes().values())

    def check_placing(self) -> None:
        """A replica may wait for a place as long as others serve its roles meanwhile. Raises StartFailed."""
        if not (placing := self._replicas.placing()):
            return
        roles = served(self.pools)
        for name, seconds in placing.items():
            pool = self.pool_of(name)
            if seconds > self._limits.start_timeout and not roles.issuperset(pool.spec.roles):
                raise StartFailed(
                    f"pool {pool.spec.name}: no place for a replica in {self._limits.start_timeout:g} s; it needs "
                    f"{_needs(pool.spec)}"
                )


def _needs(spec: PoolSpec) -> str:
    """What a replica of a pool needs, for messages."""
    return f"{spec.ranks} x ({spec.cpus_per_rank:g} CPU, {spec.gpus_per_rank:g} GPU) on one node"


def _computes(pool: Pool) -> tuple[str, int, Numerics]:
    """What decides which answers the replicas of a pool should give."""
    engine = pool.spec.engine
    return engine.engine, engine.layout.tp, engine.numerics
