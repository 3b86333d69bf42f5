"""The time that is left, from the stages as measured."""

from __future__ import annotations

import pytest

from ltx_ray.driver.work_left import WorkLeft
from ltx_ray.stages import FULL_PATH, OUTPUT_STAGES, PATH_FROM_STORED, Stage
from tests.support.samples import request
from tests.support.schedules import HashingBuilder

SECONDS = {Stage.TEXT: 1.0, Stage.STAGE1: 40.0, Stage.STAGE2: 20.0, Stage.DECODE: 2.0}
BOTH = (Stage.STAGE1, Stage.STAGE2)
ONE_CARD = [((Stage.TEXT,), 1), (BOTH, 1), (OUTPUT_STAGES, 1)]
SPLIT = [((Stage.TEXT,), 1), ((Stage.STAGE1,), 4), ((Stage.STAGE2,), 1), (OUTPUT_STAGES, 1)]


def item(**fields):
    return HashingBuilder().item(request(**fields))


def measured(calls: int = 2, factor: float = 1.0, work: WorkLeft | None = None, **fields) -> WorkLeft:
    work = work or WorkLeft()
    for _ in range(calls):
        for stage, seconds in SECONDS.items():
            work.measured(stage, item(**fields), factor * seconds)
    return work


def alone(work: WorkLeft, stage: Stage, **fields) -> float | None:
    return work.left([(item(**fields), (stage,), 0.0)], ONE_CARD)


def test_one_card_serves_both_stages_in_turns():
    work = measured()
    waiting = [(item(), FULL_PATH, 0.0)] * 10
    assert work.left(waiting, ONE_CARD) == 10 * 60
    # After stage 1 of all of them, their clips come in a burst; the work that is left knows.
    assert work.left([(item(), FULL_PATH[2:], 0.0)] * 10, ONE_CARD) == 10 * 20
    mixed = [(item(), FULL_PATH, 0.0)] * 5 + [(item(), FULL_PATH[2:], 0.0)] * 5
    assert work.left(mixed, ONE_CARD) == 5 * 60 + 5 * 20


def test_the_stage_with_the_most_work_for_each_replica_decides():
    assert measured().left([(item(), FULL_PATH, 0.0)] * 40, SPLIT) == 40 * 20
    more = [*SPLIT[:2], ((Stage.STAGE2,), 8), SPLIT[3]]
    assert measured().left([(item(), FULL_PATH, 0.0)] * 40, more) == 40 * 40 / 4
    turning = [*SPLIT, (BOTH, 3)]
    assert measured().left([(item(), FULL_PATH, 0.0)] * 40, turning) == pytest.approx(40 * 60 / 8)


def test_no_item_is_faster_than_its_own_stages():
    many = [(roles, 100) for roles, _ in SPLIT]
    assert measured().left([(item(), FULL_PATH, 0.0)] * 3, many) == 63
    assert measured().left([(item(), FULL_PATH[3:], 0.0), (item(), FULL_PATH[1:], 0.0)], many) == 62


def test_what_a_call_under_way_has_spent_is_done():
    work = measured()
    assert work.left([(item(), FULL_PATH[1:], 30.0)], ONE_CARD) == 10 + 20 + 2
    assert work.left([(item(), FULL_PATH[1:], 99.0)], ONE_CARD) == 20 + 2, "a call that is late takes no time of others"


def test_every_size_has_its_own_seconds():
    small, large = {"height": 64, "width": 64}, {"height": 512, "width": 512}
    work = measured(factor=100.0, work=measured(**small), **large)
    assert work.left([(item(**small), FULL_PATH[3:], 0.0)] * 3, ONE_CARD) == 6
    assert work.left([(item(**large), FULL_PATH[3:], 0.0)] * 3, ONE_CARD) == 600


def test_a_size_that_was_not_measured_follows_from_the_others():
    work = measured(height=64, width=64)
    double = {"height": 64, "width": 128}
    assert work.left([(item(**double), FULL_PATH[2:], 0.0)], ONE_CARD) == pytest.approx(2 * (20 + 2))
    assert alone(work, Stage.TEXT, **double) == pytest.approx(1.0)
    steps = {"height": 64, "width": 64, "num_inference_steps": 2 * request().num_inference_steps}
    assert alone(work, Stage.STAGE1, **steps) == pytest.approx(80.0)
    assert alone(work, Stage.STAGE2, **steps) == pytest.approx(20.0)


def test_it_is_not_known_before_it_means_something():
    waiting = [(item(), FULL_PATH, 0.0)]
    assert WorkLeft().left(waiting, ONE_CARD) is None
    assert measured(calls=1).left(waiting, ONE_CARD) is None, "the first call of a replica warms it up"
    assert measured().left([(item(), PATH_FROM_STORED, 0.0)], ONE_CARD) is None, "a stage was never measured"
    assert measured().left([(item(), FULL_PATH[2:], 0.0)], ONE_CARD) is not None
    assert measured().left(waiting, [*ONE_CARD[:2], (OUTPUT_STAGES, 0)]) is None, "no replica is ready"
    assert measured().left([], ONE_CARD) is None


def test_the_preflight_clip_is_not_like_others():
    work = WorkLeft()
    for stage in FULL_PATH:
        for _ in range(3):
            preflight = HashingBuilder().item(request())
            object.__setattr__(preflight, "preflight", True)
            work.measured(stage, preflight, 1.0)
    assert work.left([(item(), FULL_PATH, 0.0)], ONE_CARD) is None


def test_many_sizes_are_not_all_remembered():
    work = WorkLeft()
    for n in range(1200):
        work.measured(Stage.DECODE, item(height=64, width=64, num_frames=8 * n + 9), 8 * n + 9)
    assert len(work._measured) == 1000
    assert alone(work, Stage.DECODE, height=64, width=64, num_frames=80_001) == pytest.approx(80_001)
