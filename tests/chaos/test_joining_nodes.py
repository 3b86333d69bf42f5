"""Nodes that join a run's cluster, of the model of its GPUs and of another one."""

from __future__ import annotations

import json
import os

import pytest

from ltx_ray.placement.sizing import ParallelConfig
from tests.support.local_cluster import Job, LocalCluster, rows, undisturbed, wait_for

pytestmark = pytest.mark.slow
ROWS = 24


def test_a_node_of_another_model_that_joins_is_named_and_nothing_starts_there(tmp_path):
    cluster = LocalCluster(workers=0, slots=8, gpus=1)
    try:
        mine = {cluster.add_node("H100")}
        job = Job(cluster, tmp_path)
        driver = job.start(rows(*["[[stage1:gate]]"] * ROWS), parallel=ParallelConfig(max_replicas=2))
        job.until(lambda: job.out.gangs("stage1"), "a replica of the DiT")
        other = cluster.add_node("A100")
        wait_for(lambda: "left alone, because their GPUs are not of the model" in driver.log, lambda: driver.log)
        assert "(A100)" in driver.log
        mine.add(cluster.add_node("H100"))
        job.until(lambda: {r["node"] for e in job.out.events("gang_started") for r in e["ranks"]} >= mine, "growth")
        job.open_gate()
        log = driver.ends(0)
        assert log.count("left alone, because") == 1
        assert other not in {rank["node"] for event in job.out.events("gang_started") for rank in event["ranks"]}
        assert not job.out.events("gang_refused") and not job.out.events("gang_lost")
        assert job.check([f"r{n}" for n in range(ROWS)], undisturbed(job.out.index(), job.folder / "alone")) == []
        job.close()
    finally:
        cluster.close()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"parallel": ParallelConfig(max_replicas=2)}, "waiting for a first node with a GPU"),
        ({"parallel": ParallelConfig(), "wait_for_gpus": 3600.0}, "waiting up to 3600 s for GPUs (--wait-for-gpus): "),
    ],
    ids=["a run that grows", "a run that waits"],
)
def test_a_run_that_finds_no_gpu_resolves_its_numerics_from_the_first_node(tmp_path, monkeypatch, options, told):
    """The node has FlashAttention-3, and the driver has not."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "fa3_fwd_interface.py").touch()
    cluster = LocalCluster(workers=0, slots=8, gpus=2)
    try:
        job = Job(cluster, tmp_path)
        driver = job.start(rows(*["a"] * 4), device="cuda", **options)
        wait_for(lambda: told in driver.log, lambda: driver.log)
        with monkeypatch.context() as of_nodes:
            of_nodes.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
            cluster.add_node("H100")
        log = driver.ends(0)
        assert "Traceback" not in log
        assert {json.loads(row["numerics"])["attention"] for row in job.out.index().values()} == {"fa3"}
        assert job.check([f"r{n}" for n in range(4)], undisturbed(job.out.index(), job.folder / "alone")) == []
        job.close()
    finally:
        cluster.close()
