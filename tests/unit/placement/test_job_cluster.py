"""A job finds its own cluster by its raylet, whatever address Ray gives it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ltx_ray.placement.job_cluster import JOB_VARIABLE, cluster_of_this_job

OWN = "192.0.2.9:6379"


def below_a_raylet(code: str, *words: str, **environment: str) -> str:
    """What `code` prints in a process that descends from one with a raylet's command line."""
    # The shell waits for the process, which is therefore a child, as a job's is a grandchild or further.
    raylet = ["/site-packages/ray/core/src/ray/raylet/raylet", "-c", '"$0" -c "$CODE"; true', sys.executable, *words]
    environment = {**os.environ, "CODE": code, JOB_VARIABLE: "{}", **environment}
    done = subprocess.run(raylet, executable="/bin/sh", env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


FIND = "from ltx_ray.placement.job_cluster import cluster_of_this_job; print(cluster_of_this_job())"
JOIN = """
from ltx_ray.placement import address
address._greeting = lambda host, port: b""
address._ask = lambda option, given: None
try:
    print(address.find_cluster({given!r}))
except ValueError as error:
    print(error)
"""


def test_the_raylet_above_a_job_names_its_cluster():
    assert below_a_raylet(FIND, "--node_id=1", f"--gcs-address={OWN}") == OWN
    assert below_a_raylet(FIND, "--node_id=1") == "None"


def test_what_is_no_job_has_no_cluster(monkeypatch):
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    assert cluster_of_this_job() is None
    # A variable that has outlived its job, as in a shell that a job has started.
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    assert cluster_of_this_job() is None


@pytest.mark.parametrize("given", [None, "auto"])
def test_a_job_is_not_run_on_another_head_of_its_machine(given):
    said = below_a_raylet(JOIN.format(given=given), f"--gcs-address={OWN}", RAY_ADDRESS="192.0.2.9:6380")
    assert said.startswith(f"RAY_ADDRESS: 192.0.2.9:6380, but this is a job of {OWN}: ")
    assert said.endswith("or --ray-address with the one you mean")


def test_a_job_joins_its_own_head_by_any_name_and_another_by_the_option():
    raylet = f"--gcs-address={OWN}"
    for same in (OWN, "head.example:6379"):
        assert below_a_raylet(JOIN.format(given=None), raylet, RAY_ADDRESS=same) == same
    other = "192.0.2.9:6380"
    assert below_a_raylet(JOIN.format(given=other), raylet, RAY_ADDRESS=OWN) == other
