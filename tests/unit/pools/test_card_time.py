"""Reserved GPU time is that of cards, whoever is on them."""

from __future__ import annotations

from ltx_ray.pools.card_time import CardTime
from ltx_ray.pools.protocol import RankInfo


def ranks(*cards: str, node: str = "n") -> list[RankInfo]:
    return [RankInfo(number, node=node, gpus=card) for number, card in enumerate(cards)]


def test_a_card_counts_once_however_many_share_it():
    time = CardTime()
    time.hold("stage1-0", ranks("0", "1"), 10.0)
    time.hold("decode-0", ranks("1"), 12.0)
    assert time.seconds(20.0) == 20.0
    time.free("stage1-0", 30.0)
    assert time.seconds(30.0) == 40.0
    time.free("decode-0", 35.0)
    assert time.seconds(1000.0) == 45.0


def test_cards_of_the_same_number_on_two_nodes_are_two():
    time = CardTime()
    time.hold("a", ranks("0"), 0.0)
    time.hold("b", ranks("0", node="other"), 0.0)
    assert time.seconds(5.0) == 10.0


def test_replicas_without_a_gpu_or_a_place_reserve_nothing():
    time = CardTime()
    time.hold("text-0", ranks(""), 0.0)
    time.free("text-0", 9.0)
    time.free("never placed", 9.0)
    assert time.seconds(9.0) == 0.0
