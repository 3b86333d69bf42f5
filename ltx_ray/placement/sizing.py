"""How many replicas of each role a cluster gets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ltx_ray.config import EngineSpec, GangLayout, PoolSpec
from ltx_ray.stages import DIFFUSION_STAGES, OUTPUT_STAGES, Stage

#: GPU time of stage 1 over stage 2 for an HQ clip (ltx-facts.md): how replicas are shared out.
_STAGE_RATIO = 2.3
#: What is left of a replica's speed when it serves both stages in turns, and switches.
_SHARED_SPEED = 0.9
#: Cards of the DiT that one replica each of text and decode keep up with (ltx-facts.md: 0.1 + 1.75 s of 63 s a clip).
_CARDS_A_PAIR = 31


@dataclass(frozen=True)
class Resources:
    """Slots of a cluster."""

    cpus: float
    gpus: float

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> Resources:
        return cls(resources.get("CPU", 0.0), resources.get("GPU", 0.0))


@dataclass(frozen=True)
class ParallelConfig:
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
    #: Replicas of the DiT that a growing cluster may be asked for, of both stages together; None: what is there.
    max_replicas: int | None = None
    #: Whether text and decode share cards with ranks of the DiT where there are several gangs. The cluster decides: the
    #: rest of a shared card looks free to others, and its memory must suffice for certain.
    share_cards: bool = False

    @property
    def mobile(self) -> bool:
        """Whether replicas may move between the stages: nobody has said how many each gets, and gangs are alike."""
        return self.stage1 is None and self.stage2 is None and self.with_stage2 and self.alike

    @property
    def alike(self) -> bool:
        return self.shared_ranks is not None and self.ranks[0] == self.ranks[1]

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
        if self.max_replicas is not None and (self.stage1 or self.stage2):
            raise ValueError("--max-replicas and a number of --stage1-replicas or --stage2-replicas exclude each other")
        if self.max_replicas is not None and not self.alike:
            raise ValueError(
                f"--max-replicas: {self.max_replicas}, but stage 1 has gangs of {self.ranks[0]} at --tp {self.tp}, "
                f"those of stage 2 {self.ranks[1]} at --stage2-tp {self.tp_of_stage2}; legal: alike in both stages"
            )
        if self.stage2 == 0 and self.with_stage2 and self.shared_ranks is None:
            raise ValueError(
                f"--stage2-replicas: 0, but stage 1 has --tp {self.tp} --guidance-parallel {self.guidance_parallel} "
                f"and stage 2 --stage2-tp {self.tp_of_stage2} --sequence-parallel {self.sequence_parallel}; "
                f"legal: the same tp, and the same number of ranks or 1"
            )


@dataclass(frozen=True)
class PoolSizes:
    """How many of each there are. No stage-2 replicas: those of stage 1 serve both stages (or there is one stage).
    `aside`: of text and of decode, each; `shared_card`: whether these share a card with the DiT."""

    stage1: int
    stage2: int
    aside: int = 1
    shared_card: bool = False
    #: Whether of text and decode only one may be beside the same rank: there are several gangs to share with.
    apart: bool = False


def choose_replicas(parallel: ParallelConfig, gpus: float) -> PoolSizes:
    """What a cluster of `gpus` cards gets. Without GPUs: one each.

    Text and decode together would fill a card of their own for every 31 of the DiT. With fewer they share the DiT's
    cards where the memory allows it (`parallel.share_cards`), or where only one gang fits. What a user left open is
    chosen for throughput: a replica's speed counts as its ranks.
    """
    if parallel.share_cards and parallel.max_replicas is None and 0 < gpus <= _CARDS_A_PAIR:
        chosen = _choose(parallel, gpus, gpus)
        ranks1, ranks2 = parallel.ranks
        if gpus - 1 < chosen.stage1 * ranks1 + chosen.stage2 * ranks2 <= int(gpus):
            return replace(chosen, aside=1, shared_card=True, apart=chosen.stage1 + chosen.stage2 > 1)
        # a card is left over in any case, or there are too few for what was asked for
    return _choose(parallel, gpus, None)


def _choose(parallel: ParallelConfig, gpus: float, for_dit: float | None) -> PoolSizes:
    """`for_dit`: the cards that the DiT may take, None: all but those of text and decode."""
    ranks1, ranks2 = parallel.ranks
    most = parallel.max_replicas
    least = parallel.shared_ranks or ranks1 + ranks2
    if not parallel.with_stage2:
        least = ranks1
    if most is not None and gpus:
        # one may share its cards with text and decode; more get them a card of their own, as below
        gpus = min(max(gpus, ranks1), ranks1 + 1)
        if most > 1:
            gpus = most * ranks1 + math.ceil(most * ranks1 / _CARDS_A_PAIR)
    shared_card = gpus > 0 and gpus < least + 1
    aside = 1 if gpus == 0 or shared_card else math.ceil(gpus / (_CARDS_A_PAIR + 1))
    cards = int(for_dit if for_dit is not None else gpus if shared_card else gpus - aside)
    if gpus == 0:
        stage1, stage2 = 1, 1
        if most is not None:
            stage1, stage2 = _parted(most) if parallel.mobile else (most, 0)
    elif parallel.mobile:
        stage1, stage2 = _parted(max(1, cards // ranks1))
    else:
        stage1, stage2 = _fastest(parallel, cards)
    stage1 = stage1 if parallel.stage1 is None else parallel.stage1
    stage2 = stage2 if parallel.stage2 is None else parallel.stage2
    return PoolSizes(stage1, stage2 if parallel.with_stage2 else 0, aside, shared_card)


def _parted(replicas: int) -> tuple[int, int]:
    """Where replicas that may move begin: in stage 1 and in stage 2."""
    if replicas == 1:
        return 1, 0
    stage2 = min(max(1, round(replicas / (1 + _STAGE_RATIO))), replicas - 1)
    return replicas - stage2, stage2


def _fastest(parallel: ParallelConfig, gpus: int) -> tuple[int, int]:
    """Replicas of both stages on `gpus` cards for the most clips an hour; fewer cards, then fewer gangs, break ties."""
    ranks1, ranks2 = parallel.ranks
    if not parallel.with_stage2:
        return max(1, gpus // ranks1), 0
    best = (0.0, 0, 0, 1, 0 if parallel.shared_ranks else 1)
    counts1 = range(1, gpus // ranks1 + 1) if parallel.stage1 is None else [parallel.stage1]
    for stage1 in counts1:
        counts2 = range(1, gpus // ranks2 + 1) if parallel.stage2 is None else [parallel.stage2]
        for stage2 in counts2:
            used = stage1 * ranks1 + stage2 * ranks2
            if stage2 and used <= gpus:
                speed = min(stage1 * ranks1 / _STAGE_RATIO, stage2 * ranks2)
                best = max(best, (speed, -used, -stage1 - stage2, stage1, stage2))
    if (shared := parallel.shared_ranks) and not parallel.stage2:
        stage1 = parallel.stage1 or max(1, gpus // shared)
        # in the stage that does not split its work over all ranks, the others only repeat it
        speed = _SHARED_SPEED * stage1 / (_STAGE_RATIO / ranks1 + 1 / ranks2)
        if parallel.stage2 == 0 or (stage1 * shared <= gpus and speed > best[0]) or best[0] == 0:
            best = (speed, -stage1 * shared, -stage1, stage1, 0)
    return best[3], best[4]


def lay_out(parallel: ParallelConfig, gpus: float, engines: Mapping[str, EngineSpec]) -> list[PoolSpec]:
    """The pools of a run. `engines` by pool name: text, diffusion, decode."""
    count = choose_replicas(parallel, gpus)
    # more than half a card, so that two ranks of a gang never land on one
    card = 0.0 if gpus == 0 else 0.6 if count.shared_card else 1.0
    aside = 0.0 if gpus == 0 else 0.5 if not count.shared_card else 0.3 if count.apart else 0.2

    def diffusion_pool(
        name: str, roles: tuple[Stage, ...], replicas: int, tp: int, ranks: int, alternates: bool = False
    ) -> PoolSpec:
        layout = GangLayout(
            roles,
            tp,
            guidance_parallel=parallel.guidance_parallel if Stage.STAGE1 in roles else 1,
            sequence_parallel=parallel.sequence_parallel if Stage.STAGE2 in roles else 1,
            alternates=alternates,
            shared_card=count.shared_card,
        )
        engine = replace(engines["diffusion"], layout=layout)
        return PoolSpec(name, roles, replicas, ranks, engine, cpus_per_rank=1.0, gpus_per_rank=card)

    def single_rank_pool(name: str, roles: tuple[Stage, ...]) -> PoolSpec:
        return PoolSpec(name, roles, count.aside, 1, engines[name], gpus_per_rank=aside)

    ranks1, ranks2 = parallel.ranks
    pools = [single_rank_pool("text", (Stage.TEXT,))]
    if count.stage2 or not parallel.with_stage2:
        # A replica that may move between the stages begins in the first of its roles.
        roles1 = (Stage.STAGE1, Stage.STAGE2) if parallel.mobile else (Stage.STAGE1,)
        roles2 = (Stage.STAGE2, Stage.STAGE1) if parallel.mobile else (Stage.STAGE2,)
        pools.append(diffusion_pool("stage1", roles1, count.stage1, parallel.tp, ranks1))
        if count.stage2:
            pools.append(diffusion_pool("stage2", roles2, count.stage2, parallel.tp_of_stage2, ranks2))
    else:
        shared = parallel.shared_ranks
        assert shared is not None, parallel
        pools.append(diffusion_pool("diffusion", DIFFUSION_STAGES, count.stage1, parallel.tp, shared, alternates=True))
    pools.append(single_rank_pool("decode", OUTPUT_STAGES))
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
    # two of them never share a card
    whole = sum(pool.replicas * pool.ranks for pool in pools if pool.gpus_per_rank > 0.5)
    needed = replace(needed, gpus=max(needed.gpus, float(whole)))
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
