"""Signals that tell a run to stop: the first one stops it in order, a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

#: Of a service manager or `kill`, of a keyboard, and of a terminal that is closed.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: Seconds within which further signals count as one with the first. `timeout` sends its signal to the process and then
#: to its group, and a terminal that closes sends several.
_ONE_SIGNAL_SECONDS = 0.25


class Stopped(BaseException):
    """A signal has come where nothing is under way that should be finished. Its text is the signal's name."""


class RunSignals:
    """Context of a run. The first signal calls `action` with its name, or raises Stopped where there is none.

    The handlers from before are put back when the context ends. SIGHUP stays ignored where it is, as under `nohup`.
    """

    def __init__(self) -> None:
        self.action: Callable[[str], None] | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._first: float | None = None
        #: The name of the signal for which Stopped was raised.
        self._raised: str | None = None

    def __enter__(self) -> RunSignals:
        self._previous = self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def install(self) -> dict[signal.Signals, Any]:
        """Set the handlers, again when a library has replaced them; returns the handlers from before by signal."""
        heard = [s for s in _SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
        try:
            return {number: signal.signal(number, self._handle) for number in heard}
        except ValueError:
            return {}  # Handlers belong to the main thread, and this is another.

    def check(self) -> None:
        """Raise Stopped again where it was swallowed, as it is while a module that Cython compiled is imported."""
        if self._raised is not None:
            raise Stopped(self._raised)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is not None:
            if now - self._first > _ONE_SIGNAL_SECONDS:
                os._exit(128 + number)
            return
        self._first = now
        name = signal.Signals(number).name
        if self.action is None:
            self._raised = name
            raise Stopped(name)
        self.action(name)
