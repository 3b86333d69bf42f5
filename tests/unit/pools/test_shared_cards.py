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

    def __init__(self, part: float, fills: bool = True):
        self.pool = PoolSpec("pool", ("text",), 1, 1, SPEC, gpus_per_rank=part, fills_cards=fills)
        self.state, self.ranks = GangState.PLACING, []
        self.asked_at, self.asked_near, self.asks = None, False, []
        self.now = 0.0

    def ask(self, avoided, near=()):
        self.asked_at, self.asked_near = self.now, bool(near)
        self.asks.append((set(avoided), set(near)))

    def lands(self, node: str, gpu: str = "0") -> Asking:
        self.state, self.ranks = GangState.WAITING, [RankInfo(0, node=node, gpus=gpu)]
        return self


def turn(*gangs: Asking, now: float = 0.0, held=(), avoided=()) -> None:
    for gang in gangs:
        gang.now = now
    SharedCards().ask(gangs, held, set(avoided), now)


def test_places_are_asked_for_one_after_the_other_and_the_second_beside_the_first():
    text, decode = Asking(0.4), Asking(0.2)
    turn(text, decode)
    turn(text, decode, now=1.0)
    assert text.asks == [(set(), set())] and decode.asks == []
    text.lands("a")
    turn(text, decode, now=2.0)
    assert decode.asks == [(set(), {"a"})]


@pytest.mark.parametrize(("held", "avoided", "near"), [(False, (), {"a"}), (True, (), set()), (False, ("a",), set())])
def test_only_cards_that_work_and_have_room_count(held, avoided, near):
    text, dead = Asking(0.4).lands("a"), SimpleNamespace(ranks=[RankInfo(0, node="a", gpus="0")])
    full = [Asking(0.2).lands("b") for _ in range(5)]
    decode = Asking(0.2)
    turn(text, *full, decode, held=[dead] if held else [], avoided=avoided)
    assert decode.asks == [(set(avoided), near)]


def test_whoever_finds_no_place_is_waited_for_ten_seconds_and_then_goes_anywhere():
    text, decode, more = Asking(0.4).lands("a"), Asking(0.2), Asking(0.2)
    turn(text, decode, more)
    turn(text, decode, more, now=9.0)
    assert len(decode.asks) == 1 and more.asks == []
    turn(text, decode, more, now=11.0)
    assert decode.asks[1:] == [(set(), set())], "its node may have no CPUs left"
    turn(text, decode, more, now=22.0)
    assert len(decode.asks) == 2 and len(more.asks) == 1, "the cluster may be full"


def test_ranks_of_the_dit_are_none_of_its_business():
    rank, text = Asking(1.0, fills=False), Asking(0.4)
    rank.asked_at = 0.0
    turn(rank, text, now=1.0)
    assert rank.asks == [] and len(text.asks) == 1
