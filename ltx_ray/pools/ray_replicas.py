"""The gangs of a run on a Ray cluster: the only place that waits on Ray.

Large results (contexts, latents) stay in the object store; their references are passed on, and only the
small reports are read.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray

from ltx_ray.config import PoolSpec
from ltx_ray.pools.gang import Gang, GangLost, InputsMissing
from ltx_ray.pools.protocol import CallFinished, InputsLost, ReplicaEvent, ReplicaLost, ReplicaStarted
from ltx_ray.records import WorkItem


class RayReplicaSet:
    """`start_timeout`: seconds that a placed gang may take until it is ready; `call_timeout`: that a call may take."""

    def __init__(self, start_timeout: float, call_timeout: float):
        self._start_timeout, self._call_timeout = start_timeout, call_timeout
        self._gangs: dict[str, Gang] = {}

    def start(self, name: str, spec: PoolSpec) -> None:
        self._gangs[name] = Gang(name, spec)

    def submit(self, replica: str, stage: str, item: WorkItem, inputs: list[Any]) -> None:
        self._gangs[replica].submit(stage, item, inputs)

    def wait(self, timeout: float) -> list[ReplicaEvent]:
        now = time.time()
        for gang in self._gangs.values():
            gang.probe(now)
        waiting = {ref: gang for gang in self._gangs.values() for ref in gang.waits_for()}
        if not waiting:
            time.sleep(timeout)
            return []
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=timeout)
        if ready:
            # one reference woke us; take whatever else is there too
            ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        arrived = set(ready)
        events = []
        for gang in {id(waiting[ref]): waiting[ref] for ref in ready}.values():
            events += self._attend(gang, arrived)
        now = time.time()
        for gang in list(self._gangs.values()):
            if (reason := gang.overdue(now, self._start_timeout, self._call_timeout)) is not None:
                events.append(self._lose(gang, reason))
            elif gang.silent(now):
                events.append(self._lose(gang, "a rank does not answer", idle=True))
        return events

    def _attend(self, gang: Gang, arrived: set[ray.ObjectRef]) -> list[ReplicaEvent]:
        try:
            if gang.state != "ready":
                ready = gang.advance(arrived)
                return [ReplicaStarted(gang.name, gang.ranks, time.time() - gang.created)] if ready else []
            call = gang.call
            if call is None or not call.reports:
                gang.pinged(arrived)
                return []
            reports = gang.collect(arrived)
            if reports is None:
                return []
            return [CallFinished(gang.name, reports[0], call.payload, gang.where(0))]
        except GangLost as lost:
            return [self._lose(gang, str(lost), idle=lost.idle, node_lost=lost.node_lost)]
        except InputsMissing as lost:
            if len(gang.ranks) > 1:
                # the other ranks have begun, and wait for this one
                return [self._lose(gang, str(lost), inputs_lost=True)]
            gang.call = None
            return [InputsLost(gang.name, str(lost))]

    def _lose(self, gang: Gang, reason: str, **why: bool) -> ReplicaLost:
        served = gang.state == "ready"
        self.kill(gang.name)
        return ReplicaLost(gang.name, reason, served, **why)

    def placing(self) -> Mapping[str, float]:
        now = time.time()
        return {name: now - gang.created for name, gang in self._gangs.items() if gang.state == "placing"}

    def kill(self, replica: str) -> None:
        self._gangs.pop(replica).kill()

    def result(self, payload: Any) -> Any:
        return ray.get(payload)

    def close(self) -> None:
        for name in list(self._gangs):
            self.kill(name)
