"""Texts as values of columns."""

from __future__ import annotations

import pytest

from ltx_ray.manifest.columns import COLUMNS, Mistyped
from ltx_ray.manifest.text_values import legal_value


@pytest.mark.parametrize(
    "column, given, value",
    [
        ("seed", "0750", 750),
        ("seed", "1_000", 1000),
        ("seed", "+5", 5),
        ("seed", "1e3", 1000.0),
        ("seed", "7.0", 7.0),
        ("num_frames", "0121", 121),
        ("frame_rate", "24", 24),
        ("frame_rate", "023.976", 23.976),
        ("video_cfg_scale", ".5", 0.5),
        ("video_cfg_scale", "-1", -1),
        ("negative_prompt", "12:30", "12:30"),
        ("negative_prompt", "", ""),
        ("pipeline", "no", "no"),
        ("video_stg_blocks", ["01", "2"], [1, 2]),
        ("loras", [{"name": "0750", "strength": "0.5"}], [{"name": "0750", "strength": 0.5}]),
        ("loras", [{"name": "off"}], [{"name": "off"}]),
        ("images", [{"path": "1", "frame_idx": "010", "crf": None}], [{"path": "1", "frame_idx": 10, "crf": None}]),
    ],
)  # fmt: skip
def test_a_text_is_what_the_column_takes_it_for(column, given, value):
    found = legal_value(COLUMNS[column], given)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "column, given",
    [
        *(("seed", text) for text in "12:30 0x10 0o17 1.5 true -1 1e999 2026-11-23".split()),
        ("seed", ""), ("seed", "9" * 5000),
        *(("frame_rate", text) for text in ("24:00", "nan", "inf", ".nan", "0", "1,5", "yes")),
        ("height", ["64"]), ("height", {"a": "64"}), ("negative_prompt", ["a"]), ("video_stg_blocks", "1"),
        ("video_stg_blocks", ["a"]), ("video_stg_blocks", [None]), ("video_stg_blocks", [["1"]]),
        ("loras", ["a"]), ("loras", [{"name": "a", "weight": "1"}]), ("images", [{"path": "a", "crf": "52"}]),
    ],
)  # fmt: skip
def test_other_texts_are_refused(column, given):
    with pytest.raises(Mistyped):
        legal_value(COLUMNS[column], given)
