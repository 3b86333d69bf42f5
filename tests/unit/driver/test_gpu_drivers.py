"""Nodes whose NVIDIA driver is another one are named once each."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ltx_ray.driver.gpu_drivers import GpuDrivers


@pytest.fixture
def seen():
    """A function that takes nodes with their drivers, and returns what was said."""
    said, events = [], []
    log = SimpleNamespace(emit=lambda event, **fields: events.append((event, fields["where"], fields["driver"])))
    drivers = GpuDrivers(log, SimpleNamespace(say=said.append))

    def take(*nodes: str) -> list[str]:
        for node in nodes:
            name, version = node.split()
            drivers.seen(name, f"node {name}", "" if version == "none" else version)
        assert [f"{where}: its NVIDIA driver is {driver}" for _, where, driver in events] == [
            line.partition(",")[0] for line in said
        ]
        return said

    return take


def test_an_odd_one_is_named_once_with_what_the_others_have(seen):
    odd = "node b: its NVIDIA driver is 550.54, and that of the other nodes 580.95"
    assert seen("a 580.95", "b 550.54", "b 550.54", "c 580.95", "b 550.54", "d none") == [odd]


def test_the_first_may_be_the_odd_one(seen):
    said = seen("a 550.54", "b 580.95", "c 580.95", "d 580.95", "a 550.54")
    assert said[0] == "node b: its NVIDIA driver is 580.95, and that of the other nodes 550.54", "of two, the second"
    assert said[1:] == ["node a: its NVIDIA driver is 550.54, and that of the other nodes 580.95"]


def test_nothing_is_said_of_nodes_that_agree_or_have_no_gpu(seen):
    assert seen("a 580.95", "b 580.95", "c none") == []
