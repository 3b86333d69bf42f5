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
        limit.end("dit", 30.0)
    assert begun(limit) > 500


def test_a_source_that_slows_down_gets_no_more_readers():
    limit = LoadLimit()
    limit.begin()
    limit.end("dit", 30.0)
    assert begun(limit) == 64
    for _ in range(64):
        limit.end("dit", 120.0)
    assert limit.limit < 64 and begun(limit) == limit.limit >= 16


def test_loads_of_a_few_seconds_are_never_slow():
    limit = LoadLimit()
    for seconds in (0.1, 5.0, 9.0) * 10:
        limit.begin()
        limit.end("dit", seconds)
    assert limit.limit >= 64


def test_a_load_that_failed_makes_room_and_says_nothing_of_the_source():
    limit = LoadLimit()
    begun(limit)
    assert not limit.open
    limit.end("dit", None)
    assert limit.open and limit.limit == 64


def test_a_small_pool_that_loads_fast_makes_another_no_slower():
    limit = LoadLimit()
    for pool, seconds in (("decode", 6.0), ("dit", 40.0)) * 40:
        limit.begin()
        limit.end(pool, seconds)
    assert limit.limit >= 64


def test_a_number_that_was_given_stays():
    limit = LoadLimit(3)
    assert begun(limit) == 3
    for seconds in (1.0, 500.0, 1.0):
        limit.end("dit", seconds)
    assert begun(limit) == 3
