"""How many replicas each pool gets, and the pools that follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ltx_ray.config import EngineSpec, GangLayout, PoolSpec
from ltx_ray.placement.output_pools import Colocation, Node, OutputPools, OutputSizing
from ltx_ray.stages import DIFFUSION_STAGES, Stage

#: GPU time of stage 1 over that of stage 2 for an HQ clip on one H100 (docs/benchmarks.md#parts-of-a-clip).
_STAGE_RATIO = 2.3
#: Speed of a replica that alternates between the stages, and so has to switch, over that of one that does not.
_ALTERNATING_SPEED = 0.9
#: GPUs of which one that the DiT leaves over is worth more to text and decode than a place beside the DiT.
_FEW_GPUS = 31


@dataclass(frozen=True)
class Resources:
    """Slots of a cluster."""

    cpus: float
    gpus: float

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> Resources:
        """From what Ray calls a cluster's resources."""
        return cls(resources.get("CPU", 0.0), resources.get("GPU", 0.0))


@dataclass(frozen=True)
class ParallelConfig:
    """The layout and the numbers of replicas that a user asked for.

    A gang of stage 1 has `tp` times `guidance_parallel` times `stage1_sequence_parallel` ranks, and one of stage 2 has
    `stage2_tp` times `sequence_parallel`.
    """

    tp: int = 1
    #: Replicas of each stage. None leaves the number to `choose_replicas`; `stage2` 0 has those of stage 1 serve both.
    stage1: int | None = None
    stage2: int | None = None
    #: Replicas of text and of decode. None: the driver sizes them by what it measures.
    text: int | None = None
    decode: int | None = None
    #: Whether the run renders stage 2 at all.
    with_stage2: bool = True
    #: None: as `tp`.
    stage2_tp: int | None = None
    guidance_parallel: int = 1
    sequence_parallel: int = 1
    stage1_sequence_parallel: int = 1
    #: Replicas of the DiT, of both stages together, that a growing cluster may be asked for. None: as many as fit on
    #: the GPUs that are free.
    max_replicas: int | None = None
    #: GPUs that a run without `max_replicas` may take in all, those of nodes that join later included. None: any.
    max_gpus: int | None = None
    #: What a layout is chosen for where none is named (layouts.py): "throughput", or "latency" for one clip soonest.
    optimize: str = "throughput"

    @property
    def names_a_layout(self) -> bool:
        """Whether the user has divided something over ranks."""
        return self.ranks != (1, 1) or self.stage2_tp is not None

    @property
    def tp_of_stage2(self) -> int:
        return self.tp if self.stage2_tp is None else self.stage2_tp

    @property
    def ranks(self) -> tuple[int, int]:
        """Ranks of a gang of stage 1 and of a gang of stage 2."""
        stage1, stage2 = self._peers
        return self.tp * stage1, self.tp_of_stage2 * stage2

    @property
    def _peers(self) -> tuple[int, int]:
        """Ranks that hold the same shard, in a gang of stage 1 and in one of stage 2."""
        return self.guidance_parallel * self.stage1_sequence_parallel, self.sequence_parallel

    @property
    def alternating_ranks(self) -> int | None:
        """Ranks of a gang that serves both stages in turns; None when their layouts do not allow it."""
        widths = set(self._peers) - {1}
        if self.tp_of_stage2 != self.tp or len(widths) > 1:
            return None
        return self.tp * max(widths, default=1)

    @property
    def interchangeable(self) -> bool:
        """Whether a gang of one stage can serve the other: both stages have the same layout."""
        return self.alternating_ranks is not None and self.ranks[0] == self.ranks[1]

    @property
    def movable(self) -> bool:
        """Whether the driver may move replicas between the stages: their numbers are open, their gangs the same."""
        return self.stage1 is None and self.stage2 is None and self.with_stage2 and self.interchangeable

    @property
    def may_grow(self) -> bool:
        """Whether a run may take GPUs that join its cluster later: nobody has said how many replicas there are."""
        return self.max_replicas is None and self.stage1 is None and not self.stage2

    @property
    def flags(self) -> str:
        """The options that ask for this layout."""
        numbers = {
            "--tp": self.tp,
            "--stage2-tp": self.stage2_tp or 1,
            "--guidance-parallel": self.guidance_parallel,
            "--stage1-sequence-parallel": self.stage1_sequence_parallel,
            "--sequence-parallel": self.sequence_parallel,
        }
        return " ".join(f"{flag} {number}" for flag, number in numbers.items() if number > 1)

    @property
    def _names_replicas(self) -> bool:
        return (self.stage1, self.stage2, self.max_replicas) != (None, None, None)

    def check(self, distilled: bool) -> None:
        """Raise ValueError for a layout that no pipeline can use, and for options that contradict each other."""
        legal = [1] if distilled else [1, 2, 3, 4]
        if self.guidance_parallel not in legal:
            why = "the distilled pipeline has no guidance" if distilled else "there are four passes at most"
            raise ValueError(f"--guidance-parallel: {self.guidance_parallel}, legal: {legal} ({why})")
        if self.optimize == "latency" and (self.names_a_layout or self._names_replicas):
            raise ValueError("--optimize: 'latency' with ranks or replicas of your own, legal: one of the two")
        if self.max_replicas is not None and (self.stage1 or self.stage2):
            raise ValueError("--max-replicas and a number of --stage1-replicas or --stage2-replicas exclude each other")
        if self.max_gpus is not None and self._names_replicas:
            raise ValueError(f"--max-gpus: {self.max_gpus} with a number of replicas of the DiT, legal: one of the two")
        if self.max_replicas is not None and not self.interchangeable:
            raise ValueError(
                f"--max-replicas: {self.max_replicas}, but a gang of stage 1 has {self.ranks[0]} ranks at --tp "
                f"{self.tp}, and one of stage 2 has {self.ranks[1]} at --stage2-tp {self.tp_of_stage2}; "
                f"legal: the same layout in both stages"
            )
        if self.stage2 == 0 and self.with_stage2 and self.alternating_ranks is None:
            raise ValueError(
                f"--stage2-replicas: 0, but stage 1 has --tp {self.tp} --guidance-parallel {self.guidance_parallel} "
                f"--stage1-sequence-parallel {self.stage1_sequence_parallel} and stage 2 --stage2-tp "
                f"{self.tp_of_stage2} --sequence-parallel {self.sequence_parallel}; "
                f"legal: the same tp, and the same number of ranks or 1"
            )


@dataclass(frozen=True)
class PoolSizes:
    """Replicas of each pool. With `stage2` 0 those of stage 1 serve both stages, or the run has one stage."""

    stage1: int
    stage2: int
    output: OutputPools
    colocation: Colocation = Colocation.NONE


def choose_replicas(
    parallel: ParallelConfig,
    gpus: float,
    share_cards: bool = False,
    nodes: Sequence[Node] = (),
    roomy_cards: bool = True,
) -> PoolSizes:
    """Replicas for a cluster with `gpus` free GPUs; those of a machine without any are one of each pool.

    What the user left open is chosen for the most clips/h, where a replica's speed counts as its ranks.
    `share_cards`: text and decode may run beside the DiT, whose GPUs certainly have the memory. They do, unless the DiT
    leaves a GPU over. In any case they do when the DiT's smallest layout takes every GPU. `nodes`: those with GPUs, as
    far as they are known. `roomy_cards`: whether the GPUs have 64 GiB.
    """
    if parallel.max_replicas is not None and (there := sum(node.gpus for node in nodes)):
        # The nodes to come are like those that are there.
        nodes = tuple(nodes) * math.ceil(parallel.max_replicas * parallel.ranks[0] / there)
    output = OutputSizing(parallel.text, parallel.decode, parallel.with_stage2, roomy_cards, nodes)
    if not gpus:
        return PoolSizes(*_replicas_without_gpus(parallel), output.without_gpus())
    if nodes and parallel.max_replicas is None:
        gpus = _gpus_with_cpus(gpus, nodes, output)
    grows = parallel.max_replicas is not None
    if share_cards:
        dit = parallel.max_replicas * parallel.ranks[0] if parallel.max_replicas is not None else int(gpus)
        stage1, stage2 = _diffusion_replicas(parallel, dit)
        taken = _dit_gpus(parallel, stage1, stage2)
        # A few GPUs are enough work for one that the DiT leaves over.
        if taken == dit or (taken < dit and dit > _FEW_GPUS):
            several_gangs = stage1 + stage2 > 1
            beside = output.beside_ranks(taken) if several_gangs else output.beside_one_gang(taken)
            return PoolSizes(stage1, stage2, beside, Colocation.SEPARATE if several_gangs else Colocation.BOTH)
    if parallel.max_replicas is not None:
        gpus = _gpus_to_grow_to(parallel, parallel.max_replicas, gpus, output)
    if gpus < _fewest_gpus(parallel) + 1:
        stage1, stage2 = _diffusion_replicas(parallel, int(gpus))
        return PoolSizes(stage1, stage2, output.beside_one_gang(int(gpus)), Colocation.BOTH)
    own = 1 if grows and parallel.max_replicas == 1 else output.own_gpus(gpus)
    stage1, stage2 = _diffusion_replicas(parallel, int(gpus - own))
    return PoolSizes(stage1, stage2, output.on_own_gpus(_dit_gpus(parallel, stage1, stage2), own))


def _gpus_with_cpus(gpus: float, nodes: Sequence[Node], output: OutputSizing) -> float:
    """Those of `gpus` GPUs that can be used, when each rank of the DiT and each other replica has a CPU."""
    cpus = sum(node.cpus for node in nodes)
    beside = output.fewest_cpus(gpus)
    return gpus if cpus >= gpus + beside else max(1.0, cpus - beside)


def _dit_gpus(parallel: ParallelConfig, stage1: int, stage2: int) -> int:
    """GPUs that replicas of the DiT take."""
    ranks1, ranks2 = parallel.ranks
    if not stage2 and parallel.with_stage2:
        return stage1 * (parallel.alternating_ranks or ranks1)
    return stage1 * ranks1 + stage2 * ranks2


def _replicas_without_gpus(parallel: ParallelConfig) -> tuple[int, int]:
    if parallel.max_replicas is None:
        return _as_requested(parallel, 1, 1)
    split = _movable_split(parallel.max_replicas) if parallel.movable else (parallel.max_replicas, 0)
    return _as_requested(parallel, *split)


def _gpus_to_grow_to(parallel: ParallelConfig, replicas: int, gpus: float, output: OutputSizing) -> float:
    """GPUs of a cluster that has grown to `replicas` replicas of the DiT, with those of text and decode."""
    ranks = parallel.ranks[0]
    if replicas == 1:
        # One more GPU is for text and decode. The only replica shares its own with them when that one is not free.
        return min(max(gpus, ranks), ranks + 1)
    total = replicas * ranks + 1
    while total - output.own_gpus(total) < replicas * ranks:
        total += 1
    return total


def _fewest_gpus(parallel: ParallelConfig) -> int:
    """GPUs of the smallest DiT that renders: one gang for all stages, or one of each stage."""
    if not parallel.with_stage2:
        return parallel.ranks[0]
    return parallel.alternating_ranks or sum(parallel.ranks)


def _diffusion_replicas(parallel: ParallelConfig, gpus: int) -> tuple[int, int]:
    """Replicas of stage 1 and of stage 2 on `gpus` GPUs that the DiT has to itself; as many as the user asked for."""
    if parallel.movable:
        return _movable_split(max(1, gpus // parallel.ranks[0]))
    return _as_requested(parallel, *_fastest_split(parallel, gpus))


def _as_requested(parallel: ParallelConfig, stage1: int, stage2: int) -> tuple[int, int]:
    """The chosen numbers, but for those that the user gave."""
    stage1 = stage1 if parallel.stage1 is None else parallel.stage1
    stage2 = stage2 if parallel.stage2 is None else parallel.stage2
    return stage1, stage2 if parallel.with_stage2 else 0


def _movable_split(replicas: int) -> tuple[int, int]:
    """The stages in which movable replicas begin: divided as the stages' times are, with one in each stage at least."""
    if replicas == 1:
        return 1, 0
    stage2 = min(max(1, round(replicas / (1 + _STAGE_RATIO))), replicas - 1)
    return replicas - stage2, stage2


class _Split(NamedTuple):
    """A division of GPUs among the stages. The largest is the best: fewer GPUs, then fewer gangs break a tie."""

    #: Clips in the time that one rank takes for stage 2.
    speed: float
    gpus_left: int
    minus_gangs: int
    stage1: int
    stage2: int


def _fastest_split(parallel: ParallelConfig, gpus: int) -> tuple[int, int]:
    """Replicas of stage 1 and of stage 2 for the most clips/h on `gpus` GPUs; the fewest when none fits."""
    if not parallel.with_stage2:
        return max(1, gpus // parallel.ranks[0]), 0
    dedicated = max(_dedicated_splits(parallel, gpus), default=None)
    alternating = _alternating_split(parallel, gpus)
    if alternating is None:
        return (dedicated.stage1, dedicated.stage2) if dedicated else (1, 1)
    if dedicated is None:
        return alternating.stage1, alternating.stage2
    fits = alternating.gpus_left >= 0
    best = alternating if fits and alternating.speed > dedicated.speed else dedicated
    return best.stage1, best.stage2


def _dedicated_splits(parallel: ParallelConfig, gpus: int) -> Iterator[_Split]:
    """Every division of `gpus` GPUs in which each replica serves one stage. The slower stage decides the speed."""
    ranks1, ranks2 = parallel.ranks
    for stage1 in range(1, gpus // ranks1 + 1) if parallel.stage1 is None else (parallel.stage1,):
        left = gpus - stage1 * ranks1
        for stage2 in range(1, left // ranks2 + 1) if parallel.stage2 is None else (parallel.stage2,):
            if stage2 and stage2 * ranks2 <= left:
                speed = min(stage1 * ranks1 / _STAGE_RATIO, stage2 * ranks2)
                yield _Split(speed, left - stage2 * ranks2, -stage1 - stage2, stage1, stage2)


def _alternating_split(parallel: ParallelConfig, gpus: int) -> _Split | None:
    """As many replicas as fit, each for both stages; None where layouts or numbers of replicas do not allow it.

    In the stage that does not divide its work among all ranks of a gang, the other ranks repeat it.
    """
    ranks = parallel.alternating_ranks
    if not ranks or parallel.stage2:
        return None
    ranks1, ranks2 = parallel.ranks
    stage1 = parallel.stage1 or max(1, gpus // ranks)
    speed = _ALTERNATING_SPEED * stage1 / (_STAGE_RATIO / ranks1 + 1 / ranks2)
    return _Split(speed, gpus - stage1 * ranks, -stage1, stage1, 0)


def lay_out(
    parallel: ParallelConfig,
    gpus: float,
    engines: Mapping[str, EngineSpec],
    share_cards: bool = False,
    nodes: Sequence[Node] = (),
    roomy_cards: bool = True,
) -> list[PoolSpec]:
    """The pools of a run. `engines` by kind: text, diffusion, decode. The other arguments as in `choose_replicas`."""
    sizes = choose_replicas(parallel, gpus, share_cards, nodes, roomy_cards)
    output = sizes.output

    def diffusion_pool(
        name: str, roles: tuple[Stage, ...], replicas: int, tp: int, ranks: int, alternates: bool = False
    ) -> PoolSpec:
        layout = GangLayout(
            roles,
            tp,
            guidance_parallel=parallel.guidance_parallel if Stage.STAGE1 in roles else 1,
            sequence_parallel=parallel.sequence_parallel if Stage.STAGE2 in roles else 1,
            stage1_sequence_parallel=parallel.stage1_sequence_parallel if Stage.STAGE1 in roles else 1,
            alternates=alternates,
            shared_card=sizes.colocation is not Colocation.NONE,
        )
        engine = replace(engines["diffusion"], layout=layout)
        return PoolSpec(name, roles, replicas, ranks, engine, gpus_per_rank=output.rank_gpus)

    ranks1, ranks2 = parallel.ranks
    text, decode = output.text_pool(engines["text"]), output.decode_pool(engines["decode"])
    pools = [text]
    if sizes.stage2 or not parallel.with_stage2:
        # A movable replica begins in the first of its roles.
        roles1 = (Stage.STAGE1, Stage.STAGE2) if parallel.movable else (Stage.STAGE1,)
        roles2 = (Stage.STAGE2, Stage.STAGE1) if parallel.movable else (Stage.STAGE2,)
        pools.append(diffusion_pool("stage1", roles1, sizes.stage1, parallel.tp, ranks1))
        if sizes.stage2:
            pools.append(diffusion_pool("stage2", roles2, sizes.stage2, parallel.tp_of_stage2, ranks2))
    else:
        ranks = parallel.alternating_ranks
        assert ranks is not None, parallel
        pools.append(diffusion_pool("diffusion", DIFFUSION_STAGES, sizes.stage1, parallel.tp, ranks, alternates=True))
    pools.append(decode)
    return pools


def slots_needed(pools: list[PoolSpec]) -> Resources:
    """CPU and GPU slots that all gangs of `pools` take together."""
    # A rank that asks for more than half a GPU needs one of its own, even where the fractions add up to fewer GPUs.
    ranks = sum(p.replicas * p.ranks for p in pools if p.gpus_per_rank > 0.5)
    parts = math.ceil(round(sum(p.replicas * p.gpus_per_rank for p in pools if p.gpus_per_rank <= 0.5), 6))
    beside = all(p.gpus_per_rank < 1 for p in pools)
    return Resources(
        cpus=sum(p.replicas * p.ranks * p.cpus_per_rank for p in pools),
        gpus=float(ranks if beside else ranks + parts),
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
            f"legal: fewer --stage1-replicas/--stage2-replicas, fewer ranks per replica (--tp and the like), "
            f"or a larger cluster"
        )
