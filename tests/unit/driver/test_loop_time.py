"""How busy the driver's loop is."""

from __future__ import annotations

import pytest

from ltx_ray.driver.loop_time import LoopTime


class Loop:
    """A loop whose time passes by what it is told to do."""

    def __init__(self):
        self.now, self.cpu = 100.0, 7.0
        self.time = LoopTime(lambda: self.now, lambda: self.cpu)

    def work(self, seconds, cpu=None):
        self.now += seconds
        self.cpu += seconds if cpu is None else cpu

    def wait(self, seconds, cpu=0.0):
        def wait(most):
            self.work(seconds, cpu)
            return most

        return self.time.waiting(wait, seconds)


def test_waiting_is_not_busy_and_being_blocked_is():
    loop = Loop()
    loop.work(2.0, cpu=0.5)  # the rest of it waits for a store, and the replicas for the loop
    assert loop.wait(5.0) == 5.0, "what the wait gives"
    loop.work(1.0)
    assert loop.time.busy() == pytest.approx(3.0)
    loop.wait(5.0)
    assert loop.time.busy() == pytest.approx(3.0)


def test_taking_in_events_is_busy():
    """A wait computes when there is much to take in."""
    loop = Loop()
    loop.work(1.0)
    loop.wait(9.0, cpu=7.0)
    assert loop.time.busy() == pytest.approx(8.0)
    loop.wait(1.0, cpu=0.9)
    assert loop.time.busy() == pytest.approx(8.9)


def test_a_look_without_waiting_is_busy():
    loop = Loop()
    loop.time.waiting(lambda most: loop.work(0.5), 0.0)
    assert loop.time.busy() == pytest.approx(0.5)


def test_a_wait_that_raises_was_a_wait():
    loop = Loop()

    def wait(most):
        loop.now += 3.0
        raise OSError

    with pytest.raises(OSError):
        loop.time.waiting(wait, 3.0)
    assert loop.time.busy() == 0.0
