"""The time to start of a gang begins anew while bytes of the model arrive."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from ltx_ray.pools import load_progress
from ltx_ray.pools.gang import Gang, GangState
from ltx_ray.pools.load_progress import LoadProgress, moved_bytes


@pytest.fixture
def gang() -> Gang:
    """A gang that has begun to load at second 0, without its actors."""
    gang = object.__new__(Gang)
    gang.name, gang.state, gang.load_began, gang._placed = "dit-0", GangState.LOADING, 0.0, 0.0
    return gang


@pytest.fixture
def node(monkeypatch) -> SimpleNamespace:
    """A node whose ranks have moved `bytes`; it answers at once, and counts how often it is asked."""
    node = SimpleNamespace(bytes=0, asked=0)

    def ask(gang: Gang) -> int:
        node.asked += 1
        return node.bytes

    monkeypatch.setattr(load_progress, "_ask", ask)
    monkeypatch.setattr(load_progress.ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(load_progress.ray, "get", lambda answer: answer)
    return node


def given_up(gang: Gang, node: SimpleNamespace, bytes_a_second: int, seconds: int) -> int | None:
    """The second at which the gang is given up with a time to start of 100 s."""
    progress = LoadProgress(100.0)
    for now in range(seconds):
        node.bytes += bytes_a_second
        progress.look([gang], float(now))
        if gang.overdue(float(now), 100.0):
            return now
    return None


def test_a_slow_disk_is_waited_for(gang, node):
    assert given_up(gang, node, 10_000_000, 1000) is None
    assert node.asked < 50


@pytest.mark.parametrize("bytes_a_second", [0, 1_000_000])
def test_a_gang_that_reads_nothing_is_given_up(gang, node, bytes_a_second):
    assert given_up(gang, node, bytes_a_second, 1000) == 101


def test_a_gang_that_stops_reading_is_given_up(gang, node):
    assert given_up(gang, node, 10_000_000, 300) is None
    progress_ends = gang._placed
    assert given_up(gang, node, 0, 1000) <= progress_ends + 101


def test_a_gang_that_starts_in_time_is_not_looked_at(gang, node):
    assert given_up(gang, node, 0, 25) is None and node.asked == 0


def test_bytes_of_a_process_and_of_downloads_are_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("LTX_RAY_CACHE", str(tmp_path))
    before = moved_bytes([os.getpid(), 2**22 + 1])
    (tmp_path / "file").write_bytes(bytes(2**20))
    (tmp_path / "file").read_bytes()
    assert moved_bytes([os.getpid()]) - before >= 2 * 2**20
    (folder := tmp_path / "weights" / "0.partial").mkdir(parents=True)
    between = moved_bytes([])
    with open(folder / "x.part", "wb") as file:
        file.write(os.urandom(2**20))
        file.flush()
        os.fdatasync(file.fileno())
    assert between == 0 and moved_bytes([]) >= 2**20
