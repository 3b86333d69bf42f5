"""docs/dataset.md: its columns and types are those of the index, its flags and limits those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ltx_ray import records
from ltx_ray.dataset.layout import FAILED_SCHEMA, INDEX_SCHEMA, PREVIEW_SCHEMA
from ltx_ray.engine import frames, loudness, motion
from ltx_ray.manifest.columns import COLUMNS

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "dataset.md").read_text()


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def rows(title: str) -> list[list[str]]:
    lines = [line for line in section(title).splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_column_has_a_line_with_its_type_in_the_order_of_the_code():
    described = [(name.strip("`"), kind) for name, kind, _ in rows("Columns")]
    columns = [field for field in INDEX_SCHEMA if field.name not in {*COLUMNS, "extra"}]
    assert described == [(c.name, "list of string" if c.name == "flags" else str(c.type)) for c in columns]


def test_every_column_of_failed_rows_has_a_line_too():
    described = [(name.strip("`"), kind) for name, kind, _ in rows("Columns of failed/")]
    columns = [field for field in FAILED_SCHEMA if field.name not in {*COLUMNS, "extra"}]
    assert described == [(column.name, str(column.type)) for column in columns]


def test_every_column_of_previews_has_a_line_there_or_among_those_of_the_index():
    described = [(name.strip("`"), kind) for name, kind, _ in rows("Columns of previews/")]
    assert described == [(c.name, str(c.type)) for c in PREVIEW_SCHEMA if c.name not in INDEX_SCHEMA.names]


def test_every_flag_has_a_line():
    source = "".join(path.read_text() for path in Path(records.__file__).parent.rglob("*.py"))
    flags = {name.strip("`") for name, *_ in rows("Flags")}
    assert flags == {"black", "frozen", "silent", "prompt_truncated", "latents_differ", "tiled_smaller"}
    assert all(f'("{flag}",)' in source for flag in flags)


@pytest.mark.parametrize(
    "title, words, value",
    [
        ("Flags", r"`still_share` > ([\d.]+)", records.FROZEN_SHARE),
        ("Flags", r"`sound_seconds` < ([\d.]+)", records.SILENT_SECONDS),
        ("Flags", r"`frame_rate` < ([\d.]+)", records.SHORT_CLIP_SECONDS),
        ("What is measured", r"differs by (\d+) codes or more from eight frames", motion._MOVED_CODES),
        ("What is measured", r"every block is less than (\d+) codes", motion._STILL_CODES),
        ("What is measured", r"frame before by (\d+) codes or more", motion._CUT_CODES),
        ("What is measured", r"black when at least (\d+) % of its pixels", 100 * frames._BLACK_SHARE),
        ("What is measured", r"luma of at most (\d+)", frames._BLACK_LUMA),
        ("What is measured", r"within (\d+) codes of grey", frames._BLACK_CHROMA),
        ("What is measured", r"K-weighted loudness is (-\d+) LUFS or more", loudness._AUDIBLE_LUFS),
        ("What is measured", r"absolute gate, (-\d+) LUFS", loudness._ABSOLUTE_GATE),
    ],
)
def test_limits_are_those_of_the_code(title, words, value):
    (found,) = re.findall(words, " ".join(section(title).split()))
    assert float(found) == value
