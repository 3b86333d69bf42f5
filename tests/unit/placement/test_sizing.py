"""Replicas, ranks and GPUs of each pool."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ltx_ray.config import EngineSpec, ModelFiles, Numerics, PoolSpec
from ltx_ray.placement.sizing import (
    Colocation,
    ParallelConfig,
    PoolSizes,
    Resources,
    check_schedulable,
    choose_replicas,
    lay_out,
    slots_needed,
)
from ltx_ray.pools.pool import Pool, StartFailed

ENGINES = {
    name: EngineSpec(name, ModelFiles("c", "g", "u"), Numerics(), "out") for name in ("text", "diffusion", "decode")
}


OWN, BOTH, SEPARATE = Colocation.NONE, Colocation.BOTH, Colocation.SEPARATE


@pytest.mark.parametrize(
    "parallel, gpus, sizes",
    [
        # without GPUs: one replica of each pool
        (ParallelConfig(), 0, PoolSizes(1, 1)),
        (ParallelConfig(with_stage2=False), 0, PoolSizes(1, 0)),
        (ParallelConfig(stage1=2, stage2=0), 0, PoolSizes(2, 0)),
        # one gang, or one of each stage, takes every GPU: text and decode run beside it
        (ParallelConfig(), 1, PoolSizes(1, 0, colocation=BOTH)),
        (ParallelConfig(tp=8), 8, PoolSizes(1, 0, colocation=BOTH)),
        (ParallelConfig(guidance_parallel=3), 3, PoolSizes(1, 0, colocation=BOTH)),
        (ParallelConfig(guidance_parallel=3, sequence_parallel=2), 5, PoolSizes(1, 1, colocation=BOTH)),
        (ParallelConfig(stage1_sequence_parallel=2, sequence_parallel=2), 2, PoolSizes(1, 0, colocation=BOTH)),
        (ParallelConfig(guidance_parallel=2, stage1_sequence_parallel=2), 4, PoolSizes(1, 0, colocation=BOTH)),
        # otherwise text and decode have a GPU out of every 32, and movable replicas divide the rest 2.3 : 1
        (ParallelConfig(), 2, PoolSizes(1, 0)),
        (ParallelConfig(), 3, PoolSizes(1, 1)),
        (ParallelConfig(), 4, PoolSizes(2, 1)),
        (ParallelConfig(), 8, PoolSizes(5, 2)),
        (ParallelConfig(), 32, PoolSizes(22, 9)),
        (ParallelConfig(), 33, PoolSizes(22, 9, single_rank=2)),
        (ParallelConfig(), 1000, PoolSizes(675, 293, single_rank=32)),
        (ParallelConfig(tp=2), 8, PoolSizes(2, 1)),
        # numbers that the user gave
        (ParallelConfig(stage1=1), 8, PoolSizes(1, 1)),
        (ParallelConfig(stage2=1), 8, PoolSizes(3, 1)),
        (ParallelConfig(stage2=0), 8, PoolSizes(7, 0)),
        (ParallelConfig(stage1=2, stage2=3), 8, PoolSizes(2, 3)),
        (ParallelConfig(with_stage2=False), 8, PoolSizes(7, 0)),
        # layouts that differ between the stages: the fastest division
        (ParallelConfig(guidance_parallel=3, sequence_parallel=2), 8, PoolSizes(1, 1)),
        (ParallelConfig(sequence_parallel=4), 17, PoolSizes(10, 1)),
        (ParallelConfig(tp=2, stage2_tp=1), 8, PoolSizes(2, 2)),
        # of two that are as fast, the one with fewer GPUs
        (ParallelConfig(stage2=2), 9, PoolSizes(5, 2)),
    ],
)
def test_replicas_for_the_most_clips_an_hour(parallel, gpus, sizes):
    assert choose_replicas(parallel, gpus) == sizes


@pytest.mark.parametrize(
    "parallel, gpus, sizes",
    [
        (ParallelConfig(), 0, PoolSizes(1, 1)),
        (ParallelConfig(), 1, PoolSizes(1, 0, colocation=BOTH)),
        (ParallelConfig(), 2, PoolSizes(1, 1, colocation=SEPARATE)),
        (ParallelConfig(), 8, PoolSizes(6, 2, colocation=SEPARATE)),
        (ParallelConfig(), 31, PoolSizes(22, 9, colocation=SEPARATE)),
        # from 32 on, a GPU of their own is busy enough
        (ParallelConfig(), 32, PoolSizes(22, 9)),
        # the DiT leaves a GPU over, and they get it
        (ParallelConfig(tp=2), 3, PoolSizes(1, 0)),
        (ParallelConfig(stage1=1), 8, PoolSizes(1, 1)),
        (ParallelConfig(stage1=2, stage2=3), 8, PoolSizes(2, 3)),
        (ParallelConfig(stage1=4, stage2=4), 8, PoolSizes(4, 4, colocation=SEPARATE)),
        (ParallelConfig(with_stage2=False), 8, PoolSizes(8, 0, colocation=SEPARATE)),
        (ParallelConfig(tp=2), 4, PoolSizes(1, 1, colocation=SEPARATE)),
        (ParallelConfig(tp=8), 8, PoolSizes(1, 0, colocation=BOTH)),
    ],
)
def test_text_and_decode_share_gpus_where_memory_allows(parallel, gpus, sizes):
    assert choose_replicas(parallel, gpus, share_cards=True) == sizes
    check_schedulable(lay_out(parallel, gpus, ENGINES, share_cards=True), Resources(1000, gpus))


@pytest.mark.parametrize(
    "parallel, gpus, sizes",
    [
        (ParallelConfig(max_replicas=100), 0, PoolSizes(70, 30)),
        (ParallelConfig(max_replicas=100), 1, PoolSizes(70, 30, single_rank=4)),
        (ParallelConfig(max_replicas=100), 8, PoolSizes(70, 30, single_rank=4)),
        (ParallelConfig(max_replicas=1), 1, PoolSizes(1, 0, colocation=BOTH)),
        (ParallelConfig(max_replicas=1), 2, PoolSizes(1, 0)),
        (ParallelConfig(max_replicas=4, tp=2), 2, PoolSizes(3, 1)),
        (ParallelConfig(max_replicas=6, stage2=0), 8, PoolSizes(6, 0)),
        (ParallelConfig(max_replicas=6, with_stage2=False), 8, PoolSizes(6, 0)),
    ],
)
@pytest.mark.parametrize("share_cards", [False, True])
def test_a_growing_cluster_is_asked_for_the_replicas_that_were_named(parallel, gpus, sizes, share_cards):
    assert choose_replicas(parallel, gpus, share_cards) == sizes


@pytest.mark.parametrize(
    "colocation, parallel, gpus, share_cards, rank, single_rank",
    [
        (OWN, ParallelConfig(), 8, False, 1.0, 0.5),
        (BOTH, ParallelConfig(), 1, False, 0.6, 0.2),
        (SEPARATE, ParallelConfig(), 8, True, 0.6, 0.3),
    ],
)
def test_what_each_pool_asks_of_a_gpu(colocation, parallel, gpus, share_cards, rank, single_rank):
    assert choose_replicas(parallel, gpus, share_cards).colocation is colocation
    for pool in lay_out(parallel, gpus, ENGINES, share_cards):
        assert pool.gpus_per_rank == (single_rank if pool.name in ("text", "decode") else rank)
        if pool.name not in ("text", "decode"):
            assert pool.engine.layout.shared_card == (colocation is not OWN)
    assert {pool.gpus_per_rank for pool in lay_out(parallel, 0, ENGINES)} == {0.0}


def test_a_movable_replica_begins_in_the_first_of_its_roles():
    pools = {pool.name: pool.roles for pool in lay_out(ParallelConfig(), 8, ENGINES)}
    assert pools == {
        "text": ("text",), "stage1": ("stage1", "stage2"), "stage2": ("stage2", "stage1"),
        "decode": ("decode", "save_latents", "load_latents"),
    }  # fmt: skip
    pools = {pool.name: pool.roles for pool in lay_out(ParallelConfig(stage1=2, stage2=2), 8, ENGINES)}
    assert (pools["stage1"], pools["stage2"]) == (("stage1",), ("stage2",))


def test_a_number_of_replicas_and_their_maximum_exclude_each_other():
    with pytest.raises(ValueError, match="--max-replicas and a number of --stage1-replicas"):
        ParallelConfig(stage1=2, max_replicas=4).check(distilled=False)
    with pytest.raises(ValueError, match=r"--max-replicas: 4, but a gang of stage 1 has 2 ranks at --tp 2"):
        ParallelConfig(tp=2, stage2_tp=1, max_replicas=4).check(distilled=False)
    ParallelConfig(stage2=0, max_replicas=4).check(distilled=False)


@pytest.mark.parametrize("gpus", range(1, 40))
@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(), ParallelConfig(tp=2), ParallelConfig(sequence_parallel=2), ParallelConfig(tp=2, stage2_tp=1)],
)
def test_what_is_chosen_fits_whenever_a_gang_of_each_stage_does(parallel, gpus):
    pools = lay_out(parallel, gpus, ENGINES)
    least = parallel.alternating_ranks or sum(parallel.ranks)
    if gpus >= least:
        check_schedulable(pools, Resources(1000, gpus))
    else:
        with pytest.raises(ValueError, match=rf"GPUs: [\d.]+ needed, {gpus} free"):
            check_schedulable(pools, Resources(1000, gpus))


def test_each_pool_has_its_own_layout():
    parallel = ParallelConfig(tp=2, stage2_tp=1, guidance_parallel=3, sequence_parallel=4, stage1=1, stage2=2)
    pools = {pool.name: pool for pool in lay_out(parallel, 16, ENGINES)}
    first, second = pools["stage1"], pools["stage2"]
    assert (first.ranks, first.engine.layout.tp, first.engine.layout.guidance_parallel) == (6, 2, 3)
    assert (second.ranks, second.engine.layout.tp, second.engine.layout.sequence_parallel) == (4, 1, 4)
    assert (first.engine.layout.sequence_parallel, second.engine.layout.guidance_parallel) == (1, 1)
    assert slots_needed(list(pools.values())).gpus == 6 + 8 + 1


def test_a_gang_for_both_stages_has_ranks_for_either():
    (_, pool, _) = lay_out(ParallelConfig(tp=2, guidance_parallel=3, stage2=0), 8, ENGINES)
    assert (pool.roles, pool.ranks, pool.engine.layout.guidance_parallel) == (("stage1", "stage2"), 6, 3)


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(tp=2, stage2_tp=1, stage2=0), ParallelConfig(guidance_parallel=3, sequence_parallel=2, stage2=0)],
)
def test_layouts_in_which_no_gang_can_serve_both_stages(parallel):
    with pytest.raises(ValueError, match=r"--stage2-replicas: 0, but stage 1 has --tp"):
        parallel.check(distilled=False)


def test_ranks_may_share_passes_and_the_tokens_of_each():
    parallel = ParallelConfig(tp=2, guidance_parallel=2, stage1_sequence_parallel=3, sequence_parallel=6)
    assert parallel.ranks == (12, 12) and parallel.alternating_ranks == 12 and parallel.interchangeable
    (_, first, second, _) = lay_out(replace(parallel, stage1=1, stage2=1), 25, ENGINES)
    assert (first.ranks, first.engine.layout.stage1_sequence_parallel) == (12, 3)
    assert (second.ranks, second.engine.layout.stage1_sequence_parallel) == (12, 1)
    assert replace(parallel, sequence_parallel=4).alternating_ranks is None


def test_guidance_passes_are_shared_over_as_many_ranks_as_there_are_passes():
    for n in (1, 2, 3, 4):
        ParallelConfig(guidance_parallel=n).check(distilled=False)
    with pytest.raises(ValueError, match=r"--guidance-parallel: 5, legal: \[1, 2, 3, 4\]"):
        ParallelConfig(guidance_parallel=5).check(distilled=False)
    with pytest.raises(ValueError, match=r"--guidance-parallel: 2, legal: \[1\] \(the distilled pipeline has no"):
        ParallelConfig(guidance_parallel=2).check(distilled=True)


# --- a pool's replicas ---------------------------------------------------------------------------


def pool(replicas: int, most_failed: int = 3) -> Pool:
    return Pool(PoolSpec("stage1", ("stage1",), replicas, 1, ENGINES["diffusion"]), most_failed)


def test_what_is_missing_is_started_under_new_names():
    a_pool = pool(2)
    assert a_pool.missing() == ["stage1-0", "stage1-1"]
    assert a_pool.missing() == []
    a_pool.started("stage1-0")
    a_pool.lost("stage1-0", served=True, reason="gone")
    assert a_pool.missing() == ["stage1-2"]
    assert pool(5).missing(at_most=1) == ["stage1-0"]


def test_a_large_pool_doubles_as_its_replicas_come_up():
    a_pool, asked = pool(100), []
    while len(a_pool.replicas) < 100:
        names = a_pool.missing()
        asked.append(len(names))
        for name in names:
            a_pool.started(name)
    assert asked == [16, 16, 32, 36]


def test_starts_that_keep_failing_end_the_run():
    a_pool = pool(1, most_failed=3)
    for fails in (True, True, False, True, True):
        (name,) = a_pool.missing()
        if fails:
            a_pool.lost(name, served=False, reason="no such file")
        else:
            a_pool.started(name)
            a_pool.lost(name, served=True, reason="killed")
    (name,) = a_pool.missing()
    with pytest.raises(StartFailed, match="pool stage1: 3 gangs failed to start; the last: no such file"):
        a_pool.lost(name, served=False, reason="no such file")


def test_gangs_that_break_with_no_good_call_in_between_end_the_run():
    a_pool = pool(1, most_failed=2)
    a_pool.broke("half merged")
    a_pool.call_succeeded()
    a_pool.broke("half merged")
    with pytest.raises(StartFailed, match="pool stage1: 2 consecutive gangs broke; the last: half merged"):
        a_pool.broke("half merged")


@pytest.mark.parametrize(
    ("parallel", "gpus"), [(ParallelConfig(stage1=3, stage2=1), 3), (ParallelConfig(stage1=8, stage2=4), 8)]
)
@pytest.mark.parametrize("share", [True, False])
def test_each_rank_of_the_dit_needs_a_gpu_of_its_own(parallel, gpus, share):
    """The fractions of a GPU that the pools ask for add up to the GPUs that there are, and still do not fit."""
    pools = lay_out(parallel, gpus, ENGINES, share)
    with pytest.raises(ValueError, match=rf"GPUs: \d+ needed, {gpus} free"):
        check_schedulable(pools, Resources(1000, gpus))
