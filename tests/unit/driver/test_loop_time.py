"""How busy the driver's loop is."""

from __future__ import annotations

import pytest

from ltx_ray.driver.loop_time import LoopTime


def test_waiting_is_not_busy_but_computing_meanwhile_is():
    now, cpu = [100.0], [7.0]
    loop = LoopTime(lambda: now[0], lambda: cpu[0])
    now[0] += 2.0  # works
    cpu[0] += 1.5  # some of it blocked by a store, which keeps the loop as well

    def wait() -> str:
        now[0] += 5.0
        cpu[0] += 0.5  # takes in events
        return "events"

    assert loop.waiting(wait) == "events"
    now[0] += 1.0
    assert loop.busy() == pytest.approx(2.0 + 0.5 + 1.0)


def test_a_wait_that_raises_was_a_wait():
    now = [0.0]
    loop = LoopTime(lambda: now[0], lambda: 0.0)

    def wait() -> None:
        now[0] += 3.0
        raise OSError

    with pytest.raises(OSError):
        loop.waiting(wait)
    assert loop.busy() == 0.0


def test_the_clocks_of_a_thread_are_compared_without_falling():
    """A clock of another resolution may say that a wait computed for longer than it took."""
    now, cpu = [0.0], [0.0]
    loop = LoopTime(lambda: now[0], lambda: cpu[0])

    def wait() -> None:
        now[0] += 0.001
        cpu[0] += 0.002

    loop.waiting(wait)
    assert loop.busy() == pytest.approx(0.001)
