"""SIGTERM and SIGINT while a run goes on: the first drains it, a second one ends the process at once."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from ltx_ray.driver.loop import Driver


class DrainSignals:
    """Context in which signals drain `driver`. The handlers from before are put back when it ends."""

    def __init__(self, driver: Driver):
        self._driver = driver
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> DrainSignals:
        self._previous = self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def install(self) -> dict[signal.Signals, Any]:
        """Set the handlers, again when a library has replaced them; returns the handlers from before by signal."""
        try:
            return {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:
            return {}  # Handlers belong to the main thread, and this is another.

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._driver.drain_requested:
            os._exit(128 + number)
        self._driver.request_drain(signal.Signals(number).name)
