"""One card of text and decode is filled before another one is begun, and nobody waits for that for long."""

from __future__ import annotations

import pytest

pytest.importorskip("ray")

from types import SimpleNamespace

from ltx_ray.config import PoolSpec
from ltx_ray.pools.gang import GangState
from ltx_ray.pools.protocol import RankInfo
from ltx_ray.pools.shared_cards import SharedCards
from tests.support.fake_cluster import SPEC


class Asking:
    """A gang as far as asking for its place goes. `asks`: where, and near which nodes."""

    def __init__(self, name: str, part: float, fills: bool = True):
        self.name, self.pool = name, PoolSpec("pool", ("text",), 1, 1, SPEC, gpus_per_rank=part, fills_cards=fills)
        self.state, self.ranks, self.place = GangState.PLACING, [], None
        self.asked_at, self.asked_near, self.asks, self.looks = None, frozenset(), [], 0
        self.now = 0.0

    def ask(self, avoided, near=()):
        self.asked_at, self.asked_near, self.place = self.now, frozenset(near), None
        self.asks.append((set(avoided), set(near)))

    def node_of_place(self):
        self.looks += 1
        return self.place

    def lands(self, node: str, gpu: str = "0") -> Asking:
        self.state, self.ranks = GangState.WAITING, [RankInfo(0, node=node, gpus=gpu)]
        return self


class Cards:
    """What a driver's turns make of some gangs."""

    def __init__(self, *gangs: Asking, held=(), avoided=()):
        self.cards, self.gangs, self.held, self.avoided = SharedCards(), gangs, held, set(avoided)

    def turn(self, now: float) -> None:
        for gang in self.gangs:
            gang.now = now
        self.cards.ask(self.gangs, self.held, self.avoided, now)


def test_places_are_asked_for_one_after_the_other_and_the_second_beside_the_first():
    text, decode = Asking("text", 0.4), Asking("decode", 0.2)
    cards = Cards(text, decode)
    cards.turn(0.0)
    cards.turn(1.0)
    assert text.asks == [(set(), set())] and decode.asks == []
    text.lands("a")
    cards.turn(2.0)
    assert decode.asks == [(set(), {"a"})]


def test_nobody_waits_for_the_process_of_one_that_has_its_place():
    text, decode, more = Asking("text", 0.4), Asking("decode", 0.2), Asking("more", 0.6)
    cards = Cards(text, decode, more)
    cards.turn(0.0)
    text.place = "a"
    cards.turn(0.3)
    assert decode.asks == [(set(), {"a"})] and more.asks == []
    decode.place = "a"
    cards.turn(30.0)
    assert more.asks == [(set(), set())], "the card of the two has no room for it"
    assert (len(text.asks), len(decode.asks)) == (1, 1) and text.looks == 1, "a slow process keeps its place"


def test_what_was_placed_again_is_looked_for_again():
    text, decode = Asking("text", 0.4), Asking("decode", 0.2)
    cards = Cards(text, decode)
    cards.turn(0.0)
    text.place = "a"
    cards.turn(0.3)
    text.now = 0.4
    text.ask({"a"})  # as when its node is excluded
    decode.asked_at = None
    cards.turn(1.0)
    assert len(decode.asks) == 1
    text.place = "b"
    cards.turn(2.0)
    assert decode.asks[1:] == [(set(), {"b"})]


@pytest.mark.parametrize(("held", "avoided", "near"), [(False, (), {"a"}), (True, (), set()), (False, ("a",), set())])
def test_only_cards_that_work_and_have_room_count(held, avoided, near):
    text, dead = Asking("text", 0.4).lands("a"), SimpleNamespace(ranks=[RankInfo(0, node="a", gpus="0")])
    full = [Asking(f"full-{number}", 0.2).lands("b") for number in range(5)]
    decode = Asking("decode", 0.2)
    Cards(text, *full, decode, held=[dead] if held else [], avoided=avoided).turn(0.0)
    assert decode.asks == [(set(avoided), near)]


def test_whoever_finds_no_place_is_waited_for_ten_seconds_and_then_goes_anywhere():
    text, decode, more = Asking("text", 0.4).lands("a"), Asking("decode", 0.2), Asking("more", 0.2)
    cards = Cards(text, decode, more)
    cards.turn(0.0)
    cards.turn(9.0)
    assert len(decode.asks) == 1 and more.asks == []
    cards.turn(11.0)
    assert decode.asks[1:] == [(set(), set())] and more.asks == [], "its node may have no CPUs left"
    cards.turn(22.0)
    assert len(decode.asks) == 2 and len(more.asks) == 1, "the cluster may be full"


def test_ranks_of_the_dit_are_none_of_its_business():
    rank, text = Asking("rank", 1.0, fills=False), Asking("text", 0.4)
    rank.asked_at = 0.0
    Cards(rank, text).turn(1.0)
    assert rank.asks == [] and len(text.asks) == 1
