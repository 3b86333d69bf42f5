"""Pools: how many replicas of each role a cluster gets, and the gangs that keep them up."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ltx_ray.config import EngineSpec, PoolSpec
from ltx_ray.pools.gang import Gang

#: GPU time of stage 1 over stage 2 for an HQ clip (ltx-facts.md): how replicas are shared out.
_STAGE_RATIO = 2.3


@dataclass(frozen=True)
class Resources:
    """Slots of a cluster."""

    cpus: float
    gpus: float

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> Resources:
        return cls(resources.get("CPU", 0.0), resources.get("GPU", 0.0))


@dataclass(frozen=True)
class Wanted:
    """The shape a user asked for; None means auto."""

    tp: int = 1
    stage1: int | None = None
    stage2: int | None = None
    with_stage2: bool = True


def choose_replicas(wanted: Wanted, gpus: float) -> tuple[int, int, bool]:
    """(stage-1 replicas, stage-2 replicas, whether text and decode share a card with the DiT).

    No stage-2 replicas means that the stage-1 replicas serve both stages. Without GPUs: one each.
    With GPUs, text and decode together take one card of their own unless only one gang fits.
    """
    shared_card = gpus > 0 and gpus < wanted.tp + 1
    if gpus == 0:
        stage1, stage2 = 1, 1
    else:
        replicas = max(1, int(gpus if shared_card else gpus - 1) // wanted.tp)
        stage2 = 0 if replicas == 1 else max(1, round(replicas / (1 + _STAGE_RATIO)))
        stage1 = replicas - stage2
        if wanted.stage1 is not None and wanted.stage2 is None:
            stage2 = max(0, replicas - wanted.stage1)
        elif wanted.stage2 is not None and wanted.stage1 is None:
            stage1 = max(1, replicas - wanted.stage2)
    stage1 = stage1 if wanted.stage1 is None else wanted.stage1
    stage2 = stage2 if wanted.stage2 is None else wanted.stage2
    return stage1, stage2 if wanted.with_stage2 else 0, shared_card


def lay_out(wanted: Wanted, gpus: float, engines: Mapping[str, EngineSpec]) -> list[PoolSpec]:
    """The pools of a run. `engines` by pool name: text, diffusion, decode."""
    stage1, stage2, shared_card = choose_replicas(wanted, gpus)
    # more than half a card, so that two ranks of a gang never land on one
    card = 0.0 if gpus == 0 else 0.6 if shared_card else 1.0
    aside = 0.0 if gpus == 0 else 0.2 if shared_card else 0.5

    def stage_pool(name: str, roles: tuple[str, ...], replicas: int) -> PoolSpec:
        spec = engines["diffusion"]
        options = {**spec.options, "roles": roles}
        return PoolSpec(
            name, roles, replicas, wanted.tp, _with_options(spec, options), cpus_per_rank=1.0, gpus_per_rank=card
        )

    pools = [PoolSpec("text", ("text",), 1, 1, engines["text"], gpus_per_rank=aside)]
    if stage2 or not wanted.with_stage2:
        pools.append(stage_pool("stage1", ("stage1",), stage1))
        if stage2:
            pools.append(stage_pool("stage2", ("stage2",), stage2))
    else:
        pools.append(stage_pool("diffusion", ("stage1", "stage2"), stage1))
    pools.append(PoolSpec("decode", ("decode",), 1, 1, engines["decode"], gpus_per_rank=aside))
    return pools


def slots_needed(pools: list[PoolSpec]) -> Resources:
    """CPU and GPU slots that all gangs of `pools` take together."""
    return Resources(
        cpus=sum(p.replicas * p.ranks * p.cpus_per_rank for p in pools),
        gpus=round(sum(p.replicas * p.ranks * p.gpus_per_rank for p in pools), 6),
    )


def check_schedulable(pools: list[PoolSpec], free: Resources) -> None:
    """Raise ValueError naming what is needed and what is free when the pools do not fit."""
    needed = slots_needed(pools)
    short = [
        f"{what}: {need:g} needed, {have:g} free"
        for what, need, have in (("CPU slots", needed.cpus, free.cpus), ("GPUs", needed.gpus, free.gpus))
        if need > have
    ]
    if short:
        shape = ", ".join(f"{p.name} {p.replicas} x {p.ranks}" for p in pools)
        raise ValueError(
            f"the pools ({shape} ranks) cannot be scheduled: {'; '.join(short)}; "
            f"legal: fewer --stage1-replicas/--stage2-replicas, a smaller --tp, or a larger cluster"
        )


def _with_options(spec: EngineSpec, options: Mapping[str, object]) -> EngineSpec:
    return replace(spec, options=dict(options))


class StartFailed(Exception):
    """A pool's gangs failed to start more often than allowed."""


@dataclass
class Pool:
    """Keeps `spec.replicas` gangs of a role up, replacing the ones that were lost."""

    spec: PoolSpec
    max_starts_failed: int
    gangs: dict[str, Gang] = field(default_factory=dict)
    failures: int = 0
    _numbers: itertools.count = field(default_factory=itertools.count)

    def fill(self) -> list[Gang]:
        """Start gangs until there are as many as there should be; returns the new ones."""
        started = []
        while len(self.gangs) < self.spec.replicas:
            gang = Gang(f"{self.spec.name}-{next(self._numbers)}", self.spec)
            self.gangs[gang.name] = gang
            started.append(gang)
        return started

    def drop(self, gang: Gang, before_ready: bool, reason: str) -> None:
        """Kill a gang. Raises StartFailed when starts keep failing."""
        gang.kill()
        self.gangs.pop(gang.name, None)
        if before_ready:
            self.failures += 1
            if self.failures >= self.max_starts_failed:
                raise StartFailed(f"pool {self.spec.name}: {self.failures} gangs failed to start; the last: {reason}")

    def started(self) -> None:
        """A gang came up: earlier failures to start are forgiven."""
        self.failures = 0

    def close(self) -> None:
        for gang in list(self.gangs.values()):
            gang.kill()
        self.gangs.clear()
