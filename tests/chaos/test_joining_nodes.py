"""Nodes that join a run's cluster, of the model of its GPUs and of another one."""

from __future__ import annotations

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
