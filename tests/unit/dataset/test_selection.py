"""Conditions that choose previews."""

from __future__ import annotations

import pytest

from ltx_ray.dataset.selection import parse_filter

ROW = {
    "id": "cat-1", "seed": 7, "flags": ["frozen"], "prompt": "a cat = a dog", "negative_prompt": None,
    "frame_rate": 29.97, "video_stg_blocks": [28], "motion": 0.02, "loudness_lufs": None,
    "loras": [{"name": "style", "strength": 0.5}], "images": [{"path": "a.png", "frame_idx": 0, "crf": None}],
}  # fmt: skip


@pytest.mark.parametrize(
    "text, meets",
    [
        ("seed=7", True),
        (" seed <= 6 ", False),
        ("frame_rate > 29.5", True),
        ("seed != 8", True),
        ("id = cat-1", True),
        ("id ~ cat", True),
        ("id !~ cat", False),
        ("prompt = a cat = a dog", True),
        ("flags ~ frozen", True),
        ("flags !~ black", True),
        ("flags ~ froz", False),
        ("video_stg_blocks ~ 28", True),
        ("loras ~ style", True),
        ("loras !~ style", False),
        ("loras ~ sty", False),
        ("images ~ a.png", True),
        ("images ~ b.png", False),
        ("negative_prompt != x", True),
        ("negative_prompt = x", False),
        ("negative_prompt ~ x", False),
        ("negative_prompt !~ x", True),
        ("motion > 0.01", True),
        ("motion <= 1e-2", False),
        ("loudness_lufs > -70", False),
        ("loudness_lufs != -70", True),
        # A preview of an earlier version lacks the column.
        ("sharpness > 1", False),
        ("cuts = 0", False),
        ("cuts != 1", True),
    ],
)
def test_conditions(text, meets):
    assert parse_filter(text)(ROW) is meets


def test_integers_beyond_those_that_floats_hold_are_compared_exactly():
    row = {"seed": 2**62 + 1}
    assert parse_filter(f"seed = {2**62 + 1}")(row) and not parse_filter(f"seed = {2**62}")(row)
    assert parse_filter(f"seed > {2**62}")(row) and not parse_filter(f"seed != {2**62 + 1}")(row)


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed", "legal: COLUMN OP VALUE"),
        ("colour = red", "no column 'colour'; legal: id, "),
        ("seed = red", "holds numbers; legal: a number"),
        ("seed ~ 1", "legal: ~ on texts and lists"),
        ("flags = black", "legal: columns of numbers and texts"),
    ],
)
def test_malformed_conditions_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_filter(text)
