"""The rate of a run: what counts, over which time, and that everybody who says it reads the same."""

from __future__ import annotations

import json
import random

import pytest

from ltx_ray.dataset.clip_rate import ClipRate, final_rate, rate_text, recorded_rate


def rate_at(now: float, times, began: float = 0.0) -> float | None:
    rate = ClipRate()
    rate.began(began)
    for time in times:
        rate.published(time)
    return rate.per_hour(now)


def test_no_clip_has_no_rate():
    assert ClipRate().per_hour(10.0) is None
    assert rate_at(1000.0, []) is None
    assert rate_at(5.0, [5.0], began=5.0) is None, "no time has passed"


def test_before_the_window_is_filled_it_counts_from_the_first_call_of_stage_1():
    assert rate_at(200.0, [150.0, 190.0], began=100.0) == 2 / 100 * 3600
    assert rate_at(3600.0, [900.0, 1800.0, 2700.0, 3600.0]) == 4, "few clips: fifteen minutes are not enough"
    assert rate_at(100.0, range(1, 101)) == 3600, "many clips: but fifteen minutes are not over"


def test_the_earliest_call_counts():
    rate = ClipRate()
    for time in (50.0, 20.0, 70.0):
        rate.began(time)
    rate.published(80.0)
    assert rate.per_hour(120.0) == 36


def test_a_fast_run_is_measured_over_fifteen_minutes():
    slow, fast = range(10, 10_001, 10), range(10_001, 10_901)
    assert rate_at(10_000, slow) == 360
    assert rate_at(10_900, [*slow, *fast]) == 3600
    assert rate_at(10_450, [*slow, *range(10_001, 10_451)]) == (45 + 450) / 900 * 3600


def test_a_slow_run_is_measured_over_fifty_clips():
    times = [100 * n for n in range(1, 101)] + [10_000 + 200 * n for n in range(1, 51)]
    assert rate_at(20_000, times) == 18, "the last fifty came every 200 s"
    assert rate_at(30_000, times) == 9, "and since then there was none"
    assert rate_at(15_000, times[:125]) == 50 / 7500 * 3600


@pytest.mark.parametrize("burst", [1, 4, 16])
def test_a_run_that_finishes_in_bursts_is_rated_by_what_it_makes(burst):
    """One card: stage 1 of a burst of clips, then stage 2 of them."""
    stage1, stage2, times, now = 30.0, 13.0, [], 0.0
    while now < 8 * 3600:
        now += burst * stage1
        for _ in range(burst):
            now += stage2
            times.append(now)
    true = 3600 / (stage1 + stage2)
    for n in range(100, len(times), 7):
        assert abs(rate_at(times[n] + 1, times[: n + 1]) / true - 1) < 0.36
    early = rate_at(times[burst - 1], times[:burst])
    assert early == pytest.approx(true)


def test_the_memory_does_not_grow():
    rate = ClipRate()
    rate.began(0.0)
    for n in range(200_000):
        rate.published(n / 50)
    assert rate.clips == 200_000 and rate.per_hour(4000.0) == pytest.approx(180_000, rel=0.001)
    assert len(rate._seconds) <= 902 and len(rate._last) <= 51


def test_it_agrees_with_counting():
    dice = random.Random(3)
    times = sorted(dice.uniform(0, 6000) for _ in range(400))
    for now in range(1000, 6000, 331):
        done = [t for t in times if t <= now]
        begin = min(now - 900, done[-51]) if len(done) > 50 else 0
        count = sum(t > max(begin, 0) for t in done)
        assert rate_at(now, done) == pytest.approx(count / (now - max(begin, 0)) * 3600)


def test_the_rate_of_a_run_that_has_ended():
    assert final_rate(6, "2026-11-23T10:00:00+00:00", "2026-11-23T10:00:12.500+00:00") == 6 / 12.5 * 3600
    assert final_rate(0, "2026-11-23T10:00:00Z", "2026-11-23T11:00:00Z") == 0
    for times in ((None, None), ("2026-11-23T10:00:00Z", None), ("x", "y"), ("2026-11-23",) * 2):
        assert final_rate(3, *times) is None


@pytest.mark.parametrize(
    "per_hour, text",
    [
        (1763.2, "1,763 clips/h"), (12_345_678, "12,345,678 clips/h"), (83.4, "83 clips/h"), (9.99, "10 clips/h"),
        (9.94, "9.9 clips/h"), (1.0, "1 clips/h"), (0.417, "0.42 clips/h"), (27_360.0, "27,360 clips/h"),
    ],
)  # fmt: skip
def test_it_is_written_in_one_way(per_hour, text):
    assert rate_text(per_hour) == text


# --- from the records of a run ---------------------------------------------------------------------


def events(*finished: float, began: float = 100.0) -> list[dict]:
    return [
        {"t": 90.0, "event": "run_started"},
        {"t": 95.0, "event": "preflight_call", "stage": "stage1", "seconds": 5.0},
        {"t": began + 1, "event": "call", "stage": "text", "seconds": 1.0},
        {"t": began + 20, "event": "call", "stage": "stage1", "seconds": 20.0, "start": 7e9},
        *({"t": t, "event": "item_finished", "item_id": str(t)} for t in finished),
    ]


def test_while_a_run_goes_on_its_events_give_the_rate_that_the_console_has():
    for state in ("running", "draining"):
        run = {"state": state, "started_at": "2026-11-23T10:00:00Z", "clips_per_hour": None, "counts": {"rendered": 9}}
        assert recorded_rate(run, events(150.0, 190.0), 200.0) == rate_at(200.0, [150.0, 190.0], began=100.0) == 72
        assert recorded_rate(run, events(), 200.0) is None


def test_a_killed_run_has_the_rate_of_its_last_event():
    log = [*events(150.0, 190.0), {"t": 220.0, "event": "retry"}]
    assert recorded_rate({"state": "running"}, log, None) == 60


def test_rows_of_one_clip_count_once_and_failed_illegal_and_copied_rows_not_at_all():
    log = events(150.0, 190.0)
    log += [{"t": 195.0, "event": name, "item_id": "x"} for name in ("item_failed", "row_illegal", "retry")]
    log += [{"t": 195.0, "event": "item_finished", "item_id": "190.0", "id": "another row"}] * 5
    assert recorded_rate({"state": "running"}, log, 200.0) == 72


def test_a_run_that_resumes_from_stored_latents_counts_from_there():
    log = [{"t": 130.0, "event": "call", "stage": "load_latents", "seconds": 30.0}, *events(150.0)[4:]]
    assert recorded_rate({"state": "running"}, log, 200.0) == 36


def test_after_the_end_everybody_reads_the_record():
    run = {"state": "finished", "clips_per_hour": 982.4, "counts": {"rendered": 1000}}
    assert recorded_rate(run, events(150.0, 190.0), 200.0) == 982.4
    assert recorded_rate({**run, "clips_per_hour": 0.0}, events(150.0), 200.0) is None
    assert recorded_rate({**run, "clips_per_hour": None}, events(150.0), 200.0) is None


def test_the_record_of_an_older_version_counts_rows():
    times = {"started_at": "2026-11-23T10:00:00Z", "finished_at": "2026-11-23T10:30:00Z"}
    assert recorded_rate({"state": "drained", **times, "counts": {"rendered": 4}}, [], None) == 8


@pytest.mark.parametrize(
    "run", [{}, {"state": 7}, {"state": ["running"]}, {"state": "finished", "clips_per_hour": "fast"},
            {"state": "finished", "clips_per_hour": float("nan")}, {"state": "failed", "counts": []},
            {"state": "finished", "counts": {"rendered": 10**400}, "started_at": 1e300}],
)  # fmt: skip
def test_a_damaged_record_has_no_rate(run):
    assert recorded_rate(run, [], 1.0) is None


def test_damaged_events_are_passed_over():
    log = json.loads('[{}, {"t": "x"}, {"t": 1e999}, {"t": NaN}, {"t": 5, "event": []}, {"t": 6, "event": "call", '
                     '"stage": {}}, {"t": 7, "event": "item_finished", "item_id": [1]}]')  # fmt: skip
    log += [{"t": 10**400, "event": "item_finished"}, *events(150.0)]
    assert recorded_rate({"state": "running"}, log, 200.0) == 2 / 100 * 3600
