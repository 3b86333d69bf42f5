"""The GPU time of all runs is kept with their output."""

from __future__ import annotations

import pytest

from ltx_ray.dataset.gpu_time import GpuTime
from ltx_ray.dataset.layout import GPU_TIME
from ltx_ray.storage.store import Store


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path))


def test_the_next_run_goes_on_where_the_last_one_ended(store):
    first = GpuTime(store, 1)
    assert first.before == 0.0
    first.refresh(50.0)
    first.write(120.0)
    assert GpuTime(store, 2).before == 120.0


def test_hours_that_are_used_up_are_wrong_usage(store):
    GpuTime(store, 1).write(3600.0)
    found = GpuTime(store, 2)
    found.check(None)
    found.check(1.01)
    message = r"--max-gpu-hours: 1, of which earlier runs into this output have reserved 1.00; legal: a larger number"
    with pytest.raises(ValueError, match=message):
        found.check(1.0)


def test_a_run_that_has_lost_its_lease_changes_nothing(store):
    older = GpuTime(store, 1)
    GpuTime(store, 2).write(300.0)
    older.write(100.0)
    assert GpuTime(store, 3).before == 300.0


def test_a_run_without_gpus_leaves_no_file(store):
    GpuTime(store, 1).write(0.0)
    assert not store.exists(GPU_TIME)


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b'{"gpu_seconds": "x"}', b'{"gpu_seconds": NaN}', b'{"gpu_seconds": -5}']
)
def test_a_damaged_record_counts_for_nothing(store, damage):
    store.write_bytes(GPU_TIME, damage)
    assert GpuTime(store, 1).before == 0.0
