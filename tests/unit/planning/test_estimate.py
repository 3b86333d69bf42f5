"""What the clips of a plan cost in bytes, and what is said of a disk that is too small."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ltx_ray.config import Selection
from ltx_ray.manifest.rules import RowRules
from ltx_ray.planning.disk_space import expected_shortage
from ltx_ray.planning.estimate import (
    ClipEstimate,
    PlannedWork,
    Stored,
    bytes_lines,
    estimate_clip,
    size_text,
)
from ltx_ray.planning.plan import Plan
from ltx_ray.storage.store import Store
from tests.support.checkpoint_files import RELEASED
from tests.support.datasets import row_log
from tests.support.samples import request, write_jsonl
from tests.support.schedules import HashingBuilder


def test_work_is_the_same_in_whatever_order_sizes_follow_each_other():
    small, large = ClipEstimate(1, 2, 3, 4, 5), ClipEstimate(10, 20, 30, 40, 50)
    for order in ([small, small, large], [small, large, small]):
        work = PlannedWork()
        for clip in order:
            work.add(clip)
        assert work.total == ClipEstimate(12, 24, 36, 48, 60)
    assert PlannedWork().total == ClipEstimate()


def test_latents_are_counted_when_they_are_stored():
    clip = estimate_clip(RELEASED, request())  # 1088x1920, 121 frames
    plain = Stored(False, False, "bfloat16").nbytes(1, clip)
    assert 4e6 < plain < 10e6
    # 2 MB after stage 1 and 8 MB after stage 2, in bfloat16
    assert Stored(True, False, "bfloat16").nbytes(1, clip) - plain == pytest.approx(2.1e6 + 8.4e6, rel=0.05)
    assert Stored(True, False, "float32").nbytes(1, clip) - plain == pytest.approx(2 * (2.1e6 + 8.4e6), rel=0.05)
    assert Stored(False, True, "bfloat16").nbytes(1, clip) < 0.6 * plain
    assert (
        "cache of each node: 46.1 GB"
        in bytes_lines({"clips": 1}, clip, Stored(False, False, "bfloat16"), 46_100_000_000)[1]
    )


@pytest.mark.parametrize(
    "nbytes, text", [(950_000, "950 kB"), (8.12e6, "8.12 MB"), (999_600, "1 MB"), (5e16, "50,000 TB")]
)
def test_sizes_in_words(nbytes, text):
    assert size_text(nbytes) == text


def test_a_run_whose_rows_do_not_fit_on_the_disk_says_so(tmp_path, monkeypatch):
    store = Store(str(tmp_path / "out"))
    manifest = write_jsonl(tmp_path / "m.jsonl", [{"prompt": f"cat {n}"} for n in range(1000)])
    stored, free = Stored(False, False, "bfloat16"), SimpleNamespace(free=9e9)
    monkeypatch.setattr("shutil.disk_usage", lambda place: free)
    plan = Plan(manifest, RowRules(), HashingBuilder(), row_log(store).existing)
    assert expected_shortage(store, plan, stored) is None
    free.free = 5e9
    assert "out: about 7." in expected_shortage(store, plan, stored)
    plan = Plan(manifest, RowRules(), HashingBuilder(), plan.existing, selection=Selection(limit=600))
    assert expected_shortage(store, plan, stored) is None
