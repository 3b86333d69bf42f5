"""A pool that has lost its only replica gets the place of a replica of a pool that has several."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from ltx_ray.config import PoolSpec
from ltx_ray.driver.spare_places import SparePlaces, stuck_pools
from ltx_ray.pools.pool import Pool
from ltx_ray.pools.protocol import RankInfo
from tests.support.fake_cluster import SPEC, StaffedRun

LATE = 16.0
BOTH = ("stage1", "stage2")


def stuck_run(*nodes: str) -> StaffedRun:
    """The only replica of text has failed when all other places are taken, and its successor waits.

    `nodes`: of the replicas of the DiT, which are on one node if none are given.
    """
    nodes = nodes or ("n0", "n0", "n0")
    run = StaffedRun(decode=1, stage1=len(nodes))
    run.turn()
    run.fail("text-0", now=1.0)
    run.come_up("decode-0")
    for number, node in enumerate(nodes):
        run.come_up(f"stage1-{number}", node=node)
    assert run.turn(now=1.0) == ["text-1"]
    return run


def test_a_replica_of_the_dit_makes_room_and_comes_back_once_text_has_a_place():
    run = stuck_run()
    run.replicas.waits["text-1"] = LATE
    assert run.turn(now=17.0) == [] and run.replicas.killed == ["stage1-0"]
    assert run.said[-1] == "stage1-0 leaves after its call, because text has no place"
    assert run.turn(now=30.0) == [] and run.replicas.released == [], "the place is text's, and its old card waits"
    run.come_up("text-1")
    assert run.turn(now=31.0) == ["stage1-3"]


def test_no_second_one_leaves_before_the_place_of_the_first_can_have_been_taken():
    run = stuck_run("n0", "n1", "n2")
    run.replicas.waits["text-1"] = LATE
    for now in (17.0, 18.0, 76.0):
        assert run.turn(now=now) == []
    assert run.replicas.killed == ["stage1-0"]


def test_a_place_that_does_not_suit_goes_back_and_none_of_its_kind_is_made_on_its_node_again():
    run = stuck_run("n0", "n0", "n1")
    run.replicas.waits["text-1"] = LATE
    run.turn(now=17.0)
    assert run.turn(now=78.0) == ["stage1-3"], "the DiT gets its place back"
    assert run.said[-1] == (
        "node n0: stage1 gets the place back that stage1-0 left, because text found no place there in 60 s; it needs "
        "1 x (1 CPU, 0 GPU) on one node"
    )
    [told] = run.told("place_given_back")
    assert (told["role"], told["replica"], told["made_for"], told["where"]) == ("stage1", "stage1-0", "text", "node n0")
    run.come_up("stage1-3", node="n0")
    run.turn(now=100.0)
    assert run.replicas.killed == ["stage1-0"], "the DiT has had no time to take it"
    run.turn(now=140.0)
    assert run.replicas.killed == ["stage1-0", "stage1-2"], "the place on another node may suit"
    assert run.turn(now=201.0) == ["stage1-4"]
    run.come_up("stage1-4", node="n1")
    for now in range(202, 1700, 20):
        run.turn(now=float(now))
    assert run.replicas.killed == ["stage1-0", "stage1-2"] and len(run.told("place_given_back")) == 2


def test_once_the_pool_has_a_replica_all_nodes_may_make_room_again():
    run = stuck_run()
    run.replicas.waits["text-1"] = LATE
    run.turn(now=17.0)
    run.turn(now=78.0)
    run.come_up("text-1", "stage1-3")
    run.turn(now=80.0)
    run.replicas.waits["text-1"] = 0.0
    run.fail("text-1", now=500.0)
    assert run.turn(now=500.0) == ["text-2"]
    run.replicas.waits["text-2"] = LATE
    run.turn(now=517.0)
    assert run.replicas.killed == ["stage1-0", "stage1-1"]


def test_a_place_is_kept_from_when_a_busy_replica_has_left_it():
    run = stuck_run()
    run.policy.items_of = lambda name: ["a"]
    run.replicas.waits["text-1"] = LATE
    run.turn(now=17.0)
    run.turn(now=100.0)
    run.policy.items_of = lambda name: []
    run.turn(now=101.0)
    assert run.replicas.killed == ["stage1-2"]
    assert run.turn(now=160.0) == [] and run.replicas.killed == ["stage1-2"]
    assert run.turn(now=162.0) == ["stage1-3"]


def test_a_place_where_a_replica_then_fails_to_start_was_not_in_vain():
    run = stuck_run("n0", "n1")
    run.replicas.waits["text-1"] = LATE
    run.turn(now=17.0)
    run.fail("text-1", node="n0", now=40.0)
    assert run.turn(now=40.0) == ["text-2", "stage1-2"]
    run.replicas.waits["text-2"] = LATE
    run.turn(now=100.0)
    assert run.told("place_given_back") == []


def test_no_replica_leaves_a_node_on_which_nothing_is_placed():
    run = stuck_run("n1", "n0", "n2")
    run.replicas.waits["text-1"] = LATE
    run.staff.left_alone.exclude(run.staff.ranks_of("stage1-0"), "two of its GPUs failed", 2.0)
    run.turn(now=17.0)
    assert run.replicas.killed == ["stage1-1"]


def test_a_busy_one_leaves_after_its_call_and_idle_ones_first():
    run = stuck_run()
    busy = {"stage1-0": ["a"], "stage1-1": ["b"], "stage1-2": ["c"]}
    run.policy.items_of = lambda name: busy.get(name, [])
    run.replicas.waits["text-1"] = LATE
    run.turn(now=17.0)
    run.turn(now=200.0)
    assert run.replicas.killed == []
    busy["stage1-2"] = []
    run.turn(now=201.0)
    assert run.replicas.killed == ["stage1-2"]


def test_a_successor_without_a_place_does_not_take_that_of_text():
    run = stuck_run()
    run.replicas.waits["stage1-0"] = 0.0
    run.fail("stage1-0", now=2.0)
    assert run.turn(now=2.0) == ["stage1-3"]
    run.replicas.waits["text-1"] = LATE
    run.turn(now=18.0)
    assert set(run.replicas.killed) == {"stage1-1", "stage1-3"}


def test_the_only_replica_of_a_pool_whose_stages_another_serves_has_no_successor_before_text_has_a_place():
    run = StaffedRun(stage1=1, decode=1)
    run.staff.pools.append(Pool(PoolSpec("stage2", BOTH[::-1], 1, 1, SPEC, gpus_per_rank=0.6), 4))
    run.turn()
    run.fail("text-0", now=1.0)
    run.come_up("stage1-0", "stage2-0", "decode-0")
    run.turn(now=1.0)
    run.replicas.waits["text-1"] = LATE
    assert run.turn(now=17.0) == [] and run.replicas.killed == ["stage1-0"]
    assert run.turn(now=18.0) == []
    run.come_up("text-1")
    assert run.turn(now=19.0) == ["stage1-1"]


def test_a_busy_replica_whose_node_drains_leaves_no_place():
    run = stuck_run()
    run.policy.items_of = lambda name: ["a"] if name == "stage1-0" else []
    run.replicas.left = ["stage1-0"]
    assert run.turn(now=2.0) == ["stage1-3"]
    run.replicas.waits["text-1"] = LATE
    run.turn(now=17.0)
    assert "stage1-1" in run.replicas.killed and "stage1-0" not in run.replicas.killed


def test_one_that_waits_for_its_process_alone_needs_no_place():
    run = stuck_run()
    run.replicas.waits["text-1"] = LATE
    run.replicas.placed = {"text-1"}
    run.turn(now=17.0)
    assert run.replicas.killed == []
    run.replicas.placed = set()
    run.turn(now=18.0)
    assert run.replicas.killed == ["stage1-0"]


def test_no_failed_card_is_tried_early_for_one_that_waits_for_its_process_alone():
    run = stuck_run()
    run.replicas.waits["text-1"] = LATE
    run.turn(now=17.0)
    run.replicas.placed = {"text-1"}
    assert run.turn(now=18.0) == ["stage1-3"], "its place is taken"
    assert run.replicas.released == [], "that of text-0, which is left alone until 31 s"


def test_a_short_wait_is_no_reason():
    run = stuck_run()
    run.replicas.waits["text-1"] = 14.0
    run.turn(now=15.0)
    assert run.replicas.killed == []


def pool(name: str, roles: tuple[str, ...], ready: int, ranks: int = 1, gpus: float = 1.0, cpus: float = 1.0) -> Pool:
    spec = PoolSpec(name, roles, ready, ranks, SPEC, cpus, gpus_per_rank=gpus)
    return Pool(spec, 4, {f"{name}-{number}": True for number in range(ready)})


def choose(taker: Pool, pools: list[Pool], idle: Callable[[str], bool]) -> str | None:
    made = SparePlaces().choose(taker, pools, idle, lambda name: [RankInfo(0, node="n0")], (), 0.0)
    return made and made.replica


def chosen(*givers: Pool, gpus: float = 0.4, ranks: int = 1) -> str | None:
    taker = Pool(PoolSpec("text", ("text",), 1, ranks, SPEC, gpus_per_rank=gpus), 4, {"text-9": False})
    pools = [taker, *givers]
    assert stuck_pools(pools, {"text-9": LATE}) == [taker]
    return choose(taker, pools, idle=lambda name: name.endswith("-1"))


def test_the_pool_with_most_replicas_gives_one():
    assert chosen(pool("stage1", BOTH, 4), pool("stage2", BOTH[::-1], 2)) == "stage1-1"
    assert chosen(pool("stage1", BOTH, 1), pool("stage2", BOTH[::-1], 1)) == "stage1-0", "the other serves both stages"


@pytest.mark.parametrize(
    "giver",
    [pool("stage1", BOTH, 1), pool("decode", ("decode", "encode"), 5, gpus=0.2), pool("stage1", BOTH, 0)],
    ids=["the only one", "too small a part of a GPU", "none is ready"],
)
def test_none_leaves_that_would_not_help(giver):
    assert chosen(giver) is None


def test_a_gang_needs_the_place_of_a_gang():
    assert chosen(pool("stage1", BOTH, 4), gpus=1.0, ranks=2) is None
    assert chosen(pool("stage1", BOTH, 4, ranks=2), gpus=1.0, ranks=2) == "stage1-1"


def test_one_that_frees_cpus_enough_is_preferred():
    taker = Pool(PoolSpec("decode", ("decode",), 1, 1, SPEC, 8.0, 0.2), 4, {"decode-9": False})
    pools = [taker, pool("stage1", BOTH, 9), pool("text", ("text",), 2, gpus=0.4, cpus=8.0)]
    assert choose(taker, pools, idle=lambda name: True) == "text-0"


def test_a_pool_whose_roles_others_serve_is_not_stuck():
    waits = SimpleNamespace(get=lambda name, default: LATE)
    stage2 = Pool(PoolSpec("stage2", BOTH[::-1], 1, 1, SPEC), 4, {"stage2-0": False})
    assert stuck_pools([pool("stage1", BOTH, 1), stage2], waits) == []
    assert stuck_pools([pool("stage1", BOTH[:1], 1), stage2], waits) == [stage2]
