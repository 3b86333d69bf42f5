"""How fast a run makes clips: one definition for the console, `run.json`, `ltx-ray status` and the report.

A clip counts when it is published: once, however many rows ask for it, and only when this run has rendered it.
Illegal, failed and copied rows and those that were done before do not count. Where a run stops after stage 1, its
previews count.

While a run goes on, the rate is that of the last fifteen minutes or the last 50 clips, whichever is longer. A run on
one card finishes clips in bursts, since its replica serves the stages in turns, and a shorter window would show the
bursts. Until the window is filled, the rate counts from the start of the first call of stage 1.

After its end, the rate of a run is its clips over the time from its start to its end: `clips_per_hour` of `run.json`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from ltx_ray.dataset.report_text import epoch_seconds, finite
from ltx_ray.stages import TRAITS, Stage

WINDOW_SECONDS = 15 * 60
WINDOW_CLIPS = 50
#: The stages whose first call begins the count. Stored latents take the place of stage 1 when a row resumes.
FIRST_STAGES = tuple(stage for stage, traits in TRAITS.items() if traits.result == Stage.STAGE1)
#: States of a run that goes on.
UNFINISHED = ("running", "draining")


class ClipRate:
    """The rate of a run that goes on. Times are in seconds of one clock, and do not go back."""

    def __init__(self) -> None:
        #: Clips so far.
        self.clips = 0
        self._began: float | None = None
        #: When the last clips were published: those of the window, and the one before them.
        self._last: deque[float] = deque(maxlen=WINDOW_CLIPS + 1)
        #: (second, clips published in the second before it). The memory of a fast run stays small.
        self._seconds: deque[tuple[int, int]] = deque()

    def began(self, time: float) -> None:
        """A call of one of FIRST_STAGES began. The earliest counts."""
        if self._began is None or time < self._began:
            self._began = time

    def published(self, time: float) -> None:
        """A clip was published."""
        self.clips += 1
        self._last.append(time)
        second = math.ceil(time)
        if self._seconds and self._seconds[-1][0] >= second:
            second, clips = self._seconds.pop()
        else:
            clips = 0
            while self._seconds and self._seconds[0][0] < second - WINDOW_SECONDS:
                self._seconds.popleft()
        self._seconds.append((second, clips + 1))

    def per_hour(self, now: float) -> float | None:
        """In clips/h at `now`; None before the first clip."""
        if self._began is None or not self.clips:
            return None
        begin, clips = self._began, self.clips
        if self.clips > WINDOW_CLIPS:
            whole = math.floor(now - WINDOW_SECONDS)
            if self._last[0] <= whole:
                begin, clips = self._last[0], WINDOW_CLIPS
            elif whole > self._began:
                begin, clips = whole, sum(count for second, count in self._seconds if second > whole)
        return clips / (now - begin) * 3600 if now > begin else None


def final_rate(clips: int, started_at: Any, finished_at: Any) -> float | None:
    """The clips/h of a run that has ended; None without a time. The times are those of its record."""
    begun, ended = epoch_seconds(started_at), epoch_seconds(finished_at)
    return clips / (ended - begun) * 3600 if begun is not None and ended is not None and ended > begun else None


def recorded_rate(run: Mapping[str, Any], events: Iterable[Mapping[str, Any]], now: float | None) -> float | None:
    """The clips/h of a run, from its `run.json` and, while it goes on, from its events.

    `now` is in seconds since the epoch. It is None for a run that was killed, whose rate is that at its last event.
    None when the run has made no clip.
    """
    if run.get("state") in UNFINISHED:
        return _rate_of_events(events, now)
    if "clips_per_hour" in run:
        return finite(run["clips_per_hour"]) or None
    # The record of an older version, which counts rows.
    counts = run.get("counts")
    rendered = finite(counts.get("rendered")) if isinstance(counts, dict) else None
    return final_rate(int(rendered), run.get("started_at"), run.get("finished_at")) if rendered else None


def _rate_of_events(events: Iterable[Mapping[str, Any]], now: float | None) -> float | None:
    rate, last = ClipRate(), -math.inf
    published: set[str] = set()
    for event in events:
        if (time := finite(event.get("t"))) is None:
            continue
        last = max(last, time)
        if event.get("event") == "call" and event.get("stage") in FIRST_STAGES:
            # The driver's clock, and not that of the rank.
            rate.began(time - (finite(event.get("seconds")) or 0.0))
        elif event.get("event") == "item_finished" and (item := str(event.get("item_id"))) not in published:
            published.add(item)
            rate.published(last)
    return rate.per_hour(last if now is None else max(now, last))


def rate_text(per_hour: float) -> str:
    """`1,763 clips/h`; below ten with two digits, such as `8.3 clips/h` and `0.42 clips/h`."""
    return f"{per_hour:,.0f} clips/h" if per_hour >= 9.95 else f"{per_hour:.2g} clips/h"
