"""The progress of a run: one line that is rewritten on a terminal, plain lines in a job's log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from ltx_ray.storage.credentials import masked

_TERMINAL_PERIOD = 0.5
_LOG_PERIOD = 30.0


class Progress:
    """Writes to `stream`, by default stderr. Times are from `time.monotonic`."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._began = time.monotonic()
        self._first_done: tuple[float, int] | None = None
        self._shown = 0.0
        self._width = 0

    def say(self, message: str) -> None:
        """Print a line that stays."""
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0
        self._stream.write(masked(message) + "\n")
        self._stream.flush()

    def due(self, finished: int) -> bool:
        """Whether `update` would print now. `finished`: clips so far. Cheap enough for every turn of the loop."""
        now = time.monotonic()
        if finished and self._first_done is None:
            self._first_done = now, finished
        return now - self._shown >= (_TERMINAL_PERIOD if self._terminal else _LOG_PERIOD)

    def update(self, done: int, failed: int, total: int | None, doing: str, force: bool = False) -> None:
        """Print the state, at most twice a second on a terminal and every 30 s in a log.

        `total` is None while the manifest is still being read; `doing` says what the pools are busy with.
        """
        if not self.due(done + failed) and not force:
            return
        now = self._shown = time.monotonic()
        line = self._line(now, done, failed, total, doing)
        if self._terminal:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
            self._stream.flush()
        else:
            self.say(line)

    def _line(self, now: float, done: int, failed: int, total: int | None, doing: str) -> str:
        finished = done + failed
        parts = [f"{finished}/{'?' if total is None else total} clips"]
        if failed:
            parts.append(f"{failed} failed")
        # The rate counts from the first clip: the pipeline fills before it, and earlier clips are those of another run.
        if self._first_done is not None:
            began, before = self._first_done
            if finished > before and now > began:
                rate = (finished - before) / (now - began)
                parts.append(f"{rate * 3600:,.0f} clips/h" if rate < 1 else f"{rate:.1f} clips/s")
                if total is not None and total > finished:
                    parts.append(f"{duration((total - finished) / rate)} left")
        parts.append(f"{duration(now - self._began)} elapsed")
        return " | ".join(parts) + (f" | {doing}" if doing else "")


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 14 min`, `3 d 4 h`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
