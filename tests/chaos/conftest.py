"""One cluster of several nodes for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.local_cluster import Job, World


@pytest.fixture(scope="session")
def shared_world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.fixture
def world(shared_world) -> World:
    """Whole again, whatever the test before has done to it."""
    shared_world.heal()
    assert shared_world.leaks() == []
    return shared_world


@pytest.fixture
def job(world, tmp_path) -> Iterator[Job]:
    job = Job(world, tmp_path)
    yield job
    job.close()
