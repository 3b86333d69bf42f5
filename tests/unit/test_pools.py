"""How replicas, ranks and cards are shared out."""

from __future__ import annotations

import pytest

from ltx_ray.config import EngineSpec, ModelFiles, Numerics
from ltx_ray.pools.pool import Resources, Wanted, check_schedulable, choose_replicas, lay_out, slots_needed

ENGINES = {
    name: EngineSpec(name, ModelFiles("c", "g", "u"), Numerics(), "out") for name in ("text", "diffusion", "decode")
}


@pytest.mark.parametrize(
    "wanted, gpus, replicas",
    [
        (Wanted(), 0, (1, 1, False)),
        (Wanted(), 1, (1, 0, True)),
        (Wanted(), 2, (1, 0, False)),
        (Wanted(), 3, (2, 0, False)),
        (Wanted(), 4, (2, 1, False)),
        (Wanted(), 8, (5, 2, False)),
        (Wanted(tp=2), 8, (2, 1, False)),
        (Wanted(tp=8), 8, (1, 0, True)),
        (Wanted(stage1=1), 8, (1, 1, False)),
        (Wanted(stage2=1), 8, (3, 1, False)),
        (Wanted(stage2=0), 8, (7, 0, False)),
        (Wanted(stage1=2, stage2=3), 8, (2, 3, False)),
        (Wanted(with_stage2=False), 8, (7, 0, False)),
        (Wanted(guidance_parallel=3, sequence_parallel=2), 8, (1, 1, False)),
        (Wanted(guidance_parallel=3, sequence_parallel=2), 5, (1, 1, True)),
        (Wanted(guidance_parallel=3), 3, (1, 0, True)),
        (Wanted(sequence_parallel=4), 17, (10, 1, False)),
    ],
)
def test_replicas_for_the_most_clips_an_hour(wanted, gpus, replicas):
    assert choose_replicas(wanted, gpus) == replicas


@pytest.mark.parametrize("gpus", range(1, 40))
@pytest.mark.parametrize("wanted", [Wanted(), Wanted(tp=2), Wanted(sequence_parallel=2), Wanted(tp=2, stage2_tp=1)])
def test_what_is_chosen_fits_whenever_a_pair_of_gangs_does(wanted, gpus):
    pools = lay_out(wanted, gpus, ENGINES)
    least = wanted.shared_ranks or sum(wanted.ranks)
    if gpus >= least:
        check_schedulable(pools, Resources(1000, gpus))
    else:
        with pytest.raises(ValueError, match=rf"GPUs: [\d.]+ needed, {gpus} free"):
            check_schedulable(pools, Resources(1000, gpus))


def test_each_pool_has_its_own_layout():
    wanted = Wanted(tp=2, stage2_tp=1, guidance_parallel=3, sequence_parallel=4, stage1=1, stage2=2)
    pools = {pool.name: pool for pool in lay_out(wanted, 16, ENGINES)}
    first, second = pools["stage1"], pools["stage2"]
    assert (first.ranks, first.engine.options["tp"], first.engine.options["guidance_parallel"]) == (6, 2, 3)
    assert (second.ranks, second.engine.options["tp"], second.engine.options["sequence_parallel"]) == (4, 1, 4)
    assert (first.engine.options["sequence_parallel"], second.engine.options["guidance_parallel"]) == (1, 1)
    assert slots_needed(list(pools.values())).gpus == 6 + 8 + 1


def test_a_gang_for_both_stages_has_ranks_for_either():
    (_, pool, _) = lay_out(Wanted(tp=2, guidance_parallel=3, stage2=0), 8, ENGINES)
    assert (pool.roles, pool.ranks, pool.engine.options["guidance_parallel"]) == (("stage1", "stage2"), 6, 3)


@pytest.mark.parametrize(
    "wanted",
    [Wanted(tp=2, stage2_tp=1, stage2=0), Wanted(guidance_parallel=3, sequence_parallel=2, stage2=0)],
)
def test_layouts_that_no_gang_serves_in_turns(wanted):
    with pytest.raises(ValueError, match=r"--stage2-replicas: 0, but stage 1 has --tp"):
        wanted.check(distilled=False)


def test_guidance_passes_are_shared_over_as_many_ranks_as_there_are_passes():
    for n in (1, 2, 3, 4):
        Wanted(guidance_parallel=n).check(distilled=False)
    with pytest.raises(ValueError, match=r"--guidance-parallel: 5, legal: \[1, 2, 3, 4\]"):
        Wanted(guidance_parallel=5).check(distilled=False)
    with pytest.raises(ValueError, match=r"--guidance-parallel: 2, legal: \[1\] \(the distilled pipeline has no"):
        Wanted(guidance_parallel=2).check(distilled=True)
