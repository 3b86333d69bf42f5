"""A run on a cluster without GPUs asks its autoscaler for a first node before it decides how it computes."""

from __future__ import annotations

import pytest

from ltx_ray.placement import first_node
from ltx_ray.placement.first_node import wait_for_first_node
from ltx_ray.placement.gpu_models import GpuNode

groups = pytest.importorskip("ray.util.placement_group")


class Autoscaler:
    """A cluster without nodes that brings one so many seconds after it is asked for."""

    def __init__(self, monkeypatch, seconds: float):
        self.now, self.asked, self.said = 0.0, [], []
        #: The bundles that are asked for now; the node, and when what was asked for is free again.
        self.wanted, self.there, self.freed = None, False, 0.0
        self._seconds = seconds
        monkeypatch.setattr(groups, "placement_group", self._ask)
        monkeypatch.setattr(groups, "remove_placement_group", self._give_back)
        monkeypatch.setattr(first_node.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(first_node.time, "sleep", self._pass)

    def _ask(self, bundles):
        self.wanted = bundles
        self.asked.append(bundles)
        return "group"

    def _give_back(self, group):
        self.wanted, self.freed = None, self.now + 3.0

    def _pass(self, seconds):
        self.now += seconds
        self.there |= self.wanted is not None and self.now >= self._seconds

    def nodes(self) -> list[GpuNode]:
        taken = self.wanted is not None or self.now < self.freed
        return [GpuNode("n", "10.0.0.1", "H100", 0.0 if taken else 8.0, 64.0)] if self.there else []

    def wait(self, model=None, seconds=1800.0):
        wait_for_first_node(self.nodes, model, seconds, self.said.append)


def test_a_node_is_asked_for_and_free_when_the_run_goes_on(monkeypatch):
    cluster = Autoscaler(monkeypatch, 300.0)
    cluster.wait()
    assert cluster.nodes()[0].gpus == 8.0 and cluster.now >= 303.0 and cluster.wanted is None
    assert cluster.said == ["waiting for a first node with a GPU, which decides how the run computes"]
    assert cluster.asked == [[{"CPU": 1.0, "GPU": 1.0}]]


def test_the_model_that_the_user_named_is_asked_for(monkeypatch):
    cluster = Autoscaler(monkeypatch, 10.0)
    cluster.wait(model="H100")
    assert set(cluster.asked[0][0]) == {"CPU", "GPU", "accelerator_type:H100"}


def test_a_cluster_that_has_a_node_is_not_asked_for_one_though_it_is_busy(monkeypatch):
    cluster = Autoscaler(monkeypatch, 0.0)
    cluster.there, cluster.freed = True, 1e9
    cluster.wait()
    assert cluster.asked == [] and cluster.said == [] and cluster.now == 0.0


def test_a_cluster_that_brings_none_is_a_mistake_of_the_user(monkeypatch):
    cluster = Autoscaler(monkeypatch, 1e9)
    with pytest.raises(ValueError, match=r"GPUs: at least 1 needed, and no node with H200 has come in 60 s; legal: "):
        cluster.wait(model="H200", seconds=60.0)
    assert cluster.wanted is None and cluster.now == 60.0
