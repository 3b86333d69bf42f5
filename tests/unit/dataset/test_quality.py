"""What was measured of clips is summed up once and said in words."""

from __future__ import annotations

import math

import pytest

from ltx_ray.dataset import layout
from ltx_ray.dataset.quality import MEASURES, QualitySums, measure_lines, quality_text, rounded_measures
from ltx_ray.dataset.report_data import _INDEX_COLUMNS

CLIPS = [
    {"loudness_lufs": -20.0, "clipped_samples": 0, "motion": 0.1, "cuts": 0, "id": "a"},
    {"loudness_lufs": None, "clipped_samples": 1200, "motion": 0.4, "cuts": 1},
    {"loudness_lufs": -10.0, "clipped_samples": 0, "motion": 0.1, "cuts": math.nan},
]


def summed() -> dict:
    sums = QualitySums()
    for clip, flags in zip(CLIPS, ([], ["black"], ["black", "silent"]), strict=True):
        sums.add(clip, flags)
    return sums.summary()


def test_measures_are_summed_over_the_clips_that_have_them():
    found = summed()
    assert found["flags"] == {"black": 2, "silent": 1}
    assert found["measures"]["loudness_lufs"] == {"clips": 2, "mean": -15.0, "least": -20.0, "most": -10.0}
    assert found["measures"]["motion"] == pytest.approx({"clips": 3, "mean": 0.2, "least": 0.1, "most": 0.4})
    assert found["measures"]["cuts"]["clips"] == 2 and "sharpness" not in found["measures"]


def test_a_summary_in_words():
    assert quality_text(summed()) == (
        "loudness -15.0 LUFS (-20.0 LUFS to -10.0 LUFS), clipped samples 400 (0 to 1,200), "
        "motion 0.200 (0.100 to 0.400), cuts 0 (0 to 1); 2 black, 1 silent"
    )


@pytest.mark.parametrize("quality", [None, "x", [], {}, {"measures": {"motion": 3}, "flags": {"black": "x"}}])
def test_a_damaged_record_says_nothing(quality):
    assert quality_text(quality) == ""


def test_a_clip_in_words():
    assert measure_lines(CLIPS[1]) == {"clipped samples": "1,200", "motion": "0.400", "cuts": "1"}


def test_a_clip_in_numbers_as_they_are_read():
    clip = {"loudness_lufs": -20.04, "clipped_samples": 1200, "motion": 0.12345, "mean_luma": 99.6, "cuts": math.nan}
    assert dict(zip(MEASURES, rounded_measures(clip), strict=True)) == {
        "loudness_lufs": -20.0, "clipped_samples": 1200, "motion": 0.123, "sharpness": None, "mean_luma": 100,
        "cuts": None,
    }  # fmt: skip
    assert rounded_measures({"cuts": None, "id": "a"}) == ()


def test_measures_are_columns_that_pages_read():
    assert MEASURES.keys() <= set(layout.INDEX_SCHEMA.names) & set(_INDEX_COLUMNS)
