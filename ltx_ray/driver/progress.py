"""The progress of a run: one line that is rewritten on a terminal, plain lines in a job's log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from ltx_ray.dataset.clip_rate import rate_text
from ltx_ray.storage.credentials import masked

_TERMINAL_PERIOD = 0.5
_LOG_PERIOD = 30.0


class Progress:
    """Writes to `stream`, by default stderr. Times are from `time.monotonic`."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._period = _TERMINAL_PERIOD if self._terminal else _LOG_PERIOD
        self._began = time.monotonic()
        self._shown = 0.0
        self._width = 0

    def say(self, message: str) -> None:
        """Print a line that stays."""
        self.clear()
        self._write(f"{masked(message)}\n")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            # The terminal was closed, `tee` ended with the Ctrl-C that drains the run, or the log's disk is full.
            pass

    def due(self) -> bool:
        """Whether `update` would print now. Cheap enough for every turn of the loop."""
        return time.monotonic() - self._shown >= self._period

    def update(
        self,
        done: int,
        failed: int,
        total: int | None,
        doing: str,
        force: bool = False,
        *,
        rate: float | None = None,
        left: float | None = None,
    ) -> None:
        """Print the state, at most twice a second on a terminal and every 30 s in a log.

        `total` is None while only reading the manifest will tell it; `doing` says what the pools are busy with. `rate`
        is in clips/h and `left` in seconds; either is None while it is not known.
        """
        if not self.due() and not force:
            return
        now = self._shown = time.monotonic()
        parts = [f"{done + failed}/{'?' if total is None else total} clips"]
        if failed:
            parts.append(f"{failed} failed")
        if rate is not None:
            parts.append(rate_text(rate))
        if left is not None:
            parts.append(f"{duration(left)} left")
        parts.append(f"{duration(now - self._began)} elapsed")
        self._show(" | ".join(parts) + (f" | {doing}" if doing else ""))

    def count(self, done: int, total: int, what: str) -> None:
        """Print how much of a long command is done, as often as `update` does; nothing for a short one."""
        if not self.due() or time.monotonic() - self._began < self._period:
            return
        now = self._shown = time.monotonic()
        elapsed = now - self._began
        parts = [f"{done:,} of {total:,} {what}", f"{duration(elapsed)} elapsed"]
        if 0 < done < total:
            parts.insert(1, f"{duration(elapsed / done * (total - done))} left")
        self._show(" | ".join(parts))

    def counting(self, what: str) -> Callable[[int, int], None]:
        """`count` of one thing."""
        return lambda done, total: self.count(done, total, what)

    def clear(self) -> None:
        """Remove the line that is rewritten, before something else is printed."""
        if self._width:
            self._write("\r" + " " * self._width + "\r")
            self._width = 0

    def _show(self, line: str) -> None:
        if self._terminal:
            self._write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self.say(line)


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
