"""Cards on which replicas cannot start are left alone for a time that doubles."""

from __future__ import annotations

from ltx_ray.pools.parking import Parking
from ltx_ray.pools.protocol import RankInfo


def ranks(node: str = "n1", gpus: str = "3") -> list[RankInfo]:
    return [RankInfo(0, node=node, address="10.0.0.7", gpus=gpus)]


def test_the_time_doubles_with_each_failure_of_the_same_card():
    parking, now, waits = Parking(), 100.0, []
    for number in range(9):
        parked = parking.hold(f"stage1-{number}", ranks(), now)
        assert parked.where == "node 10.0.0.7, GPU 3" and parked.failures == number + 1
        waits.append(parked.until - now)
        now = parked.until
        assert parking.due(now - 1) == [] and parking.due(now) == [parked]
    assert waits[:3] == [30.0, 60.0, 120.0] and waits[-2:] == [1800.0, 1800.0]
    parking.started(ranks())
    assert parking.hold("stage1-9", ranks(), now).failures == 1, "a replica has started there meanwhile"


def test_cards_are_told_apart():
    parking = Parking()
    parking.hold("a", ranks(gpus="1"), 0.0)
    assert parking.hold("b", ranks(gpus="2"), 0.0).failures == 1
    assert parking.hold("c", ranks("n2", "1"), 0.0).failures == 1


def test_the_card_whose_time_comes_first_may_be_taken_before_it():
    parking = Parking()
    assert parking.earliest() is None
    parking.hold("a", ranks(gpus="1"), 0.0)
    parking.due(1e9)
    parking.hold("b", ranks(gpus="1"), 0.0)
    parking.hold("c", ranks(gpus="2"), 0.0)
    first = parking.earliest()
    assert first is not None and first.replica == "c" and list(parking.left) == ["b"]
