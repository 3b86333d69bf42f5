"""A real local Ray cluster with logical slots, and runs on it in this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.ray_settings import SYSTEM, quick_node
from tests.support.runner import Runner


@pytest.fixture(scope="session")
def cluster(s3):
    """Address of a cluster of 16 logical CPU slots, shared by the tests of a session; its workers know `s3`."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ["OMP_NUM_THREADS"] = "1"
    node = {**quick_node(), "num_cpus": 16, "include_dashboard": False, "object_store_memory": 256 * 2**20}
    clusters.append(Cluster(initialize_head=True, head_node_args={**node, "_system_config": SYSTEM}))
    ray.init(address=clusters[0].address, log_to_driver=False, logging_level="error")
    yield clusters[0].address
    end_cluster()


#: The cluster while there is one.
clusters: list[Any] = []


def end_cluster() -> None:
    if clusters:
        sys.modules["ray"].shutdown()
        clusters.pop().shutdown()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The cluster ends with this folder's last test: others that come later in the process must not find one."""
    folder = Path(__file__).parent
    if nextitem is None or folder not in nextitem.path.parents:
        end_cluster()


@pytest.fixture
def runner(cluster, tmp_path) -> Runner:
    return Runner(cluster, tmp_path)
