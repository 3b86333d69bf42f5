"""A gang: the rank actors of one replica in one placement group, started and killed as one.

Nothing here waits. `advance` takes the gang from one step of its start to the next whenever the
references it waits for are ready, so that the driver's single loop can start many at once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ltx_ray.config import PoolSpec
from ltx_ray.pools.worker import RankActor
from ltx_ray.records import CallReport

_RENDEZVOUS_TIMEOUT = 300.0
#: Seconds that the other ranks have to report the same failure, if it is the row's.
_LONE_FAILURE_GRACE = 10.0
#: Seconds after which an idle gang is asked whether it lives.
_PROBE_SECONDS = 10.0
#: Seconds that it has for the answer.
_SILENCE_SECONDS = 60.0
#: How Ray puts it.
_NODE_LOST = "its node has died"
#: Seconds after an answer in which a gang is not asked whether it lives before it gets its next call.
_SURELY_ALIVE = 0.05


class GangLost(Exception):
    """The gang is of no more use: a rank died, failed to start, or disagreed with the others.

    `idle`: it had died before the call under way began; `node_lost`: its node is gone.
    """

    def __init__(self, reason: str, idle: bool = False, node_lost: bool = False):
        super().__init__(reason)
        self.idle, self.node_lost = idle, node_lost


class InputsMissing(Exception):
    """The inputs of a call are gone from the object store (their node died)."""


@dataclass
class Call:
    """A call under way on all ranks: `reports` by rank, `payload` of rank 0.

    A gang that has been idle is asked first whether it still lives; what had died before is no fault of the item that
    it should have rendered. There are no `reports` to wait for until it has answered.
    """

    stage: str
    item: Any
    inputs: list[Any]
    reports: list[ray.ObjectRef] = field(default_factory=list)
    payload: ray.ObjectRef | None = None
    started: float = field(default_factory=time.time)
    done: dict[int, CallReport] = field(default_factory=dict)
    #: When the first rank reported a failure while others had not answered.
    failed_at: float | None = None


class Gang:
    """One replica of `pool`. `state` is "placing", "meeting", "loading", "ready" or "dead"."""

    def __init__(self, name: str, pool: PoolSpec):
        self.name, self.pool = name, pool
        self.state = "placing"
        self.created = time.time()
        self.ranks: list[dict[str, Any]] = []
        self.device = ""
        self.call: Call | None = None
        self._pings: list[ray.ObjectRef] = []
        self._answered = 0.0
        bundle = {"CPU": pool.cpus_per_rank}
        if pool.gpus_per_rank:
            bundle["GPU"] = pool.gpus_per_rank
        # tensor parallelism talks after every layer, so a gang never spans nodes
        self._group: PlacementGroup = placement_group([bundle] * pool.ranks, strategy="STRICT_PACK")
        self._actors: list[Any] = []
        self._pending: list[ray.ObjectRef] = [self._group.ready()]

    def waits_for(self) -> list[ray.ObjectRef]:
        """References whose readiness moves this gang on."""
        if self.state != "ready":
            return self._pending
        if self.call is not None and self.call.reports:
            return [ref for rank, ref in enumerate(self.call.reports) if rank not in self.call.done]
        return self._pings

    def advance(self, ready: set[ray.ObjectRef]) -> bool:
        """Take the next step of the start if all it waits for is in `ready`; True when that makes it ready.

        Raises GangLost when a step failed.
        """
        self._pending = [ref for ref in self._pending if ref not in ready]
        try:
            if self.state == "loading":
                # one that failed is enough: the others may be waiting for it at the rendezvous
                for rank, ref in enumerate(self._started):
                    if ref in ready:
                        self._loaded(rank, ray.get(ref))
            if self._pending:
                return False
            if self.state == "placing":
                self._spawn()
            elif self.state == "meeting":
                self._load()
            elif self.state == "loading":
                self.device = self.ranks[0]["device"]
                # its first call asks first, too: loading ended a while before we heard of it
                self.state, self._answered = "ready", time.time() - _SURELY_ALIVE
                return True
        except ray.exceptions.RayError as error:
            raise GangLost(f"{self.state}: {_first_line(error)}") from error
        return False

    def _spawn(self) -> None:
        pool = self.pool
        self._placed = time.time()
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        if not pool.gpus_per_rank:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        actor = ray.remote(RankActor)
        self._actors = [
            actor.options(
                num_cpus=pool.cpus_per_rank,
                num_gpus=pool.gpus_per_rank,
                max_restarts=0,
                runtime_env={"env_vars": environment},
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank),
            ).remote()
            for rank in range(pool.ranks)
        ]
        self._described = [a.describe.remote() for a in self._actors]
        self._port = self._actors[0].free_port.remote()
        self._pending = [*self._described, self._port]
        self.state = "meeting"

    def _load(self) -> None:
        self.ranks = [{"rank": rank, **ray.get(ref)} for rank, ref in enumerate(self._described)]
        world = len(self._actors)
        rendezvous = (self.ranks[0]["address"], ray.get(self._port)) if world > 1 else None
        self._started = [
            a.start.remote(self.pool.engine, rank, world, rendezvous, _RENDEZVOUS_TIMEOUT)
            for rank, a in enumerate(self._actors)
        ]
        self._pending = list(self._started)
        self.state = "loading"

    def _loaded(self, rank: int, report: CallReport) -> None:
        self.ranks[rank]["device"] = report.device
        self.ranks[rank] |= {"device_name": "", **report.info}
        if not report.ok:
            raise GangLost(f"{self.where(rank)}: {report.error_type}: {report.message}\n{report.traceback}")

    def submit(self, stage: str, item: Any, inputs: list[Any]) -> None:
        """Start `stage` of `item` on all ranks. `inputs` are references to earlier payloads."""
        assert self.state == "ready" and self.call is None
        self.call = Call(stage, item, inputs)
        if time.time() - self._answered > _SURELY_ALIVE:
            self._ask()
        else:
            self._run(self.call)

    def probe(self, now: float) -> None:
        """Ask an idle gang now and then whether it lives, so that a dead one does not hold its place for hours."""
        if self.state == "ready" and self.call is None and now - self._answered > _PROBE_SECONDS:
            self._ask()

    def silent(self, now: float) -> bool:
        """Whether a gang that was asked whether it lives has not answered for a minute."""
        return bool(self._pings) and now - self._asked > _SILENCE_SECONDS

    def _ask(self) -> None:
        if not self._pings:
            self._asked = time.time()
            self._pings = [a.ping.remote() for a in self._actors]

    def _run(self, call: Call) -> None:
        pairs = [a.run.options(num_returns=2).remote(call.stage, call.item, *call.inputs) for a in self._actors]
        call.reports, call.payload = [report for report, _ in pairs], pairs[0][1]
        call.inputs, call.started = [], time.time()

    def pinged(self, ready: set[ray.ObjectRef]) -> None:
        """Take in who has said that it lives; when every rank has, the call that waits for that begins.

        Raises GangLost when one is dead.
        """
        for ref in self._pings:
            if ref in ready:
                try:
                    ray.get(ref)
                except ray.exceptions.RayError as error:
                    raise GangLost(f"a rank died while idle: {_first_line(error)}", idle=True) from error
        self._pings = [ref for ref in self._pings if ref not in ready]
        if not self._pings:
            self._answered = time.time()
            if self.call is not None:
                self._run(self.call)

    def collect(self, ready: set[ray.ObjectRef]) -> list[CallReport] | None:
        """The reports of the call under way once every rank has answered, else None.

        Raises GangLost when a rank died, or when some ranks failed and others did not; InputsMissing when a rank
        could not get the inputs.
        """
        call = self.call
        assert call is not None
        for rank, ref in enumerate(call.reports):
            if rank not in call.done and ref in ready:
                try:
                    call.done[rank] = ray.get(ref)
                except ray.exceptions.RayActorError as error:
                    reason = f"rank {rank} died during {call.stage}: {_first_line(error)}"
                    raise GangLost(reason, node_lost=_NODE_LOST in str(error)) from error
                except ray.exceptions.RayError as error:
                    # the call never began on this rank: its inputs could not be had
                    raise InputsMissing(f"rank {rank} has no inputs for {call.stage}: {_first_line(error)}") from error
        if len(call.done) < len(call.reports):
            if call.failed_at is None and not all(r.ok for r in call.done.values()):
                call.failed_at = time.time()
            return None
        reports = [call.done[rank] for rank in range(len(call.reports))]
        if len({(r.ok, r.error_type) for r in reports}) > 1:
            rank, report = next((n, r) for n, r in enumerate(reports) if not r.ok)
            raise GangLost(
                f"the ranks disagreed during {call.stage}: {self.where(rank)}: {report.error_type}: {report.message}"
            )
        self.call = None
        self._answered = time.time()
        return reports

    def overdue(self, now: float, start_timeout: float, call_timeout: float) -> str | None:
        """Why the start or the call under way should be given up, or None. `now` as of `time.time`.

        A gang may wait for a place as long as it takes: that is the cluster's doing.
        """
        if self.state != "ready":
            slow = self.state != "placing" and now - self._placed > start_timeout
            return f"not ready after {start_timeout:g} s ({self.state})" if slow else None
        call = self.call
        if call is None or not call.reports:
            return None
        if call.failed_at is not None and now - call.failed_at > _LONE_FAILURE_GRACE:
            # the other ranks wait for it in a collective, for ever
            rank, report = next((n, r) for n, r in call.done.items() if not r.ok)
            return f"{self.where(rank)} failed alone during {call.stage}: {report.error_type}: {report.message}"
        if now - call.started > call_timeout:
            return f"{call.stage} took longer than {call_timeout:g} s"
        return None

    def where(self, rank: int) -> str:
        """The rank with its node and device, for messages."""
        place = self.ranks[rank]
        return f"rank {rank} on node {place['address']} ({place.get('device') or 'device unknown'})"

    def kill(self) -> None:
        """End all ranks and give the placement group back."""
        self.state = "dead"
        self._pending = []
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        remove_placement_group(self._group)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
