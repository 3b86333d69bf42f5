"""What a run does about cards and nodes that fail, over the staffing of a fake cluster."""

from __future__ import annotations

import pytest

from ltx_ray.pools.pool import StartFailed
from ltx_ray.pools.protocol import RankInfo, ReplicaLost, ReplicaStarted
from tests.support.fake_cluster import StaffedRun


def started(run: StaffedRun) -> None:
    """One replica of each pool, of which stage1-0 is on n0."""
    run.turn(one_each=True)
    run.come_up("text-0", "stage1-0", "decode-0")


def test_a_node_is_excluded_when_half_of_its_cards_fail_and_tried_again_later():
    run = StaffedRun(stage1=9)
    run.replicas.cards = {"n0": 4, "n1": 4}
    started(run)
    run.turn()
    run.fail("stage1-1", gpus="0", now=10.0)
    assert run.replicas.avoided == frozenset()
    run.fail("stage1-2", gpus="1", now=10.0)
    assert run.replicas.avoided == {"n1"}
    assert run.said[-1] == "node n1: excluded for 5 min 00 s, because 2 of its 4 GPUs failed"
    [told] = run.told("node_excluded")
    assert told == {"node": "n1", "where": "node n1", "times": 1, "seconds": 300.0, "reason": "2 of its 4 GPUs failed"}
    assert run.replicas.released == ["stage1-1", "stage1-2"], "nothing lands there any more, so nothing is held"
    run.turn(now=309.0)
    assert run.replicas.avoided == {"n1"}
    run.turn(now=310.0)
    assert run.replicas.avoided == frozenset() and run.said[-1] == "node n1: tried again"
    run.fail("stage1-3", gpus="1", now=311.0)
    assert run.told("node_excluded")[-1]["seconds"] == 600.0, "two of its cards have failed and never worked since"


def test_the_only_node_is_not_excluded():
    run = StaffedRun()
    run.replicas.cards = {"n1": 1}
    run.turn(one_each=True)
    run.fail("stage1-0", gpus="0")
    assert run.told("node_excluded") == []


def test_the_last_node_is_tried_again_at_once_when_a_pool_has_nobody():
    run = StaffedRun()
    run.replicas.cards = {"n1": 1, "n2": 1}
    run.turn(one_each=True)
    run.fail("stage1-0", node="n1", gpus="0", now=1.0)
    run.turn(now=1.0, one_each=True)
    run.fail("stage1-1", node="n2", gpus="0", now=2.0)
    assert run.replicas.avoided == {"n1"}, "the last one is left"
    run.turn(now=2.0, one_each=True)
    run.replicas.waits["stage1-2"] = 16.0
    run.turn(now=18.0, one_each=True)
    assert run.replicas.released == ["stage1-0", "stage1-1"]
    run.turn(now=19.0, one_each=True)
    assert run.replicas.avoided == frozenset()


def test_a_node_that_lacks_what_the_run_needs_is_excluded_at_once():
    run = StaffedRun()
    run.replicas.cards = {"n0": 8, "n1": 8}
    started(run)
    run.turn()
    run.fail("stage1-1", unfit=True, now=1.0)
    assert run.replicas.avoided == {"n1"} and run.said[-1].endswith("because fallen off the bus")
    assert run.turn(now=1.0) == ["stage1-3"]


def test_a_run_whose_nodes_all_lack_it_ends_at_once():
    run = StaffedRun()
    run.replicas.cards = {"n1": 8}
    run.turn(one_each=True)
    with pytest.raises(StartFailed, match="pool stage1: 1 gangs failed to start; the last: fallen off the bus"):
        run.fail("stage1-0", unfit=True)


def test_losing_a_node_counts_for_no_card():
    run = StaffedRun()
    run.replicas.cards = {"n0": 8, "n1": 1}
    started(run)
    run.turn()
    run.fail("stage1-1", node_lost=True, held=False)
    assert run.told("node_excluded") == []


def test_replicas_of_a_node_that_computes_wrongly_end_at_once_and_come_up_elsewhere():
    run = StaffedRun(stage1=2, decode=1)
    started(run)
    run.turn()
    run.come_up("stage1-1", node="n1")
    run.policy.admit("i0", path=("stage1",))
    run.policy.admit("i1", path=("stage1",))
    calls = {run.policy.next_dispatch().replica: None, run.policy.next_dispatch().replica: None}
    assert set(calls) == {"stage1-0", "stage1-1"}
    run.staff.exclude(run.staff.ranks_of("stage1-1"), "it computes other latents", 5.0)
    assert run.replicas.killed == ["stage1-1"] and run.replicas.avoided == {"n1"}
    assert run.turn(now=5.0) == ["stage1-2"] and run.policy.queued("stage1") == 1


def test_a_card_that_breaks_twice_in_calls_is_left_alone_for_longer_each_time():
    run = StaffedRun()
    started(run)
    alone, ranks = run.staff.left_alone, [RankInfo(0, node="n0", address="n0", gpus="3")]
    other = [RankInfo(0, node="n0", gpus="4")]
    assert not alone.breaks(ranks, "stage1") and not alone.breaks(other, "stage1"), "a row may be to blame"
    alone.call_succeeded(ranks, "decode")
    assert alone.breaks(ranks, "stage1"), "decode on the same card proves nothing for the DiT"
    alone.call_succeeded(ranks, "stage1")
    assert not alone.breaks(ranks, "stage1") and alone.breaks(ranks, "stage1")
    seconds = []
    for number in range(3):
        run.turn(now=100.0 * number)
        name = max(run.replicas.waits)
        run.come_up(name, gpus="3")
        run.policy.remove_replica(name)
        run.staff.lost(ReplicaLost(name, "illegal access", served=True, ranks=ranks, held=True), 100.0 * number)
        seconds.append(run.told("card_parked")[-1]["seconds"])
    assert seconds == [30.0, 60.0, 120.0] and run.said[-1].endswith("failed there again")


def test_a_replica_that_is_refused_is_named_and_its_node_excluded():
    run = StaffedRun()
    run.replicas.cards = {"n0": 8, "n1": 8}
    started(run)
    run.turn()
    run.replicas.waits.pop("stage1-1")
    event = ReplicaStarted("stage1-1", [RankInfo(0, node="n1", address="10.0.0.7", gpus="0")], 1.0)
    run.staff.refuse(event, "its file checkpoint_path is another one", 1.0)
    assert run.said == [
        "stage1-1 on node 10.0.0.7 is refused: its file checkpoint_path is another one",
        "node 10.0.0.7: excluded for 5 min 00 s, because its file checkpoint_path is another one",
    ]
    assert run.replicas.killed == ["stage1-1"] and run.turn(now=1.0) == ["stage1-3"]
    [told] = run.told("gang_refused")
    assert told["replica"] == "stage1-1" and told["where"] == "node 10.0.0.7"
