"""What the console says of the rate and of the time that is left, against what a run in virtual time then does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ltx_ray.config import PoolSpec
from ltx_ray.driver import loop, progress, tracker
from ltx_ray.stages import OUTPUT_STAGES
from tests.support.schedules import SPEC
from tests.support.simulated_runs import pools, rows, run

ONE_CARD = [
    PoolSpec("text", ("text",), 1, 1, SPEC),
    PoolSpec("stage1", ("stage1", "stage2"), 1, 1, SPEC),
    PoolSpec("decode", OUTPUT_STAGES, 1, 1, SPEC),
]


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Run a driver whose clock is that of its replicas; (time, clips so far, rate, seconds left) of every line."""

    def call(the_rows, **options):
        driver, _ = run(tmp_path, the_rows, **options)
        lines, published = [], []
        replicas = driver._join_cluster().replicas
        clock = SimpleNamespace(monotonic=lambda: replicas.now)
        for module in (loop, progress, tracker):
            monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(
            driver.progress, "update",
            lambda *_, rate, left: lines.append((replicas.now, len(published), rate, left)),
        )  # fmt: skip
        monkeypatch.setattr(driver.progress, "due", lambda: True)
        count = driver.tracker.rate.published
        monkeypatch.setattr(driver.tracker.rate, "published", lambda t: (published.append(t), count(t)))
        driver.run(driver.tracker.plan.open())
        return SimpleNamespace(lines=lines, published=published, end=replicas.now, driver=driver)

    return call


@pytest.mark.parametrize("the_pools, known", [(ONE_CARD, 0.8), (pools(1), 0.5), (pools(3), 0.5)])
def test_the_time_that_is_left_is_about_what_it_takes(watched, the_pools, known):
    """One card with a long queue first makes stage 1 of all items: how long stage 2 takes is not known till then."""
    found = watched(rows(40), the_pools=the_pools, queue_depth=40)
    assert len(found.published) == 40
    told = [(now, left) for now, _, _, left in found.lines if left is not None]
    assert told and told[0][0] < known * found.end
    for now, left in told:
        assert now + left == pytest.approx(found.end, rel=0.15), (now, left, found.end)


def test_the_rate_is_that_of_the_clips_of_this_run(watched):
    found = watched([*rows(30), *[{**row, "id": f"again-{row['id']}"} for row in rows(30)], {"id": "x", "prompt": " "}])
    assert len(found.published) == 30 and found.driver.counts["rendered"] == 60
    told = [(now, done, rate) for now, done, rate, _ in found.lines if rate is not None]
    now, done, rate = told[0]
    first_call = now - done / rate * 3600
    for now, done, rate in told:
        assert rate == pytest.approx(done / (now - first_call) * 3600), "fewer than fifty clips: since stage 1 began"
    assert found.lines[-1][2:] == (None, None), "the rate of the whole run follows the last line"
    resumed = watched(rows(30))
    assert resumed.driver.counts["already_done"] == 30 and {line[2:] for line in resumed.lines} == {(None, None)}


def test_previews_are_what_a_run_makes_that_stops_after_stage_1(watched):
    found = watched(rows(5), latents_only=True)
    assert len(found.published) == 5 and any(rate for _, _, rate, _ in found.lines)
