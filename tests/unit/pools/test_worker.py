"""A rank outside Ray: the order of its start, and that the seconds of a start are reported once."""

from __future__ import annotations

from dataclasses import replace

from ltx_ray.config import EngineSpec, ModelFiles, Numerics
from ltx_ray.engine.base import Rank
from ltx_ray.pools.worker import RankActor
from ltx_ray.records import EngineFacts, Evidence, RowError

SPEC = EngineSpec("tests.unit.pools.test_worker:Starting", ModelFiles("", "", ""), Numerics(), "out")


class Starting:
    """An engine whose calls fail, and leave the facts of the call before, when their item is "bad"."""

    def __init__(self, spec: EngineSpec, rank: Rank):
        self.facts = EngineFacts()
        self.order: list[str] = []

    @staticmethod
    def join_gang(*_: object) -> str:
        return "cpu"

    def load(self) -> None:
        self.order.append("load")
        self.facts = EngineFacts(start_seconds={"read": 2.0})

    def evidence(self) -> Evidence:
        self.order.append("evidence")
        return Evidence({}, {}, "", "cpu", {})

    def begin_warm_up(self) -> None:
        self.order.append("begin_warm_up")

    def run(self, stage: str, item: str) -> None:
        if item == "bad":
            raise RowError("at fault")
        self.facts = replace(self.facts, start_seconds={"warm": 3.0} if item == "first" else None)


def test_a_warm_up_begins_once_everything_for_which_the_replica_waits_is_done():
    actor = RankActor()
    assert actor.start(SPEC, 0, 1, None, 10.0).ok
    assert actor.engine.order == ["load", "evidence", "begin_warm_up"]


def test_the_seconds_of_a_start_are_reported_once_whatever_becomes_of_calls():
    actor = RankActor()
    parts = actor.start(SPEC, 0, 1, None, 10.0).facts.start_seconds
    assert parts is not None and parts["read"] == 2.0 and parts.keys() == {"import", "join", "read", "known answer"}
    reports = [actor.run("decode", item)[0] for item in ("bad", "first", "bad", "second")]
    assert [report.ok for report in reports] == [False, True, False, True]
    assert [report.facts.start_seconds for report in reports] == [None, {"warm": 3.0}, None, None]
