"""What a run's nodes have installed decides its numerics, and not what the driver has."""

from __future__ import annotations

import pytest

from ltx_ray.placement import node_probe


@pytest.mark.parametrize(
    "answers, here, found",
    [([True, True, False], False, True), ([True, False, False], True, False), ([True], False, True),
     ([True, False], True, False), ([], True, True), ([], False, False)],
)  # fmt: skip
def test_most_of_the_nodes_decide_and_the_driver_when_none_answers(monkeypatch, answers, here, found):
    monkeypatch.setattr(node_probe, "_ask", lambda nodes: answers)
    monkeypatch.setattr(node_probe, "has_fa3", lambda: here)
    assert node_probe.nodes_have_fa3(["a", "b", "c"]) is found


def test_a_few_nodes_of_many_are_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(node_probe, "_ask", lambda nodes: asked.extend(nodes) or [True])
    node_probe.nodes_have_fa3([f"n{number}" for number in range(1000)])
    assert asked == ["n0", "n1", "n2"]
