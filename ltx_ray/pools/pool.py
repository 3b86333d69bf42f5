"""Pools: how many replicas of each role a cluster gets, and the gangs that keep them up."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ltx_ray.config import EngineSpec, PoolSpec
from ltx_ray.pools.gang import Gang

#: GPU time of stage 1 over stage 2 for an HQ clip (ltx-facts.md): how replicas are shared out.
_STAGE_RATIO = 2.3
#: What is left of a replica's speed when it serves both stages in turns, and switches.
_SHARED_SPEED = 0.9


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
    """The shape a user asked for; None means auto.

    A gang of stage 1 has `tp` times `guidance_parallel` ranks, one of stage 2 `stage2_tp` (None: as stage 1)
    times `sequence_parallel`.
    """

    tp: int = 1
    stage1: int | None = None
    stage2: int | None = None
    with_stage2: bool = True
    stage2_tp: int | None = None
    guidance_parallel: int = 1
    sequence_parallel: int = 1

    @property
    def tp_of_stage2(self) -> int:
        return self.tp if self.stage2_tp is None else self.stage2_tp

    @property
    def ranks(self) -> tuple[int, int]:
        """Ranks of a gang of stage 1 and of stage 2."""
        return self.tp * self.guidance_parallel, self.tp_of_stage2 * self.sequence_parallel

    @property
    def shared_ranks(self) -> int | None:
        """Ranks of a gang that serves both stages in turns; None when their layouts do not allow it."""
        widths = {self.guidance_parallel, self.sequence_parallel} - {1}
        if self.tp_of_stage2 != self.tp or len(widths) > 1:
            return None
        return self.tp * max(widths, default=1)

    def check(self, distilled: bool) -> None:
        """Raise ValueError for layouts that nothing can use."""
        legal = [1] if distilled else [1, 2, 3, 4]
        if self.guidance_parallel not in legal:
            why = "the distilled pipeline has no guidance" if distilled else "there are four passes at most"
            raise ValueError(f"--guidance-parallel: {self.guidance_parallel}, legal: {legal} ({why})")
        if self.stage2 == 0 and self.with_stage2 and self.shared_ranks is None:
            raise ValueError(
                f"--stage2-replicas: 0, but stage 1 has --tp {self.tp} --guidance-parallel {self.guidance_parallel} "
                f"and stage 2 --stage2-tp {self.tp_of_stage2} --sequence-parallel {self.sequence_parallel}; "
                f"legal: the same tp, and the same number of ranks or 1"
            )


def choose_replicas(wanted: Wanted, gpus: float) -> tuple[int, int, bool]:
    """(stage-1 replicas, stage-2 replicas, whether text and decode share a card with the DiT).

    No stage-2 replicas means that the stage-1 replicas serve both stages. Without GPUs: one each.
    With GPUs, text and decode together take one card of their own unless only one gang fits. What a user
    left open is chosen for throughput: a replica's speed counts as its ranks.
    """
    ranks1, ranks2 = wanted.ranks
    least = wanted.shared_ranks or ranks1 + ranks2
    if not wanted.with_stage2:
        least = ranks1
    shared_card = gpus > 0 and gpus < least + 1
    if gpus == 0:
        stage1, stage2 = 1, 1
    else:
        stage1, stage2 = _fastest(wanted, int(gpus if shared_card else gpus - 1))
    stage1 = stage1 if wanted.stage1 is None else wanted.stage1
    stage2 = stage2 if wanted.stage2 is None else wanted.stage2
    return stage1, stage2 if wanted.with_stage2 else 0, shared_card


def _fastest(wanted: Wanted, gpus: int) -> tuple[int, int]:
    """Replicas of both stages on `gpus` cards for the most clips an hour; fewer cards, then fewer gangs, break ties."""
    ranks1, ranks2 = wanted.ranks
    if not wanted.with_stage2:
        return max(1, gpus // ranks1), 0
    best = (0.0, 0, 0, 1, 0 if wanted.shared_ranks else 1)
    counts1 = range(1, gpus // ranks1 + 1) if wanted.stage1 is None else [wanted.stage1]
    for stage1 in counts1:
        counts2 = range(1, gpus // ranks2 + 1) if wanted.stage2 is None else [wanted.stage2]
        for stage2 in counts2:
            used = stage1 * ranks1 + stage2 * ranks2
            if stage2 and used <= gpus:
                speed = min(stage1 * ranks1 / _STAGE_RATIO, stage2 * ranks2)
                best = max(best, (speed, -used, -stage1 - stage2, stage1, stage2))
    if (shared := wanted.shared_ranks) and not wanted.stage2:
        stage1 = wanted.stage1 or max(1, gpus // shared)
        # in the stage that does not split its work over all ranks, the others only repeat it
        speed = _SHARED_SPEED * stage1 / (_STAGE_RATIO / ranks1 + 1 / ranks2)
        if wanted.stage2 == 0 or (stage1 * shared <= gpus and speed > best[0]) or best[0] == 0:
            best = (speed, -stage1 * shared, -stage1, stage1, 0)
    return best[3], best[4]


def lay_out(wanted: Wanted, gpus: float, engines: Mapping[str, EngineSpec]) -> list[PoolSpec]:
    """The pools of a run. `engines` by pool name: text, diffusion, decode."""
    stage1, stage2, shared_card = choose_replicas(wanted, gpus)
    # more than half a card, so that two ranks of a gang never land on one
    card = 0.0 if gpus == 0 else 0.6 if shared_card else 1.0
    aside = 0.0 if gpus == 0 else 0.2 if shared_card else 0.5

    def stage_pool(name: str, roles: tuple[str, ...], replicas: int, tp: int, ranks: int) -> PoolSpec:
        spec = engines["diffusion"]
        options = {
            **spec.options, "roles": roles, "tp": tp, "shared_card": shared_card,
            "guidance_parallel": wanted.guidance_parallel if "stage1" in roles else 1,
            "sequence_parallel": wanted.sequence_parallel if "stage2" in roles else 1,
        }  # fmt: skip
        return PoolSpec(
            name, roles, replicas, ranks, _with_options(spec, options), cpus_per_rank=1.0, gpus_per_rank=card
        )

    ranks1, ranks2 = wanted.ranks
    pools = [PoolSpec("text", ("text",), 1, 1, engines["text"], gpus_per_rank=aside)]
    if stage2 or not wanted.with_stage2:
        pools.append(stage_pool("stage1", ("stage1",), stage1, wanted.tp, ranks1))
        if stage2:
            pools.append(stage_pool("stage2", ("stage2",), stage2, wanted.tp_of_stage2, ranks2))
    else:
        assert wanted.shared_ranks is not None, wanted
        pools.append(stage_pool("diffusion", ("stage1", "stage2"), stage1, wanted.tp, wanted.shared_ranks))
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
            f"legal: fewer --stage1-replicas/--stage2-replicas, fewer ranks a replica (--tp and the like), "
            f"or a larger cluster"
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
    #: Gangs lost one after the other to a fault of their own, with no good call in between.
    faults: int = 0
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

    def faulted(self, reason: str) -> None:
        """A gang broke while it served. Raises StartFailed when gangs do nothing else."""
        self.faults += 1
        if self.faults >= self.max_starts_failed:
            raise StartFailed(f"pool {self.spec.name}: {self.faults} gangs broke in a row; the last: {reason}")

    def worked(self) -> None:
        """A call came back well."""
        self.faults = 0

    def started(self) -> None:
        """A gang came up: earlier failures to start are forgiven."""
        self.failures = 0

    def close(self) -> None:
        for gang in list(self.gangs.values()):
            gang.kill()
        self.gangs.clear()
