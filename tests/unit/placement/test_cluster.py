"""Machines that do not fit the model are refused when a run starts."""

from __future__ import annotations

import pytest

from ltx_ray.checkpoints.checkpoint import Checkpoint
from ltx_ray.config import EngineSpec, ModelFiles, Numerics, RequestedNumerics
from tests.support.checkpoint_files import RELEASED


def test_a_real_model_wants_gpus_unless_told_otherwise():
    pytest.importorskip("ray")
    from ltx_ray.placement.cluster import Cluster, _FreeGpus
    from ltx_ray.placement.sizing import ParallelConfig

    spec = EngineSpec("m:E", ModelFiles("c", "g", "u"), Numerics(), "out")

    def pools(size: int, device: str) -> list:
        cluster = Cluster(
            address=None,
            parallel=ParallelConfig(),
            requested=RequestedNumerics(device=device),
            checkpoint=Checkpoint("c", "2.3.0", RELEASED, {}, size),
            model=spec.model,
            engines=lambda numerics: dict.fromkeys(("text", "diffusion", "decode"), spec),
            share_cards="off",
        )
        return cluster._lay_out(_FreeGpus(0.0))[0]

    for size, device in ((46 * 2**30, "auto"), (1, "cuda")):
        with pytest.raises(ValueError, match="GPUs: at least 1 needed, 0 free; legal: a cluster with GPUs now, or --d"):
            pools(size, device)
    assert pools(46 * 2**30, "cpu") and pools(1, "auto")


def waiting_cluster(monkeypatch, free: list[int], seconds: float):
    """A cluster on which so many GPUs are free at each look, for a run that waits for `seconds`; and what it says."""
    pytest.importorskip("ray")
    from ltx_ray.placement import cluster as clusters
    from ltx_ray.placement.cluster import Cluster, Node, Resources, _FreeGpus
    from ltx_ray.placement.sizing import ParallelConfig

    spec, now, said = EngineSpec("m:E", ModelFiles("c", "g", "u"), Numerics(), "out"), [0.0], []
    cluster = Cluster(
        address="other:6379", parallel=ParallelConfig(stage1=1, stage2=1), requested=RequestedNumerics(device="cuda"),
        checkpoint=Checkpoint("c", "2.3.0", RELEASED, {}, 1), model=spec.model,
        engines=lambda numerics: dict.fromkeys(("text", "diffusion", "decode"), spec), share_cards="off",
        wait_for_gpus=seconds, say=said.append,
    )  # fmt: skip

    def look():
        gpus = float(free.pop(0) if len(free) > 1 else free[0])
        found = _FreeGpus(gpus, nodes=(Node(64.0, gpus),))
        pools, numerics = cluster._lay_out(found)
        clusters.check_schedulable(pools, Resources(64.0, gpus))
        return found, pools, numerics

    monkeypatch.setattr(cluster, "_lay_out_on_free", look)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(clusters.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(clusters.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return cluster, said, now


def test_a_run_may_wait_for_a_busy_cluster(monkeypatch):
    cluster, said, now = waiting_cluster(monkeypatch, [0, 1, 1, 3], 60.0)
    found, pools, _ = cluster._join_running("other:6379")
    assert found.count == 3 and now == [15.0] and sum(pool.replicas for pool in pools) == 4
    assert said == [
        "waiting up to 60 s for GPUs (--wait-for-gpus): GPUs: at least 1 needed, 0 free; legal: a cluster with GPUs "
        "now, or --device cpu"
    ]


def test_a_run_that_is_told_to_stop_waits_no_longer(monkeypatch):
    cluster, said, now = waiting_cluster(monkeypatch, [0], 3600.0)

    def told_to_stop() -> None:
        if said:
            raise InterruptedError("SIGTERM")

    monkeypatch.setattr(cluster, "_check_signals", told_to_stop)
    with pytest.raises(InterruptedError, match="SIGTERM"):
        cluster._join_running("other:6379")
    assert len(said) == 1 and now[0] < 60.0


def test_a_wait_that_is_over_ends_like_none(monkeypatch):
    cluster, said, now = waiting_cluster(monkeypatch, [2], 12.0)
    with pytest.raises(ValueError, match=r"the pools .* cannot be scheduled: GPUs: 3 needed, 2 free"):
        cluster._join_running("other:6379")
    assert now == [12.0] and len(said) == 1
    cluster, said, now = waiting_cluster(monkeypatch, [2], 0.0)
    with pytest.raises(ValueError):
        cluster._join_running("other:6379")
    assert now == [0.0] and not said


@pytest.mark.parametrize(
    "device, size, replicas, asks",
    [("auto", 46 * 2**30, 4, True), ("cuda", 1, 4, True), ("auto", 1, 4, False), ("cpu", 46 * 2**30, 4, False),
     ("auto", 46 * 2**30, None, False)],
    ids=["real", "gpu", "toy", "cpu", "fixed"],
)  # fmt: skip
def test_a_run_that_grows_from_nothing_sees_a_node_before_it_resolves_its_numerics(
    monkeypatch, device, size, replicas, asks
):
    pytest.importorskip("ray")
    from ltx_ray.placement import cluster as clusters
    from ltx_ray.placement.sizing import ParallelConfig

    asked = []
    cluster = clusters.Cluster(
        address="other:6379", parallel=ParallelConfig(max_replicas=replicas),
        requested=RequestedNumerics(device=device), checkpoint=Checkpoint("c", "2.3.0", RELEASED, {}, size),
        model=ModelFiles("c", "g", "u"), engines=dict, share_cards="off", gpu_model="H100", start_timeout=7.0,
    )  # fmt: skip
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(clusters, "wait_for_first_node", lambda nodes, *more: asked.append(more[:2]))
    monkeypatch.setattr(cluster, "_lay_out_on_free", lambda: asked.append("laid out"))
    cluster._join_running("other:6379")
    assert asked == [*([("H100", 7.0)] if asks else []), "laid out"]


@pytest.mark.parametrize(
    "present, visible, count",
    [(0, "0,1", 0), (0, None, 0), (2, None, 2), (2, "0,1,2", 2), (2, "1,-1,0", 1), (4, " 3 , 1,", 2), (2, "", 0),
     (1, "MIG-1,MIG-2", 2), (2, "5,0", 0)],
)  # fmt: skip
def test_a_private_cluster_counts_the_gpus_that_are_there_and_shown(monkeypatch, present, visible, count):
    """Otherwise ranks would wait for GPUs that a variable names and the machine lacks."""
    accelerators = pytest.importorskip("ray._private.accelerators")
    from ltx_ray.placement.cluster import _local_gpu_count

    monkeypatch.setattr(
        accelerators.NvidiaGPUAcceleratorManager, "get_current_node_num_accelerators", staticmethod(lambda: present)
    )
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _local_gpu_count() == count
