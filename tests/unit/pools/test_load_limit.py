"""How many replicas load at once follows from how long loading takes."""

from __future__ import annotations

from ltx_ray.pools.load_limit import LoadLimit


def begun(limit: LoadLimit, most: int = 10_000) -> int:
    count = 0
    while limit.open and count < most:
        limit.begin()
        count += 1
    return count


def test_a_source_that_is_fast_enough_serves_ever_more():
    limit = LoadLimit()
    assert begun(limit) == 64
    for _ in range(64):
        limit.end(30.0)
    assert begun(limit) > 500


def test_a_source_that_slows_down_gets_no_more_readers():
    limit = LoadLimit()
    limit.begin()
    limit.end(30.0)
    assert begun(limit) == 64
    for _ in range(64):
        limit.end(120.0)
    assert limit.limit < 64 and begun(limit) == limit.limit >= 16


def test_loads_of_a_few_seconds_are_never_slow():
    limit = LoadLimit()
    for seconds in (0.1, 5.0, 9.0) * 10:
        limit.begin()
        limit.end(seconds)
    assert limit.limit >= 64


def test_a_load_that_failed_makes_room_and_says_nothing_of_the_source():
    limit = LoadLimit()
    begun(limit)
    assert not limit.open
    limit.end(None)
    assert limit.open and limit.limit == 64
