"""What a run checks by itself: the noise of its dataset."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest

from ltx_ray.config import ModelFiles
from ltx_ray.dataset.identity import DatasetIdentity, read_identity, write_identity
from ltx_ray.driver.loop import Driver
from ltx_ray.pools.protocol import RankInfo, ReplicaStarted
from ltx_ray.run import Options, Run
from ltx_ray.storage.store import Store


def run_into(store: Store, **options) -> Run:
    made = Run.__new__(Run)
    made.store, made.identity = store, read_identity(store)
    made.options = Options("m", store.uri, ModelFiles("", "", ""), **options)
    return made


def test_a_dataset_keeps_the_noise_that_its_first_clips_had(tmp_path):
    store = Store(str(tmp_path))
    run_into(store).check_noise("NVIDIA H100")
    run_into(store).check_noise("NVIDIA H100")
    with pytest.raises(ValueError, match=r"on NVIDIA H100, and this run draws it on cpu, .* GPUs of the model NV"):
        run_into(store).check_noise("cpu")
    run_into(store, allow_other_noise=True).check_noise("NVIDIA A100")
    assert read_identity(store).noise_family == "NVIDIA H100"
    write_identity(store, DatasetIdentity(noise_family="cpu"))
    with pytest.raises(ValueError, match="legal: --noise-device cpu, another --output, or --allow-other-noise"):
        run_into(store).check_noise("NVIDIA H100")


def test_the_noise_is_checked_once_when_the_first_replica_that_draws_some_is_up():
    seen: list[str] = []
    driver = Driver.__new__(Driver)
    driver.noise_device, driver._device_name, driver._check_noise = "model", None, seen.append
    driver.pools, driver.policy, driver.events = [], MagicMock(), MagicMock()
    driver._pool = lambda name: MagicMock()
    for name in ("", "H100", "H100"):
        driver._replica_started(ReplicaStarted("stage1-0", [RankInfo(0, device_name=name)], 1.0))
    assert seen == ["H100"]
