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


def test_stages_on_gpus_of_two_models_want_noise_from_the_cpu():
    pytest.importorskip("ray")
    from ltx_ray.driver.loop import Driver
    from ltx_ray.pools.pool import StartFailed
    from ltx_ray.pools.protocol import RankInfo, ReplicaStarted

    def meet(noise_device: str, *names: str) -> None:
        driver = Driver.__new__(Driver)
        driver.noise_device, driver._device_name = noise_device, None
        for name in names:
            driver._check_device(ReplicaStarted("stage1-0", [RankInfo(0, device_name=name)], 1.0))

    meet("model", "H100", "", "H100")  # Text and decode draw no noise and name no device.
    meet("cpu", "H100", "H200")
    with pytest.raises(StartFailed, match="the stages span H100 and H200, whose noise differs; give --noise-"):
        meet("model", "H100", "H200")


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
