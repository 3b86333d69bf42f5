"""One cluster of several nodes for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.local_cluster import Job, LocalCluster


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[LocalCluster]:
    cluster = LocalCluster()
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(shared_cluster) -> LocalCluster:
    """The cluster with all its nodes, whatever the previous test has done to it."""
    shared_cluster.heal()
    assert shared_cluster.leaks() == []
    return shared_cluster


@pytest.fixture
def job(cluster, tmp_path) -> Iterator[Job]:
    job = Job(cluster, tmp_path)
    yield job
    job.close()
