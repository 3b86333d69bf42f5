"""A gang that cannot start or merge ends as a whole, says where and why it failed, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import time

import pytest

from ltx_ray.config import EngineSpec, GangLayout, ModelFiles, Numerics, PoolSpec, RunLimits
from ltx_ray.engine.fake import open_gate
from ltx_ray.pools import gang as gangs
from ltx_ray.pools.gang import Gang, GangLost, GangState
from ltx_ray.pools.load_progress import LoadProgress
from tests.support.passing_time import let_time_pass
from tests.support.runner import FAKE

ENGINES = "tests.support.engines"


def start(engine: str, ranks: int = 2) -> Gang:
    """A gang of `engine`, once it is ready; raises GangLost with the gang when it is lost."""
    import ray

    spec = EngineSpec(
        f"{ENGINES}:{engine}", ModelFiles("", "", ""), Numerics(), "/tmp/none", layout=GangLayout(tp=ranks)
    )
    gang = Gang(engine, PoolSpec("pool", ("stage1",), 1, ranks, spec))
    try:
        until = time.time() + 600
        while time.time() < until:
            if gang.state is GangState.WAITING:
                gang.load()
            ready, _ = ray.wait(gang.waits_for(), num_returns=1, timeout=1)
            if ready and gang.advance(set(ready)):
                return gang
        raise AssertionError(f"still {gang.state}")
    except GangLost as lost:
        lost.gang = gang
        raise


def assert_nothing_left(gang: Gang) -> None:
    from ray.util import placement_group_table

    gang.kill()
    until = time.time() + 300
    while time.time() < until:
        state = placement_group_table(gang._group)["state"]
        if state == "REMOVED" and not any(_alive(rank.pid) for rank in gang.ranks):
            return
        time.sleep(0.1)
    raise AssertionError(f"{state}, {[rank.pid for rank in gang.ranks if _alive(rank.pid)]} alive")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_rank_without_memory_is_named_with_its_node_device_and_tensor(cluster):
    with pytest.raises(GangLost) as caught:
        start("ShardOutOfMemory")
    message = str(caught.value)
    assert message.startswith(f"rank 1 on node {caught.value.gang.ranks[1].address} (cpu): OutOfMemoryError: ")
    assert "blocks.3.attn1.to_q.weight" in message
    assert_nothing_left(caught.value.gang)


def test_a_rendezvous_that_times_out(cluster, monkeypatch):
    monkeypatch.setattr(gangs, "_RENDEZVOUS_SECONDS", 3.0)
    with pytest.raises(GangLost, match=r"rank 0 on node \S+ \(cpu\): \w+: .*(?i:timeout|timed out)"):
        start("LateToRendezvous")


def test_a_replica_whose_merge_failed_serves_no_other_row(runner):
    """The row is charged one attempt and rendered by a new replica."""
    rows = [
        {"id": name, "prompt": f"{name} {mark}", "height": 64, "width": 64, "num_frames": 9}
        for name, mark in (("first", ""), ("second", "merge"), ("third", ""))
    ]
    engines = {**FAKE, "diffusion": f"{ENGINES}:FailsWhileMerging"}
    assert runner.render(rows, fake=False, engines=engines, stage1=1, stage2=0) == 0
    index = runner.index()
    assert {name: row["attempts"] for name, row in index.items()} == {"first": 1, "second": 2, "third": 1}
    (lost,) = (event for event in runner.events() if event["event"] == "gang_lost")
    reason = r"stage1: rank 0 on node \S+ \(cpu\): OutOfMemoryError: merging into blocks\.0\.ff\.net\.2\.weight"
    assert re.match(reason, lost["reason"])


def test_merges_that_never_succeed_stop_the_run(runner):
    """Each row would cost replicas otherwise, however many rows there are."""
    rows = [
        {"id": f"r{n}", "prompt": "merge always", "height": 64, "width": 64, "num_frames": 9, "seed": n}
        for n in range(5)
    ]
    engines = {**FAKE, "diffusion": f"{ENGINES}:FailsWhileMerging"}
    limits = RunLimits(max_attempts=1)
    assert runner.render(rows, fake=False, engines=engines, limits=limits, stage1=1, stage2=0) == 1
    assert sum(event["event"] == "gang_lost" for event in runner.events()) == 2
    failed = list(runner.failed().values())
    assert {row["stage"] for row in failed} == {"stage1"} and "ReplicaError" in failed[0]["traceback"]


def test_a_lora_that_cannot_be_used_ends_the_run_at_once(runner):
    """No other replica would do better, and no other row of those that use it."""
    rows = [
        {"id": f"r{n}", "prompt": f"{n} [[stage1:model]]", "height": 64, "width": 64, "num_frames": 9} for n in range(5)
    ]
    assert runner.render(rows, stage1=1, stage2=0) == 2
    kinds = [event["event"] for event in runner.events()]
    assert "retry" not in kinds and "gang_lost" not in kinds and kinds[-1] == "run_finished"
    assert not runner.index()


ROW = {"id": "one", "prompt": "a", "height": 64, "width": 64, "num_frames": 9}


def test_a_gang_that_still_reads_is_waited_for(runner, monkeypatch):
    """It is looked at four times in the time to start. A third of that passes whenever it has read again."""
    read_at, passed = [0], [0.0]

    def take_in(progress, gang, found, now):
        _take_in(progress, gang, found, now)
        if found.pending is None:
            read_at.append(pieces())

    def pieces() -> int:
        return int((runner.output / "_fake" / "pieces").read_text() or 0) if runner.made("pieces") else 0

    def time_passed() -> float:
        """Nothing passes before the newest look has been answered, and after the last one."""
        looks = len(read_at) - 1
        if looks == 5:
            open_gate(str(runner.output))
        elif pieces() > read_at[-1] + 3 and runner.is_up("text", "decode") and passed[0] == 600.0 * looks:
            passed[0] += 600.0
        return passed[0]

    _take_in = LoadProgress._take_in
    monkeypatch.setattr(LoadProgress, "_take_in", take_in)
    let_time_pass(monkeypatch.setattr, time_passed)
    engines = {**FAKE, "diffusion": f"{ENGINES}:SlowDisk"}
    assert runner.render([ROW], fake=False, engines=engines, stage1=1, stage2=0) == 0
    assert passed[0] > RunLimits().start_timeout and not [e for e in runner.events() if e["event"] == "gang_lost"]


def test_a_gang_that_reads_nothing_is_given_up(runner, monkeypatch, capsys):
    """The time to start passes when a gang loads."""

    def time_passed() -> float:
        gangs = runner.made("loads-*")
        return gangs * (RunLimits().start_timeout + 1) if gangs and runner.is_up("text", "decode") else 0.0

    let_time_pass(monkeypatch.setattr, time_passed)
    engines = {**FAKE, "diffusion": f"{ENGINES}:NoDisk"}
    limits = RunLimits(max_attempts=1)
    assert runner.render([ROW], fake=False, engines=engines, stage1=1, stage2=0, limits=limits) == 1
    assert "not ready after 1800 s (loading)" in capsys.readouterr().err
