"""docs/manifest.md: its table has the columns, types and defaults of the code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ltx_ray.manifest.columns import COLUMNS
from ltx_ray.manifest.rules import FIXED_WHEN_DISTILLED
from ltx_ray.presets import DEFAULT_NEGATIVE_PROMPT, PIPELINES

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "manifest.md").read_text()
SECTION = TEXT.partition("## Columns")[2].partition("\n## ")[0]
#: Column name -> type, legal values, and the defaults of the pipelines in the order of PIPELINES.
ROWS = {
    cells[0].strip("`"): cells[1:]
    for line in SECTION.splitlines()
    if line.startswith("| `")
    for cells in [[cell.strip() for cell in line.strip("|").split(" | ")]]
}


def test_every_column_has_a_line_in_the_order_of_the_code():
    assert list(ROWS) == list(COLUMNS)


def test_the_heads_name_the_pipelines():
    (heads,) = re.findall(r"^\| column .*", SECTION, re.MULTILINE)
    assert [head.strip().removeprefix("default: ") for head in heads.strip("|").split("|")[3:]] == list(PIPELINES)


def shown(kind: pa.DataType) -> str:
    """A type as the table writes it."""
    if kind == pa.float64():
        return "float64"
    if not pa.types.is_list(kind):
        return str(kind)
    element = kind.value_type
    if not pa.types.is_struct(element):
        return f"list of {element}"
    return "list of `{" + ", ".join(field.name for field in element) + "}`"


@pytest.mark.parametrize("name", COLUMNS)
def test_the_types_are_the_columns(name):
    assert ROWS[name][0] == shown(COLUMNS[name].type)


def read(cell: str) -> Any:
    """A default as the table writes it, as the code holds it."""
    if cell == "the reference's":
        return DEFAULT_NEGATIVE_PROMPT
    value = json.loads(cell.strip("`"))
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("name", [name for name in COLUMNS if name not in ("id", "prompt", "loras", "pipeline")])
def test_the_defaults_are_the_pipelines(name):
    for cell, pipeline in zip(ROWS[name][2:], PIPELINES.values(), strict=True):
        assert read(cell.removesuffix(", fixed")) == pipeline.defaults[name], pipeline.name
        assert cell.endswith(", fixed") == (pipeline.distilled and name in FIXED_WHEN_DISTILLED), pipeline.name
