"""The timeline of a run: what it keeps, that it stays small, and that damage in it is told from what a run wrote."""

from __future__ import annotations

import json
import random

import pytest

from ltx_ray.dataset.timeline import MAX_LANES, MAX_SPANS, TimelineBuilder, build_timeline, parse_timeline
from ltx_ray.dataset.timeline_chart import draw_timeline
from tests.support.report_data import run_events


def call(replica: str, start: float, seconds: float, stage: str = "stage1", **fields) -> dict:
    return {"t": start + seconds, "event": "call", "role": stage, "replica": replica, "stage": stage, "id": "x",
            "start": start, "seconds": seconds, "ok": True, **fields}  # fmt: skip


CALL = call("a", 1.0, 2.0)


def test_it_comes_back_from_json_as_it_was():
    for events in (run_events(), run_events(20_000), run_events(shared=True)):
        timeline = build_timeline(events)
        assert parse_timeline(timeline.json()) == timeline
        assert draw_timeline(parse_timeline(timeline.json())) == draw_timeline(timeline)


def test_few_spans_are_kept_and_many_are_added_up():
    few = [call("a", 10.0 * n, 7.0) for n in range(MAX_SPANS)]
    (role,) = build_timeline(few).roles
    assert len(role.lanes[0].spans) == MAX_SPANS and not role.lanes[0].work
    many = [*few, call("a", 10.0 * MAX_SPANS, 7.0)]
    timeline = build_timeline(many)
    (lane,) = timeline.roles[0].lanes
    assert not lane.spans and lane.work["stage1"].times == MAX_SPANS + 1
    assert lane.work["stage1"].seconds == 7.0 * (MAX_SPANS + 1)


def test_no_second_is_lost_or_gained_however_often_the_bins_widen():
    dice, events, seconds, t = random.Random(4), [], {"a": 0.0, "b": 0.0}, 1e9
    for n in range(5000):
        replica, spent = dice.choice("ab"), dice.choice([0.01, 1.0, 30.0, 900.0])
        t += dice.random() * 100 * 1.002**n
        events.append(call(replica, t - spent, spent))
        seconds[replica] += spent
    timeline = build_timeline([{"t": 1e9 - 1000, "event": "run_started"}, *events])
    for lane in timeline.roles[0].lanes:
        bins = lane.work["stage1"].bins
        assert sum(bins) == pytest.approx(seconds[lane.replica], rel=0.001)
        assert 200 < len(bins) <= 480


def test_work_is_where_it_was():
    """A replica works in the second half of a run alone."""
    events = [{"t": 0.0, "event": "run_started"}, *(call("a", 10_000 + 10.0 * n, 10.0) for n in range(1000))]
    timeline = build_timeline(events)
    bins, width = timeline.roles[0].lanes[0].work["stage1"].bins, timeline.bin_seconds
    for number, spent in enumerate(bins):
        middle = (number + 0.5) * width
        if abs(middle - 10_000) > width and abs(middle - 20_000) > width:
            assert spent == pytest.approx(width if 10_000 < middle < 20_000 else 0.0)


def test_busy_is_the_part_of_its_lives_in_which_a_replica_runs_calls():
    events = [
        {"t": 0.0, "event": "gang_starting", "role": "stage1", "replica": "a"},
        {"t": 100.0, "event": "gang_started", "role": "stage1", "replica": "a", "seconds": 100.0},
        call("a", 100.0, 50.0),
        {"t": 160.0, "event": "switch", "role": "stage1", "replica": "a", "to": "stage2", "seconds": 5.0},
        {"t": 200.0, "event": "gang_given_back", "role": "stage1", "replica": "a", "reason": "no row needs it"},
        {"t": 900.0, "event": "run_finished"},
    ]
    (role,) = build_timeline(events).roles
    assert (role.busy, role.lanes[0].alive) == (0.5, ((100.0, 200.0),))
    assert role.lanes[0].marks == (), "it was not lost"


def test_replicas_that_are_lost_again_and_again_cost_no_room():
    builder = TimelineBuilder()
    for n in range(3000):
        name, t = f"stage1-{n}", 100.0 * n
        place = {"role": "stage1", "replica": name}
        builder.add({"t": t, "event": "gang_starting", **place})
        builder.add({"t": t + 20, "event": "gang_started", **place, "seconds": 20.0})
        builder.add(call(name, t + 20, 40.0))
        builder.add({"t": t + 90, "event": "gang_lost", **place, "reason": "its node was lost"})
    timeline = builder.timeline()
    (role,) = timeline.roles
    assert role.replicas == 3000 and len(role.lanes) == MAX_LANES and role.busy == pytest.approx(40 / 70, abs=1e-4)
    assert len(timeline.json()) < 300_000
    assert "2,880 more replicas are not drawn" in draw_timeline(timeline)


def test_of_many_marks_all_are_counted():
    events = [call("a", 10.0 * n, 5.0, ok=False) for n in range(10_000)]
    events += [{"t": 10.0 * n, "event": "item_failed", "id": str(n), "stage": "decode"} for n in range(10_000)]
    timeline = build_timeline(events)
    marks = timeline.roles[0].lanes[0].marks
    assert len(marks) <= 64 and sum(mark.count for mark in marks) == 10_000
    assert len(timeline.failed) <= 64 and '<div class="group">10,000</div>' in draw_timeline(timeline)


@pytest.mark.parametrize(
    "change", [{"begin": float("nan")}, {"end": 0.0}, {"begin": "x"}, {"roles": 3}, {"bin_seconds": float("inf")},
               {"failed": [{"time": 1.0, "sign": "<script>", "title": "x"}]}, {"failed": [[]]}],
)  # fmt: skip
def test_a_damaged_timeline_is_refused(change):
    good = json.loads(build_timeline(run_events()).json())
    with pytest.raises(ValueError):
        parse_timeline(json.dumps({**good, **change}))


def test_damaged_events_are_passed_over():
    bad = [{}, {"t": "x"}, {"t": 1.0}, {"t": 1.0, "event": []}, {"t": 5.0, "event": "call", "role": [], "replica": {}},
           call("a", 1e308, 1e308), call("a", 1.0, -1.0), {**CALL, "start": "x"}, {**CALL, "t": 1e999},
           {"t": 1.0, "event": "gang_started", "role": "a", "replica": "a", "ranks": [3]}]  # fmt: skip
    good = run_events()
    assert build_timeline([*bad[:5], *good, *bad[5:9]]).roles == build_timeline(good).roles
    assert build_timeline(bad) is not None
    assert build_timeline([call("a", 1e300, 1.0)]) is None


def test_text_that_utf8_cannot_hold_costs_no_timeline():
    events = [call("a", 1.0, 2.0, ok=False, id="\ud800"), {"t": 2.0, "event": "item_failed", "id": "\ud800"}]
    timeline = build_timeline(events)
    assert parse_timeline(timeline.json()) == timeline and len(timeline.failed) == 1
