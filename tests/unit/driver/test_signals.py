"""Signals drain a run, and a second one ends it."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from ltx_ray.driver.signals import DrainSignals


class FakeDriver:
    drain_requested: str | None = None

    def request_drain(self, reason: str) -> None:
        self.drain_requested = reason


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_drains_and_the_second_ends_the_process(monkeypatch, number):
    driver, ended = FakeDriver(), []
    monkeypatch.setattr("os._exit", ended.append)
    before = signal.getsignal(number)
    with DrainSignals(driver) as signals:
        signal.signal(number, signal.SIG_IGN)  # as a library may do
        signals.install()
        os.kill(os.getpid(), number)
        assert driver.drain_requested == number.name and not ended
        os.kill(os.getpid(), number)
        # the handler of this test returns, where os._exit would not
        assert ended == [128 + number]
    assert signal.getsignal(number) is before


def test_outside_of_the_main_thread_no_handler_is_set():
    found = []

    def enter() -> None:
        with DrainSignals(FakeDriver()) as signals:
            found.append(signals.install())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [{}]
