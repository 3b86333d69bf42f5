"""The doctor on a node with GPUs."""

from __future__ import annotations

import pytest

from ltx_ray.doctor.devices import device_checks

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_cards_that_work_are_well():
    found = {check.name: check for check in device_checks("cuda")}
    assert [check.line() for check in found.values() if check.status == "FAIL"] == []
    assert {f"gpu {n} products" for n in range(torch.cuda.device_count())} <= found.keys()
