"""Nodes that join a cluster later: those whose GPUs a run must not use."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

ray = pytest.importorskip("ray")

from ltx_ray.placement.cluster import Cluster
from ltx_ray.placement.joined_nodes import JoinedNodes


@pytest.fixture
def nodes(monkeypatch) -> dict[str, str]:
    """The living nodes by id, each with a GPU of a model."""
    models: dict[str, str] = {"a": "H100"}

    def table() -> list[dict]:
        return [
            {"NodeID": name, "Alive": True, "NodeManagerAddress": f"10.0.0.{name}",
             "Resources": {"GPU": 8.0, "CPU": 64.0, **({f"accelerator_type:{model}": 1.0} if model else {})}}
            for name, model in models.items()
        ]  # fmt: skip

    monkeypatch.setattr(ray, "nodes", table)
    return models


def test_new_nodes_of_another_model_are_foreign_and_of_an_unknown_one_are_not(nodes):
    joined = JoinedNodes({"H100"}, binding=True)
    nodes.update(b="A100", c="H100", d="")
    assert joined.foreign(set()) == {"b": "10.0.0.b (A100)"}
    assert JoinedNodes({"H100"}, binding=False).foreign(set()) == {}
    assert JoinedNodes({""}, binding=True).foreign({"a"}) == {}, "nobody knows what the run has"


def test_a_run_that_began_without_gpus_is_bound_by_the_first_that_serve(nodes):
    nodes.clear()
    joined = JoinedNodes(set(), binding=True)
    nodes.update(a="A100", b="H100")
    assert joined.foreign(set()) == {}
    assert joined.foreign({"b"}) == {"a": "10.0.0.a (A100)"}
    assert joined.foreign({"a", "b"}) == {"a": "10.0.0.a (A100)"}, "that does not change any more"


def test_each_is_named_once(nodes):
    said: list[str] = []
    cluster = object.__new__(Cluster)
    vars(cluster).update(vars(SimpleNamespace(_nodes=JoinedNodes({"H100"}, binding=True), _foreign=set())))
    cluster.say = said.append
    assert not cluster.foreign_nodes(set())
    nodes["b"] = "A100"
    assert cluster.foreign_nodes(set()) == {"b"} == cluster.foreign_nodes(set())
    assert said == ["left alone, because their GPUs are not of the model of this run: 10.0.0.b (A100)"]
