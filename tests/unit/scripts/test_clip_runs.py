"""The parts of a start, and the first decode call against the others, from made-up events."""

from __future__ import annotations

import math

import pytest

from scripts.bench.clip_runs import first_over_steady, start_parts


def started(t, role, seconds, **parts):
    rank = {"rank": 0, "start_seconds": parts} if parts else {"rank": 0}
    return {"t": t, "event": "gang_started", "role": role, "replica": f"{role}-1", "seconds": seconds, "ranks": [rank]}


def test_parts_are_those_of_the_first_replica_of_each_pool():
    later = {"t": 190.0, "event": "start_finished", "role": "diffusion", "replica": "diffusion-1"}
    events = [
        started(130.0, "text", 20.0),
        started(140.0, "diffusion", 31.0, read=2.5, warm=4.0),
        started(150.0, "diffusion", 9.0, read=99.0),
        {**later, "seconds": {"merge": 0.3}},
        {**later, "seconds": {"merge": 0.1, "pin": 12.0}},
        {"t": 200.0, "event": "call"},
    ]
    assert start_parts(events, 100.0) == {
        "ready: text": 30.0,
        "since it was asked for: text": 20.0,
        "ready: diffusion": 40.0,
        "since it was asked for: diffusion": 31.0,
        "start of diffusion: read": 2.5,
        "start of diffusion: warm": 4.0,
        "later, diffusion: merge": 0.3,
        "later, diffusion: pin": 12.0,
    }


def test_the_first_call_is_the_one_that_began_first():
    calls = [{"start": start, "work": work} for start, work in ((3.0, 4.0), (1.0, 9.0), (2.0, 5.0), (4.0, 6.0))]
    assert first_over_steady(calls) == pytest.approx(9.0 / 5.0)
    assert math.isnan(first_over_steady(calls[:1]))
