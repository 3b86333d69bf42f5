"""What a run's nodes have installed decides its numerics, and not what the driver has."""

from __future__ import annotations

import pytest

from ltx_ray.placement import node_probe
from ltx_ray.placement.gpu_models import Choice, GpuNode
from ltx_ray.placement.node_probe import choose_attention


def nodes(*cards: float) -> list[GpuNode]:
    return [GpuNode(f"n{number}", f"10.0.0.{number}", "H100", gpus, 64.0) for number, gpus in enumerate(cards)]


def found(*has: bool | None) -> dict[str, bool]:
    return {f"n{number}": fa3 for number, fa3 in enumerate(has) if fa3 is not None}


def test_where_nearly_all_cards_have_it_the_nodes_without_are_left_alone_by_name():
    chosen = choose_attention(nodes(*[8.0] * 15, 8.0), found(*[True] * 15, False), "auto")
    assert chosen.fa3 and [node.id for node in chosen.without] == ["n15"]
    assert chosen.told() == "left alone, because they lack FlashAttention-3 (the package fa3-fwd): 10.0.0.15"
    left = Choice(nodes(8.0, 8.0)).without(nodes(8.0))
    assert [node.id for node in left.nodes] == ["n1"] and [node.id for node in left.others] == ["n0"]


def test_where_many_cards_lack_it_all_serve_without_and_that_is_said():
    for cards, has in (((8.0, 8.0, 8.0), (True, True, False)), ((1.0, 8.0), (True, False))):
        chosen = choose_attention(nodes(*cards), found(*has), "auto")
        assert not chosen.fa3 and [node.id for node in chosen.without] == [f"n{len(cards) - 1}"]
        assert chosen.told().startswith("attention is not fa3, because these nodes lack FlashAttention-3")


def test_exactly_enough_is_enough():
    nodes = [GpuNode(str(n), str(n), "H100", 8.0, 1) for n in range(25)]
    found = {node.id: int(node.id) >= 2 for node in nodes}
    assert choose_attention(nodes, found, "auto").fa3
    assert not choose_attention(nodes, {**found, "2": False}, "auto").fa3


def test_cards_count_and_not_nodes():
    assert choose_attention(nodes(8.0, 8.0, 1.0), found(True, True, False), "auto").fa3


@pytest.mark.parametrize("has, fa3", [((True, True), True), ((False, False), False), ((True, None), True)])
def test_nodes_that_are_alike_are_not_named(has, fa3):
    chosen = choose_attention(nodes(8.0, 8.0), found(*has), "auto")
    assert chosen.fa3 is fa3 and chosen.told() is None


@pytest.mark.parametrize("here", [True, False])
def test_the_driver_counts_when_no_node_answers(monkeypatch, here):
    monkeypatch.setattr(node_probe, "has_fa3", lambda: here)
    assert choose_attention(nodes(8.0), {}, "auto").fa3 is here


def test_a_user_who_asks_for_it_gets_the_nodes_that_have_it():
    chosen = choose_attention(nodes(8.0, 8.0, 8.0), found(True, False, False), "fa3")
    assert chosen.fa3 and [node.id for node in chosen.without] == ["n1", "n2"]
    with pytest.raises(ValueError, match="--attention: 'fa3', and no GPU node has FlashAttention-3; legal: auto"):
        choose_attention(nodes(8.0, 8.0), found(False, False), "fa3")
    assert choose_attention(nodes(8.0), {}, "fa3").fa3, "its first replica tells"
