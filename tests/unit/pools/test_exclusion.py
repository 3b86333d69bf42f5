"""Nodes whose cards fail are excluded for a time that doubles."""

from __future__ import annotations

import pytest

from ltx_ray.pools.exclusion import Exclusions
from ltx_ray.pools.protocol import RankInfo


def gang(*gpus: str, node: str = "n1") -> list[RankInfo]:
    return [RankInfo(number, node=node, address="10.0.0.7", gpus=card) for number, card in enumerate(gpus)]


@pytest.mark.parametrize("cards, failures", [(8, 4), (7, 4), (4, 2), (3, 2), (2, 2), (1, 1)])
def test_a_node_is_excluded_when_half_of_its_cards_have_failed_and_not_for_one_of_several(cards, failures):
    exclusions = Exclusions()
    for number in range(failures - 1):
        assert exclusions.card_failed(gang(str(number)), cards) is None
        assert exclusions.card_failed(gang(str(number)), cards) is None, "the same card counts once"
    why = exclusions.card_failed(gang(str(failures - 1)), cards)
    assert why == ("its only GPU failed" if cards == 1 else f"{failures} of its {cards} GPUs failed")


def test_a_card_on_which_something_starts_counts_no_more():
    exclusions = Exclusions()
    exclusions.card_failed(gang("0"), 4)
    exclusions.works(gang("0"))
    assert exclusions.card_failed(gang("1"), 4) is None
    assert exclusions.card_failed(gang("2"), 4) is not None


def test_cards_of_a_gang_and_nodes_are_told_apart():
    exclusions = Exclusions()
    assert exclusions.card_failed(gang("0", "1"), 8) is None
    assert exclusions.card_failed(gang("2", "3", node="n2"), 8) is None
    assert exclusions.card_failed(gang("2", "3"), 8) == "4 of its 8 GPUs failed"


def test_replicas_without_a_gpu_have_to_fail_twice():
    exclusions = Exclusions()
    assert exclusions.card_failed(gang(""), 0) is None
    assert exclusions.card_failed(gang(""), 0) == "2 replicas failed there"


def test_the_time_doubles_and_the_node_that_is_due_first_may_be_taken_before_its_time():
    exclusions, now, waits = Exclusions(), 50.0, []
    for _ in range(8):
        found = exclusions.exclude(gang("0"), "its only GPU failed", now)
        assert found.where == "node 10.0.0.7" and list(exclusions.left) == ["n1"]
        waits.append(found.until - now)
        now = found.until
        assert exclusions.due(now - 1) == [] and exclusions.due(now) == [found] and not exclusions.left
    assert waits[:3] == [300.0, 600.0, 1200.0] and waits[-2:] == [14_400.0, 14_400.0]
    exclusions.exclude(gang("0"), "", now)
    exclusions.exclude(gang("0", node="n2"), "", now)
    first = exclusions.earliest()
    assert first is not None and first.node == "n2" and list(exclusions.left) == ["n1"]
