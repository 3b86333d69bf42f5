"""A pool that has lost its only replica gets the place of a replica of a pool that has several."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ltx_ray.config import PoolSpec
from ltx_ray.driver.spare_places import SparePlaces, stuck_pools
from ltx_ray.pools.pool import Pool
from tests.support.fake_cluster import SPEC, StaffedRun

LATE = 16.0
BOTH = ("stage1", "stage2")


def stuck_run() -> StaffedRun:
    """The only replica of text has failed when all other places are taken, and its successor waits."""
    run = StaffedRun(decode=1)
    run.turn()
    run.fail("text-0", now=1.0)
    run.come_up("stage1-0", "stage1-1", "stage1-2", "decode-0")
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
    run = stuck_run()
    run.replicas.waits["text-1"] = LATE
    for now in (17.0, 18.0, 76.0):
        run.turn(now=now)
    assert run.replicas.killed == ["stage1-0"]
    run.turn(now=78.0)
    assert run.replicas.killed == ["stage1-0", "stage1-1"]
    run.turn(now=400.0)
    assert "stage1-2" not in run.replicas.killed, "it is the last one"


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


def test_a_short_wait_is_no_reason():
    run = stuck_run()
    run.replicas.waits["text-1"] = 14.0
    run.turn(now=15.0)
    assert run.replicas.killed == []


def pool(name: str, roles: tuple[str, ...], ready: int, ranks: int = 1, gpus: float = 1.0, cpus: float = 1.0) -> Pool:
    spec = PoolSpec(name, roles, ready, ranks, SPEC, cpus, gpus_per_rank=gpus)
    return Pool(spec, 4, {f"{name}-{number}": True for number in range(ready)})


def chosen(*givers: Pool, gpus: float = 0.4, ranks: int = 1) -> str | None:
    taker = Pool(PoolSpec("text", ("text",), 1, ranks, SPEC, gpus_per_rank=gpus), 4, {"text-9": False})
    pools = [taker, *givers]
    assert stuck_pools(pools, {"text-9": LATE}) == [taker]
    return SparePlaces().choose(taker, pools, lambda name: name.endswith("-1"), 0.0)


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
    assert SparePlaces().choose(taker, pools, lambda name: True, 0.0) == "text-0"


def test_a_pool_whose_roles_others_serve_is_not_stuck():
    waits = SimpleNamespace(get=lambda name, default: LATE)
    stage2 = Pool(PoolSpec("stage2", BOTH[::-1], 1, 1, SPEC), 4, {"stage2-0": False})
    assert stuck_pools([pool("stage1", BOTH, 1), stage2], waits) == []
    assert stuck_pools([pool("stage1", BOTH[:1], 1), stage2], waits) == [stage2]
