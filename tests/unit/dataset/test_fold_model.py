"""Random schedules of crashes and of two drivers lose no row, double none, and give none the sha256 of another clip."""

from __future__ import annotations

from collections import Counter

import pytest

from ltx_ray.cli import remove as removing
from ltx_ray.dataset import fold, row_log
from ltx_ray.dataset.existing import TableRows, list_existing
from ltx_ray.dataset.parts import encode_segment
from tests.support import fold_model
from tests.support.fold_model import run_schedules


@pytest.mark.slow
@pytest.mark.parametrize("drivers", [1, 2])
@pytest.mark.parametrize("seeds", [range(125), range(125, 250)])
def test_no_schedule_goes_wrong(drivers, seeds):
    """scripts/try_fold.py runs any number of others."""
    assert run_schedules(seeds, drivers) == {}


def test_a_few_schedules_go_right():
    assert run_schedules(range(20), 1) == run_schedules(range(20), 2) == {}


def _overwritten(store, clip, item_id, data, read_metadata):
    while not store.create(clip.path, data):
        store.delete(clip.path)
    return clip


def _numbers_later(store):
    """Take the next number from a second listing, whose new parts are not read."""
    existing = list_existing(store)
    for name in store.names("index"):
        existing.index.saw(name)
    return existing


def _not_learned(store, known, part):
    """Take the next number without a look at what has the one before."""
    known.saw(part)


@pytest.mark.parametrize(
    "module, name, mistake, found",
    [
        (fold_model, "publish_clip", _overwritten, "a sha256 is not that of the clip"),
        (fold_model, "list_existing", _numbers_later, "a row is there twice"),
        (fold, "learn_part", _not_learned, "a row is there twice"),
        (TableRows, "not_folded", lambda rows, keys: list(keys), "a row is there twice"),
        (fold_model, "finish_removals", lambda store, existing, say: False, "a row that was taken down is there"),
        (removing, "record_removed", lambda store, items, ids: None, "a row that was taken down is there"),
        (row_log, "encode_segment", lambda rows, table: encode_segment(rows[:-1], table), "a row is lost"),
    ],
    ids=[
        "overwritten clips", "numbers listed later", "a lost race", "folded again", "a cut removal",
        "an unrecorded removal", "a short segment",
    ],
)  # fmt: skip
def test_the_schedules_find_mistakes_in_the_protocol(monkeypatch, module, name, mistake, found):
    monkeypatch.setattr(module, name, mistake)
    wrong: Counter[str] = Counter()
    for start in range(0, 400, 40):
        for counts in run_schedules(range(start, start + 40), 2).values():
            wrong += counts
        if wrong[found]:
            return
    pytest.fail(f"found {dict(wrong)}")
