"""The gangs of a run on a Ray cluster, without the cluster."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("ray")

from ltx_ray.pools.gang import GangState
from ltx_ray.pools.protocol import RankInfo
from ltx_ray.pools.ray_replicas import RayReplicaSet


def gang(name: str, node: str, state: GangState) -> SimpleNamespace:
    """A gang that has got a place on `node`; `again` is where it was told not to go."""
    made = SimpleNamespace(name=name, state=state, ranks=[RankInfo(0, node=node, gpus="0")], again=[], avoids=[])
    made.advance = lambda arrived: False
    made.place_again = made.again.append
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
