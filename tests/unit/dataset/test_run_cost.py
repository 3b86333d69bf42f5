"""What a run costs."""

from __future__ import annotations

import pytest

from ltx_ray.dataset.run_cost import RunCost, cost_of, recorded_cost
from ltx_ray.records import plain


def test_dollars_are_of_reserved_time_and_divided_by_clips_and_by_their_length():
    cost = cost_of(gpu_seconds=7200, price=2.5, clips=100, video_seconds=1800)
    assert (cost.gpu_hours, cost.dollars, cost.dollars_per_clip, cost.dollars_per_video_hour) == (2.0, 5.0, 0.05, 10.0)
    assert str(cost) == "2.00 GPU hours, $5.00: $0.05 a clip, $10.00 an hour of video"
    assert recorded_cost({"cost": plain(cost)}) == cost


def test_what_is_not_known_is_left_out():
    assert str(cost_of(3600, None, 5, 25.0)) == "1.00 GPU hours"
    assert str(cost_of(3600, 2.0, 0, 0.0)) == "1.00 GPU hours, $2.00"
    assert cost_of(0.0, 2.0, 0, 0.0) == RunCost(0.0, 0.0)


@pytest.mark.parametrize("cost", [None, "x", {}, {"gpu_hours": "x"}, {"gpu_hours": 0.0}])
def test_a_record_without_gpu_time_has_no_cost(cost):
    assert recorded_cost({"cost": cost}) is None and recorded_cost({}) is None
