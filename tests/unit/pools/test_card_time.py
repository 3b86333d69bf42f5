"""Reserved GPU time is that of cards, whoever is on them."""

from __future__ import annotations

from ltx_ray.pools.card_time import CardTime
from ltx_ray.pools.protocol import RankInfo


def ranks(*cards: str, node: str = "n") -> list[RankInfo]:
    return [RankInfo(number, node=node, gpus=card) for number, card in enumerate(cards)]


def test_a_card_counts_once_however_many_share_it():
    time = CardTime()
    time.hold("stage1-0", "stage1", 1.0, ranks("0", "1"), 10.0)
    time.hold("decode-0", "decode", 1.0, ranks("1"), 12.0)
    assert time.seconds(20.0) == 20.0
    time.free("stage1-0", 30.0)
    assert time.seconds(30.0) == 40.0
    time.free("decode-0", 35.0)
    assert time.seconds(1000.0) == 45.0


def test_cards_of_the_same_number_on_two_nodes_are_two():
    time = CardTime()
    time.hold("a", "stage1", 1.0, ranks("0"), 0.0)
    time.hold("b", "stage1", 1.0, ranks("0", node="other"), 0.0)
    assert time.seconds(5.0) == 10.0 == time.by_pool(5.0)["stage1"]


def test_pools_divide_a_card_by_what_they_reserve_of_it():
    time = CardTime()
    time.hold("stage1-0", "stage1", 0.5, ranks("0"), 0.0)
    time.hold("decode-0", "decode", 0.25, ranks("0"), 10.0)
    time.hold("decode-1", "decode", 0.25, ranks("0"), 10.0)
    assert time.by_pool(20.0) == {"stage1": 15.0, "decode": 5.0}
    time.free("stage1-0", 20.0)
    assert time.by_pool(30.0) == {"stage1": 15.0, "decode": 15.0}
    time.free("decode-0", 30.0)
    time.free("decode-1", 30.0)
    assert time.by_pool(99.0) == {"stage1": 15.0, "decode": 15.0} and time.seconds(99.0) == 30.0


def test_replicas_without_a_gpu_or_a_place_reserve_nothing():
    time = CardTime()
    time.hold("text-0", "text", 0.0, ranks(""), 0.0)
    time.free("text-0", 9.0)
    time.free("never placed", 9.0)
    assert time.seconds(9.0) == 0.0 and not time.by_pool(9.0)
