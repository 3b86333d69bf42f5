"""How busy the pools of a run were, and why they were idle, from made-up events."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from ltx_ray.config import RunLimits
from scripts.bench.pool_times import LOADING, NEXT_FULL, NO_CLIP_LEFT, READY, read_line, waited_for
from scripts.bench_line import replicas, restored, table

SPLIT = {"text": "text", "stage1": "stage1", "stage2": "stage2", "decode": "decode"}
BOTH = {"text": "text", "stage1": "diffusion", "stage2": "diffusion", "decode": "decode"}


def call(pools, stage, clip, start, end, replica=0):
    pool = pools[stage]
    return {
        "t": end, "event": "call", "role": pool, "replica": f"{pool}-{replica}", "stage": stage,
        "item_id": f"item-{clip}", "start": start, "seconds": end - start, "ok": True,
    }  # fmt: skip


def started(pool, t, replica=0):
    return {"t": t, "event": "gang_started", "role": pool, "replica": f"{pool}-{replica}", "seconds": 1.0}


@pytest.fixture
def split():
    """Two clips through one replica of each stage, from the first stage-1 call at 102 to the last clip at 115."""
    return [
        *(started(pool, 100.0) for pool in ("text", "stage1", "stage2")),
        started("decode", 110.0),
        call(SPLIT, "text", 0, 101.0, 102.0),
        call(SPLIT, "text", 1, 102.0, 103.0),
        call(SPLIT, "stage1", 0, 102.0, 106.0),
        call(SPLIT, "stage1", 1, 106.0, 110.0),
        call(SPLIT, "stage2", 0, 106.0, 108.0),
        call(SPLIT, "stage2", 1, 111.0, 113.0),
        call(SPLIT, "decode", 0, 110.5, 111.5),
        call(SPLIT, "decode", 1, 113.0, 115.0),
    ]


@pytest.fixture
def both():
    """Two replicas of both stages, of which the second is late, take one clip each from 0 to 10."""
    return [
        *(started(pool, 0.0) for pool in ("text", "diffusion", "decode")),
        started("diffusion", 2.0, 1),
        call(BOTH, "text", 0, -2.0, -1.0),
        call(BOTH, "text", 1, -1.0, 0.0),
        call(BOTH, "stage1", 0, 0.0, 3.0),
        call(BOTH, "stage1", 1, 2.0, 5.0, 1),
        call(BOTH, "stage2", 0, 3.0, 6.0),
        {"t": 6.0, "event": "switch", "role": "diffusion", "replica": "diffusion-0", "seconds": 1.0},
        call(BOTH, "stage2", 1, 5.0, 7.0, 1),
        {"t": 7.0, "event": "switch", "role": "diffusion", "replica": "diffusion-1", "seconds": 0.5},
        call(BOTH, "decode", 0, 6.0, 8.0),
        call(BOTH, "decode", 1, 8.0, 10.0),
    ]


def test_clips_per_hour_from_the_first_stage_1_call_to_the_last_clip(split):
    times = read_line(split, 2)
    assert times.span == 13.0
    assert times.clips_per_hour == pytest.approx(2 / 13 * 3600)
    assert times.stages == {"text": 1.0, "stage1": 4.0, "stage2": 2.0, "decode": 1.5}


def test_why_each_pool_of_one_stage_was_idle(split):
    pools = read_line(split, 2).pools
    assert {name: pool.busy for name, pool in pools.items()} == {
        "text": 1.0,
        "stage1": 8.0,
        "stage2": 4.0,
        "decode": 3.0,
    }
    assert pools["text"].idle == {NO_CLIP_LEFT: 12.0}
    assert pools["stage1"].idle == {NO_CLIP_LEFT: 5.0}
    assert pools["stage2"].idle == {waited_for("stage1"): 6.0, READY: 1.0, NO_CLIP_LEFT: 2.0}
    assert pools["decode"].idle == {LOADING: 8.0, READY: 0.5, waited_for("stage2"): 1.5}
    assert pools["stage2"].idle_share == pytest.approx(9 / 13)


def test_replicas_that_serve_both_stages_are_one_pool(both):
    times = read_line(both, 2)
    pool = times.pools["diffusion"]
    assert (pool.replicas, pool.calls, pool.busy) == (2, 4, 11.0)
    assert pool.idle == {LOADING: 2.0, NO_CLIP_LEFT: 7.0}
    assert pool.idle_share == pytest.approx(9 / 20)
    assert (times.switches, times.merging) == (2, 1.5)


def test_every_second_of_every_replica_is_busy_or_idle(split, both):
    for events in (split, both):
        times = read_line(events, 2)
        for pool in times.pools.values():
            assert pool.busy + sum(pool.idle.values()) == pytest.approx(pool.replicas * times.span)


def test_a_full_queue_holds_the_stage_before_it_back():
    """The last clip waits for text while as many as a queue holds wait for stage 1."""
    last = RunLimits.queue_depth + 1
    events = [started(pool, 0.0) for pool in SPLIT]
    for clip in range(last):
        events.append(call(SPLIT, "text", clip, clip - 10.0, clip - 9.0))
    events.append(call(SPLIT, "text", last, 10.0, 11.0))
    for clip in range(last + 1):
        begin = 10.0 * clip
        events.append(call(SPLIT, "stage1", clip, begin, begin + 10))
        events.append(call(SPLIT, "stage2", clip, begin + 10, begin + 11))
        events.append(call(SPLIT, "decode", clip, begin + 11, begin + 12))
    assert read_line(events, last + 1).pools["text"].idle[NEXT_FULL] == 10.0
    # With one clip less in the queue, nothing holds it back.
    fewer = [event for event in events if event.get("item_id") != "item-1"]
    idle = read_line(fewer, last).pools["text"].idle
    assert NEXT_FULL not in idle and idle[READY] == 10.0


def test_a_lost_gang_makes_the_figures_worthless(split):
    lost = {"t": 105.0, "event": "gang_lost", "role": "stage1", "replica": "stage1-0", "reason": "a rank died"}
    with pytest.raises(RuntimeError, match="stage1-0 ended before the run did: a rank died"):
        read_line([*split, lost], 2)


def test_a_missing_call_is_noticed(split):
    with pytest.raises(AssertionError, match="calls for 2 clips"):
        read_line(split[:-1], 2)


def test_one_gpu_for_each_stage_or_all_for_both():
    assert (replicas("split", 2), replicas("both", 2)) == ((1, 1), (2, 0))
    assert (sum(replicas("split", 8)), replicas("both", 8)) == (8, (8, 0))


def test_the_table_has_both_runs_side_by_side(split, both):
    text = table({"split": read_line(split, 2), "both": read_line(both, 2)})
    lines = {line[:36].strip(): line[36:].split() for line in text.splitlines()}
    assert lines["clips/h"] == ["553.8", "720.0"]
    assert lines["stage2: replicas"] == ["1", "-"] and lines["diffusion: replicas"] == ["-", "2"]
    assert "clips/h of both over split: 1.300" in text
    assert "over split" not in table({"both": read_line(both, 2)})


def test_figures_come_back_from_json(split):
    times = read_line(split, 2)
    assert restored(json.loads(json.dumps({**asdict(times), "measured": "today"}))) == times
