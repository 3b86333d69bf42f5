"""A gang: the rank actors of one replica, started and killed as one.

Several ranks have a placement group, which keeps them on one node. A single rank has one only for its GPU: if the card
fails, the group goes on reserving that very card, so that nothing else lands there. The rank itself could not do that.
Many failures end its process, and Ray gives the card of a process that has ended to the next replica at once. A rank
that lives on would keep the memory of its card, and what made it fail. The rank is asked for together with its group,
because to wait for the group alone would take a process of its own.

Nothing here waits. `advance` takes the gang from one step of its start to the next once the references that it waits
for are ready, so that the driver's single loop can start many gangs at once.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ltx_ray.config import PoolSpec
from ltx_ray.parallel.rendezvous import Rendezvous
from ltx_ray.pools.protocol import LossCause, RankInfo, loss_cause
from ltx_ray.pools.worker import RankActor
from ltx_ray.records import CallError, CallReport, ErrorKind, Evidence, WorkItem, first_line
from ltx_ray.stages import Stage
from ltx_ray.storage.requests import REQUESTS

_RENDEZVOUS_SECONDS = 300.0
#: Seconds that the other ranks have to report the same failure, if the row is at fault.
_LONE_FAILURE_SECONDS = 10.0
#: Seconds without an answer after which an idle gang is pinged.
_PING_AFTER_SECONDS = 10.0
#: Seconds that a gang has to answer a ping.
_PING_TIMEOUT_SECONDS = 60.0
#: Seconds after an answer in which the next call needs no ping before it.
_FRESH_SECONDS = 0.05
#: Errors of a call whose rank died. Ray's memory monitor reports its kills with an error of their own.
_RANK_DIED = (
    ray.exceptions.RayActorError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.WorkerCrashedError,
)
#: Part of Ray's message about a dead actor when its node is gone.
_NODE_LOST = "its node has died"
#: The label of every node that holds its id.
_NODE_LABEL = "ray.io/node-id"


class GangState(StrEnum):
    """The steps of a gang's life."""

    PLACING = "placing"
    RENDEZVOUS = "rendezvous"
    WAITING = "waiting"
    LOADING = "loading"
    READY = "ready"
    DEAD = "dead"


class GangLost(Exception):
    """The gang can serve no more calls: a rank died, failed to start, or disagreed with the others.

    `idle`: it had died before the calls under way began; `node_lost`: its node is gone; `rank`: the one that failed to
    load; `unfit`: its node cannot compute as the run does; `cause`: what has ended it if it was ready.
    """

    def __init__(
        self,
        reason: str,
        idle: bool = False,
        node_lost: bool = False,
        rank: int | None = None,
        unfit: bool = False,
        cause: LossCause = LossCause.RANK,
    ):
        super().__init__(reason)
        self.idle, self.node_lost, self.rank, self.unfit, self.cause = idle, node_lost, rank, unfit, cause


class InputsMissing(Exception):
    """The inputs of a call are gone from the object store, because their node died."""


@dataclass
class Call:
    """A call under way on all ranks: `reports` by rank, `payload` of rank 0.

    A gang that has been idle is pinged before the call, so that a death from before it is not charged to the item.
    `reports` is empty until the ping is answered.
    """

    stage: Stage
    item: WorkItem
    inputs: list[Any]
    #: Seconds that it may take.
    timeout: float = math.inf
    reports: list[ray.ObjectRef] = field(default_factory=list)
    payload: ray.ObjectRef | None = None
    started: float = field(default_factory=time.time)
    done: dict[int, CallReport] = field(default_factory=dict)
    #: When the first rank reported a failure while others had not answered.
    failed_at: float | None = None

    def first_failure(self) -> tuple[int, CallError]:
        """The first rank that failed, and its error."""
        return next((rank, report.error) for rank, report in sorted(self.done.items()) if report.error is not None)


class Gang:
    """One replica of `pool`."""

    def __init__(self, name: str, pool: PoolSpec, avoided: Collection[str] | None = ()):
        """`avoided`: nodes on which it may not be placed; None when it waits for `ask`."""
        self.name, self.pool = name, pool
        self.state = GangState.PLACING
        self.created = time.time()
        #: When its place was asked for, and on which nodes alone; on any if there are none.
        self.asked_at: float | None = None
        self.asked_near: frozenset[str] = frozenset()
        self.ranks: list[RankInfo] = []
        self.evidence: Evidence | None = None
        #: Under way, the oldest first.
        self.calls: list[Call] = []
        self._pings: list[ray.ObjectRef] = []
        self._answered = self._pinged = self._placed = 0.0
        #: When it began to load.
        self.load_began = 0.0
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []
        #: What each rank reports about its process, then a free port on the node of rank 0 for several.
        self._described: list[ray.ObjectRef] = []
        self._started: list[ray.ObjectRef] = []
        self._port = 0
        self._pending: list[ray.ObjectRef] = []
        if avoided is not None:
            self.ask(avoided)

    def ask(self, avoided: Collection[str], near: Collection[str] = ()) -> None:
        """Ask for a place on another node than the `avoided`, or on one of those that are `near`."""
        self._end()
        self.asked_at, self.asked_near = time.time(), frozenset(near)
        self._place(avoided, near)

    def node_of_place(self) -> str | None:
        """The node of its placement group. None before that has a place, and without one. Ray is asked each time.

        A gang that is placing may have its place already: it goes on once the processes of its ranks are there.
        """
        found = {} if self._group is None else placement_group_table(self._group)
        nodes = found.get("bundles_to_node_id", {}) if found.get("state") == "CREATED" else {}
        return next(iter(nodes.values()), None)

    def _place(self, avoided: Collection[str], near: Collection[str] = ()) -> None:
        pool = self.pool
        elsewhere = {_NODE_LABEL: f"!in({','.join(sorted(avoided))})"} if avoided else {}
        if near:
            elsewhere = {_NODE_LABEL: f"in({','.join(sorted(near))})"}
        if pool.ranks == 1 and not pool.gpus_per_rank:
            self._spawn(elsewhere)
            return
        bundle = {"CPU": pool.cpus_per_rank}
        if pool.gpus_per_rank:
            bundle["GPU"] = pool.gpus_per_rank
        # Tensor parallelism communicates after every layer, so a gang never spans nodes.
        self._group = placement_group(
            [bundle] * pool.ranks, strategy="STRICT_PACK", bundle_label_selector=[elsewhere] * pool.ranks
        )
        if pool.ranks == 1:
            self._spawn()
        else:
            self._pending = [self._group.ready()]

    def avoid(self, nodes: Collection[str]) -> None:
        """Wait for a place on other nodes than these, if this gang has asked for one and has none yet."""
        if self.state is GangState.PLACING and self.asked_at is not None:
            self.ask(nodes, self.asked_near.difference(nodes))

    def place_again(self, avoided: Collection[str]) -> None:
        """Leave the place where this gang has not begun to load, for one on another node than these."""
        assert self.state is GangState.WAITING
        self.state, self.ranks = GangState.PLACING, []
        self.ask(avoided)

    def leave_reserved(self, avoided: Collection[str]) -> PlacementGroup | None:
        """As `place_again`, but what is left stays reserved by the group that is returned."""
        group, self._group = self._group, None
        self.place_again(avoided)
        return group

    def waits_for(self) -> list[ray.ObjectRef]:
        """The references whose readiness takes this gang on."""
        if self.state is not GangState.READY:
            return self._pending
        running = [ref for call in self.calls for rank, ref in enumerate(call.reports) if rank not in call.done]
        return running + self._pings

    def advance(self, ready: set[ray.ObjectRef]) -> bool:
        """Take the next step of the start if everything it waits for is in `ready`; True when that makes it ready.

        Raises GangLost when a step failed.
        """
        self._pending = [ref for ref in self._pending if ref not in ready]
        try:
            if self.state is GangState.LOADING:
                # One failure suffices: the other ranks may be waiting for that rank at the rendezvous.
                for rank, ref in enumerate(self._started):
                    if ref in ready:
                        self._loaded(rank, ray.get(ref))
            if self._pending:
                return False
            if self.state is GangState.PLACING and not self._actors:
                self._spawn()
                self.state = GangState.RENDEZVOUS
            elif self.state in (GangState.PLACING, GangState.RENDEZVOUS):
                self._describe()
            elif self.state is GangState.LOADING:
                self.state = GangState.READY
                # Loading ended a while before this call, so the gang's first call is preceded by a ping, too.
                self._answered = time.time() - _FRESH_SECONDS
                return True
        except ray.exceptions.RayError as error:
            raise GangLost(f"{self.state}: {first_line(error)}", node_lost=_NODE_LOST in str(error)) from error
        return False

    def _spawn(self, elsewhere: Mapping[str, str] = MappingProxyType({})) -> None:
        """Ask for the ranks, in the group if there is one, or on a node with the labels of `elsewhere`."""
        pool, group = self.pool, self._group
        self._placed = time.time()
        actor = ray.remote(RankActor)
        where: dict[str, Any] = {"label_selector": dict(elsewhere)} if elsewhere else {}
        for rank in range(pool.ranks):
            if group is not None:
                where = {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, rank)}
            options = actor.options(
                num_cpus=pool.cpus_per_rank,
                num_gpus=pool.gpus_per_rank,
                max_restarts=0,
                max_concurrency=pool.calls_at_once,
                **where,
            )
            self._actors.append(options.remote(hides_gpus=not pool.gpus_per_rank))
        self._described = [a.describe.remote() for a in self._actors]
        if pool.ranks > 1:
            self._described.append(self._actors[0].listen.remote())
        self._pending = list(self._described)

    def _describe(self) -> None:
        answers = ray.get(self._described)
        processes = answers[: self.pool.ranks]
        if self.pool.ranks > 1:
            self._port = answers[-1]
        self.ranks = [RankInfo(rank, p.pid, p.node, p.address, p.gpus) for rank, p in enumerate(processes)]
        self.state = GangState.WAITING

    def load(self) -> None:
        """Have the ranks meet and load the model. For a gang that waits for it."""
        assert self.state is GangState.WAITING
        self.load_began = self._placed = time.time()
        world = len(self._actors)
        rendezvous = Rendezvous(self.ranks[0].address, self._port) if world > 1 else None
        self._started = [
            a.start.remote(self.pool.engine, rank, world, rendezvous, _RENDEZVOUS_SECONDS)
            for rank, a in enumerate(self._actors)
        ]
        self._pending = list(self._started)
        self.state = GangState.LOADING

    def _loaded(self, rank: int, report: CallReport) -> None:
        facts = report.facts
        REQUESTS.add(report.requests)
        if rank == 0:
            self.evidence = facts.evidence
        self.ranks[rank] = dataclasses.replace(
            self.ranks[rank],
            device=report.device,
            device_name=facts.device_name,
            clean_weights=facts.clean_weights,
            lora_factors=facts.lora_factors,
            start_seconds=facts.start_seconds,
        )
        if (error := report.error) is not None:
            reason = f"{self.ranks[rank]}: {error.type}: {error.message}\n{error.traceback}"
            raise GangLost(reason, rank=rank, unfit=error.kind == ErrorKind.NODE)

    def submit(self, stage: Stage, item: WorkItem, inputs: list[Any], timeout: float) -> None:
        """Start `stage` of `item` on all ranks, for `timeout` seconds. `inputs` are references to earlier payloads."""
        assert self.state is GangState.READY and len(self.calls) < self.pool.calls_at_once
        alive = any(call.reports for call in self.calls) or time.time() - self._answered <= _FRESH_SECONDS
        self.calls.append(call := Call(stage, item, inputs, timeout))
        if alive:
            self._run(call)
        else:
            self._ping()

    def probe(self, now: float) -> None:
        """Ping a gang that has been idle for a while, so that a dead one does not occupy its place for hours."""
        if self.state is GangState.READY and not self.calls and now - self._answered > _PING_AFTER_SECONDS:
            self._ping()

    def _ping(self) -> None:
        if not self._pings:
            self._pinged = time.time()
            self._pings = [a.ping.remote() for a in self._actors]

    def _run(self, call: Call) -> None:
        pairs = [a.run.options(num_returns=2).remote(call.stage, call.item, *call.inputs) for a in self._actors]
        call.reports, call.payload = [report for report, _ in pairs], pairs[0][1]
        call.inputs, call.started = [], time.time()

    def pinged(self, ready: set[ray.ObjectRef]) -> None:
        """Take in answers to the pings, if there are any; when every rank has answered, calls that wait for them begin.

        Raises GangLost when a rank is dead.
        """
        if not self._pings:
            return
        for ref in self._pings:
            if ref in ready:
                try:
                    ray.get(ref)
                except ray.exceptions.RayError as error:
                    reason = f"a rank died while idle: {first_line(error)}"
                    raise GangLost(reason, idle=True, cause=_what_ended(error)) from error
        self._pings = [ref for ref in self._pings if ref not in ready]
        if not self._pings:
            self._answered = time.time()
            for call in self.calls:
                if not call.reports:
                    self._run(call)

    def collect(self, call: Call, ready: set[ray.ObjectRef]) -> list[CallReport] | None:
        """The reports of a call once every rank has answered, else None.

        Raises GangLost when a rank died, or when some ranks failed and others did not; InputsMissing when a rank
        could not get the inputs.
        """
        for rank, ref in enumerate(call.reports):
            if rank not in call.done and ref in ready:
                try:
                    call.done[rank] = report = ray.get(ref)
                    REQUESTS.add(report.requests)
                except _RANK_DIED as error:
                    reason = f"rank {rank} died during {call.stage}: {first_line(error)}"
                    lost = _NODE_LOST in str(error)
                    raise GangLost(reason, node_lost=lost, cause=_what_ended(error)) from error
                except ray.exceptions.RayError as error:
                    # The call never began on this rank, because its inputs are gone.
                    raise InputsMissing(f"rank {rank} has no inputs for {call.stage}: {first_line(error)}") from error
        if len(call.done) < len(call.reports):
            if call.failed_at is None and not all(r.ok for r in call.done.values()):
                call.failed_at = time.time()
            return None
        reports = [call.done[rank] for rank in range(len(call.reports))]
        if len({(r.error.kind, r.error.type) if r.error else None for r in reports}) > 1:
            rank, failure = call.first_failure()
            raise GangLost(
                f"the ranks disagreed during {call.stage}: {self.ranks[rank]}: {failure.type}: {failure.message}",
                cause=loss_cause(failure),
            )
        self.calls.remove(call)
        self._answered = time.time()
        return reports

    def gets_on(self, now: float) -> None:
        """The gang loads still: its time to start begins anew."""
        self._placed = now

    def overdue(self, now: float, start_timeout: float) -> GangLost | None:
        """Why the start, a call under way or an idle gang should be given up, or None. `now` as of `time.time`.

        A gang may wait for a place without a limit, because that depends on the cluster alone. Its time to start begins
        with its turn to load.
        """
        if self.state is not GangState.READY:
            slow = self.state not in (GangState.PLACING, GangState.WAITING) and now - self._placed > start_timeout
            return GangLost(f"not ready after {start_timeout:g} s ({self.state})") if slow else None
        for call in self.calls:
            if not call.reports:
                continue
            if call.failed_at is not None and now - call.failed_at > _LONE_FAILURE_SECONDS:
                # The other ranks wait for the failed one in a collective, and would wait forever.
                rank, failure = call.first_failure()
                reason = f"{self.ranks[rank]} failed alone during {call.stage}: {failure.type}: {failure.message}"
                return GangLost(reason, cause=loss_cause(failure))
            if now - call.started > call.timeout:
                return GangLost(f"{call.stage} took longer than {call.timeout:g} s", cause=LossCause.TIMEOUT)
        if self._pings and now - self._pinged > _PING_TIMEOUT_SECONDS:
            return GangLost("a rank does not answer", idle=True, cause=LossCause.TIMEOUT)
        return None

    def kill(self, release: bool = True) -> None:
        """End all ranks, and give their place back, unless its group is still to keep others off its cards."""
        self.state = GangState.DEAD
        self._end(release)

    def _end(self, release: bool = True) -> None:
        self._pending = []
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._actors = []
        if release and self._group is not None:
            remove_placement_group(self._group)


def _what_ended(error: ray.exceptions.RayError) -> LossCause:
    """What has ended a rank whose process is gone."""
    return LossCause.OOM if isinstance(error, ray.exceptions.OutOfMemoryError) else LossCause.RANK
