"""Latents that are not finite are tried once on another node before the row is blamed."""

from __future__ import annotations

import pytest

from ltx_ray.driver.policy import Policy
from ltx_ray.pools.protocol import RankInfo, ReplicaStarted
from ltx_ray.records import NotFinite
from tests.support.schedules import WatchedReplicas
from tests.support.simulated_runs import pools, rows, run


class Nodes(WatchedReplicas):
    """Replicas on nodes of their own, of which some make NaN: of every row, or of those with "nan" in their prompts."""

    bad = frozenset({"stage1-0"})

    def _started(self, name, replica, fails):
        events = super()._started(name, replica, fails)
        return [
            ReplicaStarted(e.replica, [RankInfo(0, node=f"n-{name}", address=name)], e.seconds)
            if isinstance(e, ReplicaStarted)
            else e
            for e in events
        ]

    def nodes(self):
        return {f"n-{name}": 0 for name in self._replicas}

    def submit(self, replica, stage, item, inputs, timeout):
        self.where = replica
        make, bad = self.make, replica in self.bad or "nan" in item.request.prompt

        def made(stage, item, *values):
            if stage == "stage1" and bad:
                raise NotFinite("3 of 9 video latents are not finite")
            return make(stage, item, *values)

        self.tried = [*getattr(self, "tried", []), (stage, item.request.id, replica)]
        self.make = made
        super().submit(replica, stage, item, inputs, timeout)
        after, self.make = self.make, make
        # The call keeps the way in which it is made.
        number = max(self._replicas[replica].calls)
        self._makes = {**getattr(self, "_makes", {}), (replica, number): after}

    def _succeeds(self, name, number, inputs, seconds, switch):
        make, self.make = self.make, self._makes[name, number]
        try:
            return super()._succeeds(name, number, inputs, seconds, switch)
        finally:
            self.make = make


def stage1_calls(replicas, row):
    return [replica for stage, name, replica in replicas.tried if stage == "stage1" and name == row]


def test_a_node_whose_bad_rows_succeed_elsewhere_is_excluded_and_no_row_fails(tmp_path):
    driver, store = run(tmp_path, rows(12), Nodes, the_pools=pools(2))
    driver.run(driver.tracker.plan.open())
    assert driver.counts["rendered"] == 12 and not driver.counts["failed"]
    events = [line for line in store.read_bytes("events.jsonl").decode().splitlines() if "node_excluded" in line]
    assert len(events) == 1 and "n-stage1-0" in events[0]
    assert "was not finite there, and is on another node" in events[0]


def test_a_row_that_is_not_finite_anywhere_is_blamed_after_the_second_node(tmp_path):
    driver, store = run(
        tmp_path, [*rows(3), {"id": "bad", "prompt": "nan"}], type("Good", (Nodes,), {"bad": ()}), the_pools=pools(2)
    )
    driver.run(driver.tracker.plan.open())
    assert driver.counts["rendered"] == 3 and driver.counts["failed"] == 1
    calls = stage1_calls(driver._replicas, "bad")
    assert len(calls) == 2 and len(set(calls)) == 2
    assert "node_excluded" not in store.read_bytes("events.jsonl").decode()


def test_with_one_node_the_row_is_blamed_at_once(tmp_path):
    driver, _ = run(tmp_path, [*rows(2), {"id": "bad", "prompt": "nan"}], type("Good", (Nodes,), {"bad": ()}))
    driver.run(driver.tracker.plan.open())
    assert driver.counts["failed"] == 1 and len(stage1_calls(driver._replicas, "bad")) == 1


# --- the policy --------------------------------------------------------------------------------------------------


def two_nodes(**options) -> Policy:
    policy = Policy(path=("stage1", "stage2"), **options)
    for name in ("a", "b"):
        policy.add_replica(name, ("stage1", "stage2"), node=name)
    return policy


def test_the_other_node_is_waited_for_and_gets_the_item_before_younger_ones():
    policy = two_nodes()
    for item in ("i0", "i1", "i2"):
        policy.admit(item)
    first, second = policy.next_dispatch(), policy.next_dispatch()
    assert policy.try_elsewhere(first.item)
    third = policy.next_dispatch()
    assert third.replica == first.replica and third.item == "i2", "the node that failed goes on with other items"
    policy.call_finished(second.item, 1.0)
    again = policy.next_dispatch()
    assert (again.item, again.replica, again.stage) == (first.item, second.replica, "stage1")


def test_no_other_node_means_no_second_try():
    policy = Policy(path=("stage1",))
    policy.add_replica("a", ("stage1",), node="n")
    policy.add_replica("b", ("stage1",), node="n")
    policy.admit("i0")
    item = policy.next_dispatch().item
    assert not policy.try_elsewhere(item) and policy.items_of("a") == ["i0"]


def test_an_item_whose_other_node_has_gone_runs_anywhere():
    policy = two_nodes()
    policy.admit("i0")
    policy.admit("i1")
    first, _ = policy.next_dispatch(), policy.next_dispatch()
    assert policy.try_elsewhere(first.item)
    policy.remove_replica("b")
    assert policy.next_dispatch().item == first.item


@pytest.mark.parametrize("stage, saved", [("stage2", ["i0"]), ("stage1", [])])
def test_a_drain_saves_what_waits_for_another_node_before_stage_2(stage, saved):
    policy = two_nodes()
    policy.admit("i0", path=(stage, "decode"))
    policy.admit("i1", path=("stage1",))
    calls = {call.item: call for call in (policy.next_dispatch(), policy.next_dispatch())}
    assert policy.try_elsewhere(calls["i0"].item)
    policy.draining = True
    assert policy.next_dispatch() is None and policy.save_waiting("stage2") == saved
