"""A hundred random schedules of faults in virtual time: every row is there once, with undisturbed bits."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.support.samples import write_jsonl
from tests.support.schedules import Schedule

SEEDS = range(100)
seen: Counter[str] = Counter()
done: set[int] = set()


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """These tests do not cut the power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_every_row_is_there_once(seed, tmp_path):
    schedule = Schedule(seed, tmp_path, seen)
    schedule.run_to_the_end()
    schedule.check()
    if seed % 3 == 0:
        # Rows that failed because of the infrastructure are retried, from the latents that were saved.
        schedule.run_to_the_end()
        schedule.check()
    if seed % 5 == 0:
        # The same rows under other names become copies of those in the index.
        copies = [{**row, "id": f"{row['id']}-again"} for row in schedule.rows if row["prompt"]]
        rendered = {row["item_id"] for row in schedule.index()}
        while not schedule.run(manifest=write_jsonl(tmp_path / "copies.jsonl", copies)):
            pass
        copied = {row["id"] for row in schedule.index() if row["item_id"] in rendered}
        assert {i for i in copied if i.endswith("-again")} == {f"{i}-again" for i in copied if not i.endswith("-again")}
    done.add(seed)


def test_all_of_it_has_happened():
    if done != set(SEEDS):
        pytest.skip("not every schedule was run")
    least = {
        "split", "switching", "shared", "copy", "injected", "illegal", "repeated", "crash", "hang", "out_of_memory",
        "error", "store", "node lost", "died idle", "inputs lost", "failed start", "gave up starting", "RowError",
        "StoredLatentsGone", "killed", "drained", "too many failed", "preflight",
    }  # fmt: skip
    assert not {what for what in least if seen[what] < 5}, seen
