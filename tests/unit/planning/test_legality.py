"""A manifest with many illegal rows is refused before a GPU is used."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ltx_ray.config import Selection
from ltx_ray.manifest.rules import RowRules
from ltx_ray.planning.legality import check_legality
from ltx_ray.planning.plan import Plan
from tests.support.samples import write_jsonl

GOOD = {"prompt": "a cat", "height": 64, "width": 64, "num_frames": 9}


def plan(tmp_path, rows) -> Plan:
    class Unused:
        def item(self, request):
            raise AssertionError("no item is made")

    return Plan(write_jsonl(tmp_path / "m.jsonl", rows), RowRules(), Unused())


def rows(count: int, illegal: int) -> list[dict]:
    bad = [{**GOOD, "height": 100} if n % 3 else {**GOOD, "num_frames": 10} for n in range(illegal)]
    return [{**row, "seed": n} if n % 2 else row for n, row in enumerate([*bad, *[GOOD] * (count - illegal)])]


def test_more_than_a_fifth_of_illegal_rows_is_too_much(tmp_path):
    check_legality(plan(tmp_path, rows(1000, 200)))
    with pytest.raises(ValueError) as error:
        check_legality(plan(tmp_path, rows(1000, 201)))
    text = str(error.value)
    assert "m.jsonl: 201 of the first 1,000 rows are illegal: 134 of height: legal: " in text
    assert "; 67 of num_frames: legal: " in text
    assert text.endswith("; legal: at most 20% illegal rows, or --allow-illegal")


def test_a_few_rows_say_nothing_of_a_manifest(tmp_path):
    check_legality(plan(tmp_path, rows(999, 999)))


def test_only_rows_that_the_run_takes_are_judged(tmp_path):
    chosen = plan(tmp_path, rows(3000, 600))
    check_legality(chosen)
    with pytest.raises(ValueError, match="600 of the first 1,500 rows"):
        check_legality(replace(chosen, selection=Selection(limit=1500)))
    check_legality(replace(chosen, selection=Selection(limit=900)))
    with pytest.raises(ValueError, match="600 of the first 2,000 rows"):
        check_legality(replace(plan(tmp_path, rows(4000, 1200)), selection=Selection(shard=(0, 2))))


def test_images_are_not_read(tmp_path):
    """A path that is wrong shows in its row, when it is its turn."""
    row = {**GOOD, "images": [{"path": str(tmp_path / "gone.png"), "frame_idx": 0, "strength": 1.0}]}
    check_legality(plan(tmp_path, [row] * 1000))
