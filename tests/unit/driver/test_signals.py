"""The first signal stops a run in order, and a second one ends the process."""

from __future__ import annotations

import contextlib
import signal
import threading

import pytest

from ltx_ray.driver import signals as module
from ltx_ray.driver.signals import RunSignals, Stopped

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _heard():
    """A signal that is ignored, as SIGHUP is below nohup, would stay so."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def ended(monkeypatch) -> list[int]:
    """The codes with which the process would have ended."""
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    return codes


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_drains_and_the_second_ends_the_process(ended, clock, number):
    asked: list[str] = []
    before = signal.getsignal(number)
    with RunSignals() as signals:
        signals.action = asked.append
        signal.signal(number, signal.SIG_DFL)  # as a library may do
        signals.install()
        signal.raise_signal(number)
        assert asked == [number.name] and not ended
        clock[0] += 0.4
        signal.raise_signal(number)
        # the handler of this test returns, where os._exit would not
        assert ended == [128 + number] and asked == [number.name]
    assert signal.getsignal(number) is before


def test_signals_that_come_together_are_one(ended, clock):
    asked: list[str] = []
    with RunSignals() as signals:
        signals.action = asked.append
        # `timeout` sends its signal to the process and to its group; a terminal that closes sends several kinds.
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
            clock[0] += 0.05
    assert asked == ["SIGTERM"] and not ended


@pytest.mark.parametrize("number", SIGNALS)
def test_what_a_signal_raised_and_an_import_swallowed_is_raised_again(ended, clock, number):
    with RunSignals() as signals:
        signals.check()
        with contextlib.suppress(Stopped):
            signal.raise_signal(number)
        for _ in range(2):
            with pytest.raises(Stopped, match=number.name):
                signals.check()


def test_a_signal_that_an_action_has_taken_is_not_raised(ended, clock):
    with RunSignals() as signals:
        signals.action = lambda name: None
        signal.raise_signal(signal.SIGTERM)
        signals.check()


@pytest.mark.parametrize("number", SIGNALS)
def test_where_nothing_is_under_way_a_signal_raises(ended, clock, number):
    with RunSignals(), pytest.raises(Stopped, match=number.name):
        signal.raise_signal(number)
    assert not ended


def test_a_hang_up_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with RunSignals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_of_the_main_thread_no_handler_is_set():
    found = []

    def enter() -> None:
        with RunSignals() as signals:
            found.append(signals.install())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [{}]
