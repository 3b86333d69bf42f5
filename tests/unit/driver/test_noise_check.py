"""The driver asks the dataset once where noise may be drawn."""

from __future__ import annotations

from unittest.mock import MagicMock

from ltx_ray.driver.loop import Driver
from ltx_ray.pools.protocol import RankInfo, ReplicaStarted


def test_the_noise_is_checked_once_when_the_first_replica_that_draws_some_is_up():
    seen: list[str] = []
    driver = Driver.__new__(Driver)
    driver.noise_device, driver._noise_checked, driver._check_noise = "model", False, seen.append
    driver.pools, driver.policy, driver.events = [], MagicMock(), MagicMock()
    driver._staff = MagicMock()
    for name in ("", "H100", "H100"):
        driver._join([ReplicaStarted("stage1-0", [RankInfo(0, device_name=name)], 1.0)])
    assert seen == ["H100"]
