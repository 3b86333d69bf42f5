"""Replicas, ranks and GPUs of each pool."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ltx_ray.config import EngineSpec, ModelFiles, Numerics, PoolSpec
from ltx_ray.placement.output_pools import Colocation, Node
from ltx_ray.placement.sizing import (
    ParallelConfig,
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


def sizes(stage1, stage2, text=1, decode=1, colocation=OWN):
    return stage1, stage2, text, decode, colocation


def chosen(*arguments, **options):
    found = choose_replicas(*arguments, **options)
    return sizes(found.stage1, found.stage2, found.output.text, found.output.decode, found.colocation)


@pytest.mark.parametrize(
    "parallel, gpus, expected",
    [
        # without GPUs: one replica of each pool
        (ParallelConfig(), 0, sizes(1, 1)),
        (ParallelConfig(with_stage2=False), 0, sizes(1, 0)),
        (ParallelConfig(stage1=2, stage2=0), 0, sizes(2, 0)),
        # one gang, or one of each stage, takes every GPU: text and decode run beside it
        (ParallelConfig(), 1, sizes(1, 0, colocation=BOTH)),
        (ParallelConfig(tp=8), 8, sizes(1, 0, colocation=BOTH)),
        (ParallelConfig(guidance_parallel=3), 3, sizes(1, 0, colocation=BOTH)),
        (ParallelConfig(guidance_parallel=3, sequence_parallel=2), 5, sizes(1, 1, colocation=BOTH)),
        (ParallelConfig(stage1_sequence_parallel=2, sequence_parallel=2), 2, sizes(1, 0, colocation=BOTH)),
        (ParallelConfig(guidance_parallel=2, stage1_sequence_parallel=2), 4, sizes(1, 0, colocation=BOTH)),
        # otherwise text and decode have a GPU out of every 32, with as many decoders as keep up with the DiT, and
        # movable replicas divide the rest 2.3 : 1
        (ParallelConfig(), 2, sizes(1, 0)),
        (ParallelConfig(), 3, sizes(1, 1)),
        (ParallelConfig(), 4, sizes(2, 1)),
        (ParallelConfig(), 8, sizes(5, 2)),
        (ParallelConfig(), 32, sizes(22, 9, decode=3)),
        (ParallelConfig(), 33, sizes(22, 9, decode=4)),
        (ParallelConfig(), 64, sizes(43, 19, decode=7)),
        (ParallelConfig(), 1000, sizes(675, 293, text=2, decode=100)),
        (ParallelConfig(tp=2), 8, sizes(2, 1)),
        # numbers that the user gave
        (ParallelConfig(stage1=1), 8, sizes(1, 1)),
        (ParallelConfig(stage2=1), 8, sizes(3, 1)),
        (ParallelConfig(stage2=0), 8, sizes(7, 0)),
        (ParallelConfig(stage1=2, stage2=3), 8, sizes(2, 3)),
        (ParallelConfig(with_stage2=False), 8, sizes(7, 0)),
        # layouts that differ between the stages: the fastest division
        (ParallelConfig(guidance_parallel=3, sequence_parallel=2), 8, sizes(1, 1)),
        (ParallelConfig(sequence_parallel=4), 17, sizes(10, 1, decode=2)),
        (ParallelConfig(tp=2, stage2_tp=1), 8, sizes(2, 2)),
        # of two that are as fast, the one with fewer GPUs
        (ParallelConfig(stage2=2), 9, sizes(5, 2)),
    ],
)
def test_replicas_for_the_most_clips_an_hour(parallel, gpus, expected):
    assert chosen(parallel, gpus) == expected


@pytest.mark.parametrize(
    "parallel, gpus, expected",
    [
        (ParallelConfig(), 0, sizes(1, 1)),
        (ParallelConfig(), 1, sizes(1, 0, colocation=BOTH)),
        (ParallelConfig(), 2, sizes(1, 1, colocation=SEPARATE)),
        (ParallelConfig(), 8, sizes(6, 2, colocation=SEPARATE)),
        (ParallelConfig(), 31, sizes(22, 9, decode=4, colocation=SEPARATE)),
        (ParallelConfig(), 64, sizes(45, 19, decode=7, colocation=SEPARATE)),
        (ParallelConfig(), 1000, sizes(697, 303, text=3, decode=104, colocation=SEPARATE)),
        # the DiT leaves a GPU over, and they get it
        (ParallelConfig(tp=2), 3, sizes(1, 0)),
        # and of many GPUs, one is too little for decode
        (ParallelConfig(tp=2), 65, sizes(22, 10, decode=7, colocation=SEPARATE)),
        (ParallelConfig(stage1=1), 8, sizes(1, 1)),
        (ParallelConfig(stage1=2, stage2=3), 8, sizes(2, 3)),
        (ParallelConfig(stage1=4, stage2=4), 8, sizes(4, 4, colocation=SEPARATE)),
        (ParallelConfig(with_stage2=False), 8, sizes(8, 0, decode=2, colocation=SEPARATE)),
        (ParallelConfig(tp=2), 4, sizes(1, 1, colocation=SEPARATE)),
        (ParallelConfig(tp=8), 8, sizes(1, 0, colocation=BOTH)),
    ],
)
def test_text_and_decode_share_gpus_where_memory_allows(parallel, gpus, expected):
    assert chosen(parallel, gpus, share_cards=True) == expected
    check_schedulable(lay_out(parallel, gpus, ENGINES, share_cards=True), Resources(10_000, gpus))


@pytest.mark.parametrize(
    "parallel, gpus, expected",
    [
        (ParallelConfig(max_replicas=100), 0, sizes(70, 30)),
        (ParallelConfig(max_replicas=100), 1, sizes(70, 30, decode=11)),
        (ParallelConfig(max_replicas=100), 8, sizes(70, 30, decode=11)),
        (ParallelConfig(max_replicas=1), 1, sizes(1, 0, colocation=BOTH)),
        (ParallelConfig(max_replicas=1), 2, sizes(1, 0)),
        (ParallelConfig(max_replicas=4, tp=2), 2, sizes(3, 1)),
        (ParallelConfig(max_replicas=6, stage2=0), 8, sizes(6, 0)),
        (ParallelConfig(max_replicas=6, with_stage2=False), 8, sizes(6, 0)),
    ],
)
def test_a_growing_cluster_is_asked_for_the_replicas_that_were_named(parallel, gpus, expected):
    assert chosen(parallel, gpus) == expected
    if gpus and parallel.max_replicas > 1:
        # With memory to spare, text and decode run beside them.
        assert chosen(parallel, gpus, share_cards=True)[:2] == expected[:2]
        assert choose_replicas(parallel, gpus, share_cards=True).colocation is SEPARATE


@pytest.mark.parametrize(
    "colocation, parallel, gpus, share_cards, rank, single_rank",
    [
        (OWN, ParallelConfig(), 8, False, 1.0, (0.4, 0.2)),
        (BOTH, ParallelConfig(), 1, False, 0.6, (0.2, 0.2)),
        (SEPARATE, ParallelConfig(), 8, True, 0.6, (0.3, 0.3)),
    ],
)
def test_what_each_pool_asks_of_a_gpu(colocation, parallel, gpus, share_cards, rank, single_rank):
    assert choose_replicas(parallel, gpus, share_cards).colocation is colocation
    for pool in lay_out(parallel, gpus, ENGINES, share_cards):
        assert pool.gpus_per_rank == dict(zip(("text", "decode"), single_rank)).get(pool.name, rank)
        if pool.name not in ("text", "decode"):
            assert pool.engine.layout.shared_card == (colocation is not OWN)
    assert {pool.gpus_per_rank for pool in lay_out(parallel, 0, ENGINES)} == {0.0}


@pytest.mark.parametrize(
    ("nodes", "cpus", "most"),
    [
        ([Node(64, 8)] * 8, 8, 55),  # as many as x264 has threads, and seven such replicas on a node
        ([Node(8, 1)] * 64, 7, 63),  # what a pod of one card leaves
        ([Node(16, 8)] * 8, 8, 7),
        ([Node(2, 1)] * 64, 1, 63),
        ([Node(8, 8)] * 8, 1, 55),  # eight ranks give their CPUs up
        ((), 1, 63),  # nothing is known of the nodes
    ],
)
def test_decode_reserves_the_cpus_of_its_encoder_as_far_as_nodes_have_them(nodes, cpus, most):
    *_, decode = lay_out(ParallelConfig(), 64, ENGINES, share_cards=True, nodes=nodes)
    assert (decode.cpus_per_rank, decode.most, decode.calls_at_once) == (cpus, most, 2)


def test_nodes_to_come_are_taken_to_be_like_those_that_are_there():
    *_, decode = lay_out(ParallelConfig(max_replicas=64), 2, ENGINES, share_cards=True, nodes=[Node(8, 1)] * 2)
    assert (decode.replicas, decode.most, decode.cpus_per_rank) == (7, 63, 7)


def test_numbers_of_text_and_decode_that_the_user_gave_are_kept():
    for share in (False, True):
        text, *_, decode = lay_out(ParallelConfig(text=2, decode=9), 32, ENGINES, share)
        assert (text.replicas, text.most, decode.replicas, decode.most) == (2, None, 9, None)
        check_schedulable([text, *_, decode], Resources(1000, 32))
    text, *_, decode = lay_out(ParallelConfig(text=1, decode=3), 1, ENGINES)
    assert (text.gpus_per_rank, decode.gpus_per_rank) == (0.1, 0.1), "all beside the only rank"
    text, *_, decode = lay_out(ParallelConfig(text=2, decode=3), 0, ENGINES)
    assert (text.replicas, decode.replicas) == (2, 3)


def test_cards_of_little_memory_hold_one_text_and_one_decode():
    text, *_, decode = lay_out(ParallelConfig(), 16, ENGINES, roomy_cards=False)
    assert (text.gpus_per_rank, decode.gpus_per_rank) == (0.5, 0.5)
    assert decode.most == 3, "on two cards, of which one half is text's"


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
    del a_pool.replicas["stage1-0"]
    assert a_pool.missing() == ["stage1-2"]
    assert pool(5).missing(at_most=1) == ["stage1-0"]


def test_all_places_are_asked_for_at_once():
    assert len(pool(100).missing()) == 100


def fail_start(a_pool: Pool, node: str, nodes: int) -> None:
    (name,) = a_pool.missing()
    del a_pool.replicas[name]
    a_pool.start_failed("no such file", node, nodes)


def test_starts_that_keep_failing_end_the_run():
    a_pool = pool(1, most_failed=3)
    for fails in (True, True, False, True, True):
        if fails:
            fail_start(a_pool, "one", nodes=1)
        else:
            (name,) = a_pool.missing()
            a_pool.started(name)
            del a_pool.replicas[name]
    with pytest.raises(StartFailed, match="pool stage1: 3 gangs failed to start; the last: no such file"):
        fail_start(a_pool, "one", nodes=1)


def test_starts_that_fail_on_a_few_of_many_nodes_end_no_run():
    a_pool = pool(1, most_failed=3)
    for node in ("one", "one", "two", "two"):
        fail_start(a_pool, node, nodes=8)
    with pytest.raises(StartFailed, match="5 gangs failed to start"):
        fail_start(a_pool, "three", nodes=8)


def test_a_pool_that_has_no_place_on_other_nodes_is_given_up_in_the_end():
    a_pool = pool(1, most_failed=3)
    with pytest.raises(StartFailed, match="12 gangs failed to start"):
        for _ in range(12):
            fail_start(a_pool, "one", nodes=8)


def test_starts_that_fail_while_a_replica_is_ready_end_no_run():
    a_pool = pool(2, most_failed=1)
    first, _ = a_pool.missing()
    a_pool.started(first)
    for node in range(20):
        a_pool.start_failed("fallen off the bus", str(node), nodes=8)


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
