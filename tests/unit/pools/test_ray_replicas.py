"""The gangs of a run on a Ray cluster, without the cluster."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("ray")

from ltx_ray.pools.gang import GangLost, GangState
from ltx_ray.pools.protocol import RankInfo
from ltx_ray.pools.ray_replicas import RayReplicaSet


def gang(name: str, node: str, state: GangState, gpus: str = "0") -> SimpleNamespace:
    """A gang that has got a place on `node`; `again` is where it was told not to go."""
    ranks, pool = [RankInfo(0, node=node, gpus=gpus)], SimpleNamespace(name="d", gpus_per_rank=0.2)
    made = SimpleNamespace(name=name, state=state, ranks=ranks, pool=pool, again=[], avoids=[])
    made.advance = lambda arrived: False
    made.place_again = made.again.append
    made.leave_reserved = lambda avoided: made.again.append(avoided) or f"place of {name}"
    made.kill = lambda release=True: None
    made.avoid = made.avoids.append
    return made


def test_a_gang_whose_node_is_to_be_left_alone_goes_elsewhere_before_it_loads():
    asked: list[set[str]] = []
    replicas = RayReplicaSet(60.0, {"x"}, foreign=lambda serving: asked.append(set(serving)) or {"b"})
    ready, placed = gang("s-0", "a", GangState.READY), gang("s-1", "b", GangState.WAITING)
    waiting = gang("s-2", "", GangState.PLACING)
    replicas._gangs = {each.name: each for each in (ready, placed, waiting)}
    replicas.avoid({"bad"})
    assert replicas._advance(placed, set()) == [] and placed.again == [{"x", "bad", "b"}]
    assert waiting.avoids[-1] == {"x", "bad", "b"} and asked == [{"a"}]
    assert replicas.gpu_seconds() == 0.0, "its card is not taken"
    replicas.avoid(set())
    assert waiting.avoids[-1] == {"x", "b"}, "it is left alone as long as the run goes on"


def test_nodes_are_looked_at_once():
    asked: list[set[str]] = []
    replicas = RayReplicaSet(60.0, foreign=lambda serving: asked.append(set(serving)) or set())
    replicas._gangs = {"s-0": gang("s-0", "a", GangState.READY)}
    for name, node in (("s-1", "b"), ("s-2", "b"), ("s-3", "c")):
        replicas._gangs[name] = gang(name, node, GangState.WAITING)
        replicas._advance(replicas._gangs[name], set())
        assert replicas._gangs[name].again == []
    assert len(asked) == 2 and replicas.gpu_seconds() >= 0.0


def test_the_rest_of_a_card_that_has_failed_is_reserved_and_nothing_loads_there(monkeypatch):
    given_back: list[str] = []
    monkeypatch.setattr("ltx_ray.pools.ray_replicas.remove_placement_group", given_back.append)
    replicas = RayReplicaSet(60.0)
    bad = gang("d-0", "a", GangState.WAITING, gpus="3")
    replicas._gangs = {"d-0": bad}
    assert replicas._lose(bad, GangLost("the GPU has fallen off the bus")).held
    same, beside = gang("d-1", "a", GangState.WAITING, gpus="3"), gang("d-2", "a", GangState.WAITING, gpus="4")
    replicas._gangs = {each.name: each for each in (same, beside)}
    assert replicas._advance(same, set()) == replicas._advance(beside, set()) == []
    assert same.again == [frozenset()] and beside.again == [], "the other card of the node serves"
    replicas.release("d-0")
    assert given_back == ["place of d-1"]
    again = gang("d-3", "a", GangState.WAITING, gpus="3")
    replicas._gangs["d-3"] = again
    replicas._advance(again, set())
    assert again.again == [], "it is tried again"
