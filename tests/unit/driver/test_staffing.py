"""Which replicas a run starts, gives back and leaves out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ltx_ray.config import PoolSpec
from ltx_ray.pools.pool import Pool, StartFailed
from ltx_ray.pools.protocol import ReplicaLost
from tests.support.fake_cluster import SPEC, StaffedRun


def test_one_of_each_comes_first_and_then_all_at_once():
    run = StaffedRun()
    assert run.turn(one_each=True) == ["text-0", "stage1-0", "decode-0"]
    run.come_up("text-0", "stage1-0", "decode-0")
    assert run.turn(one_each=True) == []
    assert run.turn() == ["stage1-1", "stage1-2"], "decode comes after the ranks beside which it runs"
    assert run.turn() == []
    run.come_up("stage1-1", "stage1-2")
    assert run.turn() == ["decode-1", "decode-2", "decode-3"]


def test_decode_does_not_wait_for_ever_for_ranks_that_have_no_place():
    run = StaffedRun()
    run.turn(one_each=True)
    run.come_up("text-0", "stage1-0", "decode-0")
    run.turn()
    run.replicas.waits.update(dict.fromkeys(["stage1-1", "stage1-2"], 61.0))
    assert run.turn() == ["decode-1", "decode-2", "decode-3"]


def test_a_card_that_failed_is_left_alone_and_the_others_go_on():
    run = StaffedRun()
    run.turn(one_each=True)
    run.come_up("text-0", "stage1-0", "decode-0")
    run.turn()
    run.fail("stage1-1", now=100.0)
    assert run.said == ["node n1, GPU 3: left alone for 30 s, because stage1-1 did not start there"]
    assert run.turn(now=100.0) == ["stage1-3"], "another card may be free"
    assert run.replicas.released == []
    run.turn(now=130.0)
    assert run.replicas.released == ["stage1-1"] and run.told("card_retried") == [
        {"replica": "stage1-1", "where": "node n1, GPU 3"}
    ]
    run.fail("stage1-3", now=140.0)
    assert run.told("card_parked")[-1]["failures"] == 2 and run.told("card_parked")[-1]["seconds"] == 60.0


def test_the_only_card_is_tried_again_at_once():
    run = StaffedRun()
    run.turn(one_each=True)
    run.come_up("text-0", "decode-0")
    run.fail("stage1-0", now=1.0)
    assert run.turn(now=1.0, one_each=True) == ["stage1-1"] and run.replicas.released == []
    run.replicas.waits["stage1-1"] = 16.0
    run.turn(now=4.0, one_each=True)
    assert run.replicas.released == ["stage1-0"]


def test_a_card_that_failed_is_not_tried_again_for_a_role_that_others_serve():
    run = StaffedRun()
    run.turn(one_each=True)
    run.come_up("text-0", "stage1-0", "decode-0")
    run.staff.pools.append(Pool(PoolSpec("stage2", ("stage2", "stage1"), 1, 1, SPEC, gpus_per_rank=0.6), 4))
    run.turn()
    run.fail("stage2-0", now=1.0)
    run.turn(now=1.0)
    run.replicas.waits["stage2-1"] = 20.0
    run.turn(now=21.0)
    assert run.replicas.released == []


def test_a_pool_that_starts_nowhere_ends_the_run():
    run = StaffedRun()
    run.replicas.cards = {"n1": 8}
    run.turn(one_each=True)
    for number in range(3):
        run.fail(f"stage1-{number}")
        run.turn(one_each=True)
    with pytest.raises(StartFailed, match="pool stage1: 4 gangs failed to start; the last: fallen off the bus"):
        run.fail("stage1-3")


def test_losing_a_node_while_it_loads_is_nobodys_fault():
    run = StaffedRun()
    run.replicas.cards = {"n1": 8}
    run.turn(one_each=True)
    for number in range(20):
        run.fail(f"stage1-{number}", node_lost=True, held=False)
        run.turn(one_each=True)
    assert run.told("card_parked") == []


def test_places_of_a_growing_cluster_go_to_pools_that_have_none():
    run = StaffedRun(stage1=2, decode=1)
    run.turn(elastic=True)
    run.come_up("text-0", "stage1-0", "decode-0")
    assert run.turn(elastic=True) == ["stage1-1"]
    run.policy.remove_replica("decode-0")
    run.staff.lost(ReplicaLost("decode-0", "gone", served=True), 0.0)
    assert run.turn(elastic=True) == ["decode-1"] and run.replicas.killed == ["stage1-1"]


def test_a_pool_with_too_many_gives_back_those_that_are_idle():
    run = StaffedRun(stage1=1, decode=4)
    run.turn(one_each=True)
    run.come_up("text-0", "stage1-0", "decode-0")
    run.turn()
    run.come_up("decode-1", "decode-2", "decode-3")
    run.policy.path = ("decode",)
    run.policy.admit("i0", path=("decode",))
    busy = run.policy.next_dispatch().replica
    run.staff._sizer = SimpleNamespace(needs={}, sizes=lambda pools, now: {"decode": 1})
    run.turn(now=1.0)
    assert busy not in run.replicas.killed and len(run.replicas.killed) == 3
    assert run.told("pool_resized") == [{"role": "decode", "replicas": 1, "before": 4}]


def test_no_pool_grows_for_rows_that_are_no_more():
    run = StaffedRun(decode=1)
    run.turn(one_each=True)
    run.staff._sizer = SimpleNamespace(needs={}, sizes=lambda pools, now: {"decode": 5})
    run.turn(more_rows=False)
    assert run.told("pool_resized") == []


def test_a_replica_whose_node_drains_leaves_after_its_call_and_its_successor_starts_at_once():
    run = StaffedRun(stage1=2, decode=1)
    run.turn(one_each=True)
    run.come_up("text-0", "stage1-0", "decode-0")
    run.turn()
    run.come_up("stage1-1")
    run.policy.admit("i0", path=("stage1",))
    busy = run.policy.next_dispatch().replica
    run.replicas.left = [busy]
    assert run.turn() == ["stage1-2"] and run.replicas.killed == []
    assert run.said == [f"{busy} leaves after its call, because its node drains"]
    run.policy.admit("i1", path=("stage1",))
    assert run.policy.next_dispatch().replica != busy, "it gets no new call"
    run.policy.call_finished("i0", 1.0)
    assert run.policy.next_dispatch() is None
    assert run.turn() == [] and run.replicas.killed == [busy]
    assert [event["reason"] for event in run.told("gang_given_back")] == ["its node drains"]
    assert run.staff.losses == {("stage1", "drain"): 1}
    run.replicas.left = []
    assert run.turn() == []


def test_a_replica_that_is_cut_off_while_its_node_drains_is_lost_to_the_drain():
    run = StaffedRun(stage1=2, decode=1)
    run.turn(one_each=True)
    run.come_up("text-0", "stage1-0", "decode-0")
    run.policy.admit("i0", path=("stage1",))
    run.replicas.left = [run.policy.next_dispatch().replica]
    run.turn()
    run.staff.tell_lost(ReplicaLost("stage1-0", "gone", served=True, node_lost=True))
    run.staff.tell_lost(ReplicaLost("decode-0", "gone", served=True, node_lost=True))
    assert run.staff.losses == {("stage1", "drain"): 1, ("decode", "node"): 1}
    assert [event["cause"] for event in run.told("gang_lost")] == ["drain", "node"]


def test_a_replica_that_starts_on_a_node_that_drains_is_given_up():
    run = StaffedRun(stage1=1, decode=1)
    run.turn(one_each=True)
    run.replicas.left = ["stage1-0"]
    assert run.turn(one_each=True) == ["stage1-1"] and run.replicas.killed == ["stage1-0"]
