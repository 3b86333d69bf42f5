"""What each replica of a run did over time: taken from the run's events one by one, in memory that stays bounded.

Few spans (calls, switches of weights, loads) are kept as they are. More of them are added up in bins of time, whose
width doubles as the run goes on. `timeline_chart.py` draws the result.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import FiniteFloat, TypeAdapter

from ltx_ray.dataset.report_text import STAGE_NAMES, finite, human

#: Kinds of spans, with their names for people.
KINDS: Mapping[str, str] = {"loading": "loading", **STAGE_NAMES, "switch": "LoRA switch", "other": "other"}
#: Most lanes whose times are kept. They are shared by the roles.
MAX_LANES = 120
#: Up to this many spans, each is kept. Above it, lanes are binned.
MAX_SPANS = 900
#: Most bins of one lane while the run goes on, and of all lanes together in what is kept of them.
_BINS, _KEPT_BINS = 480, 18_000
#: Most marks of one lane, and periods in which a replica of one name was alive.
_MARKS, _LIVES = 32, 64
#: Bin width in seconds that a run begins with.
_FIRST_WIDTH = 1 / 16
#: Events that say what a replica did.
_OF_REPLICAS = frozenset({"gang_starting", "gang_started", "gang_lost", "gang_given_back", "call", "switch"})


@dataclass(frozen=True)
class Span:
    """A call, a switch or a load. Times are in seconds since the epoch, `title` is its text on hovering."""

    start: FiniteFloat
    end: FiniteFloat
    kind: str
    title: str
    ok: bool


@dataclass(frozen=True)
class Mark:
    """Something that happened at one time: `sign` is "failed" or "lost". It stands for `count` of its kind nearby."""

    time: FiniteFloat
    sign: Literal["failed", "lost"]
    title: str
    count: int = 1


@dataclass(frozen=True)
class SpanSums:
    """All spans of one kind in a lane: how many, their seconds, and the seconds in each bin of the timeline."""

    times: int
    seconds: FiniteFloat
    bins: tuple[FiniteFloat, ...]


@dataclass(frozen=True)
class Lane:
    """What one replica did. `busy` is the part of its life in which it ran calls; None when it only has marks."""

    replica: str
    busy: FiniteFloat | None
    #: (start, end) of each life, from loaded to lost.
    alive: tuple[tuple[FiniteFloat, FiniteFloat], ...]
    marks: tuple[Mark, ...]
    #: Empty when the timeline is binned.
    spans: tuple[Span, ...]
    #: By kind; empty when it is not.
    work: dict[str, SpanSums]


@dataclass(frozen=True)
class Role:
    """The replicas of one role: how many there were, how busy they were on average, and the lanes of the first ones."""

    name: str
    replicas: int
    busy: FiniteFloat
    lanes: tuple[Lane, ...]


@dataclass(frozen=True)
class Timeline:
    """Everything from `begin` to `end`, in seconds since the epoch. Bins begin at `begin`."""

    begin: FiniteFloat
    end: FiniteFloat
    #: Seconds of a bin; None when every span is kept.
    bin_seconds: FiniteFloat | None
    roles: tuple[Role, ...]
    #: Failed rows.
    failed: tuple[Mark, ...]

    def __post_init__(self) -> None:
        assert self.begin < self.end

    def json(self) -> str:
        return _TIMELINE.dump_json(self).decode()


_TIMELINE = TypeAdapter(Timeline)


def parse_timeline(text: str | bytes) -> Timeline:
    """The timeline that `Timeline.json` wrote. Raises ValueError for anything else."""
    return _TIMELINE.validate_json(text)


class _Marks:
    """Marks in the order in which they came. Neighbours are merged when there are too many."""

    def __init__(self) -> None:
        self.marks: list[Mark] = []

    def add(self, time: float, sign: Literal["failed", "lost"], title: str) -> None:
        self.marks.append(Mark(time, sign, _clean(title)))
        if len(self.marks) > 2 * _MARKS:
            merged: list[Mark] = []
            for number, mark in enumerate(self.marks):
                if number % 2 and merged[-1].sign == mark.sign:
                    last = merged[-1]
                    merged[-1] = Mark(last.time, last.sign, last.title, last.count + mark.count)
                else:
                    merged.append(mark)
            # Signs that take turns cannot be merged; the oldest are given up.
            self.marks = merged[-2 * _MARKS :]


@dataclass
class _OpenLane:
    """What one replica did so far."""

    #: Whether its times are kept. Of the others only sums are.
    kept: bool
    marks: _Marks = field(default_factory=_Marks)
    alive: list[list[float]] = field(default_factory=list)
    #: Seconds of lives that are no longer listed in `alive`.
    older_life: float = 0.0
    starting: float | None = None
    spans: list[Span] = field(default_factory=list)
    bins: dict[str, list[float]] = field(default_factory=dict)
    #: [count, seconds] of spans by kind.
    totals: dict[str, list[float]] = field(default_factory=dict)
    first: float = math.inf

    @property
    def used(self) -> bool:
        return bool(self.totals or self.marks.marks)

    def busy(self, end: float) -> float:
        """Fraction of its life, without loading, in which it ran calls. Switching weights does not count."""
        life = self.older_life + sum(max(0.0, min(stop, end) - start) for start, stop in self.alive)
        life = life or end - self.first
        calls = sum(seconds for kind, (_, seconds) in self.totals.items() if kind not in ("loading", "switch"))
        return min(1.0, calls / life) if life > 0 else 0.0


class TimelineBuilder:
    """Makes the timeline of the events that it is given. Damaged events are passed over."""

    def __init__(self) -> None:
        self._lanes: dict[tuple[str, str], _OpenLane] = {}
        #: Number of lanes by role.
        self._roles: Counter[str] = Counter()
        self._failed = _Marks()
        #: Of all events and spans so far.
        self._begin, self._end = math.inf, -math.inf
        #: When the first bin begins, its width, and whether bins have taken the place of spans.
        self._zero, self._width, self._binned = 0.0, _FIRST_WIDTH, False
        self._spans = 0

    def add(self, event: Mapping[str, Any]) -> None:
        """Take in an event: a line of events.jsonl."""
        kind, t = event.get("event"), finite(event.get("t"))
        if t is not None and isinstance(kind, str):
            self.take(kind, t, event)

    def take(self, kind: str, t: float, event: Mapping[str, Any]) -> None:
        """The same of an event whose kind and time are known, the latter in seconds since the epoch."""
        if self._begin == math.inf:
            self._zero = t
        if t < self._begin or t > self._end:
            self._reach(t, t)
        if kind in _OF_REPLICAS:
            try:
                seconds = float(event.get("seconds") or 0)
                start = float(event["start"]) if kind == "call" else t - seconds
                if math.isfinite(start + seconds) and seconds >= 0:
                    self._take(kind, str(event["role"]), str(event["replica"]), event, t, start, seconds)
            except (KeyError, TypeError, ValueError):
                return
        elif kind == "item_failed":
            message = str(event.get("message"))[:160]
            self._failed.add(t, "failed", f"{event.get('id')} failed in {event.get('stage')}: {message}")

    def _reach(self, begin: float, end: float) -> None:
        """The run lasts from `begin` to `end` at least."""
        if begin < self._begin:
            self._begin = begin
        if end > self._end:
            self._end = end

    def _take(
        self, kind: str, role: str, replica: str, event: Mapping[str, Any], t: float, start: float, seconds: float
    ) -> None:
        lane = self._lanes.get((role, replica))
        if lane is None:
            lane = self._lanes[role, replica] = _OpenLane(kept=self._roles[role] < MAX_LANES)
            self._roles[role] += 1
        if kind == "call":
            stage, ok = str(event.get("stage")), event.get("ok") is not False
            # Most runs have many more calls than spans are kept, so that a title is made only for those.
            title = "" if self._binned and ok else _call_title(event, stage, seconds, ok)
            self._span(lane, start, start + seconds, stage if stage in STAGE_NAMES else "other", title, ok)
            if not ok:
                lane.marks.add(start + seconds, "failed", title)
        elif kind == "switch":
            self._span(lane, start, t, "switch", f"switch to {event.get('to')}: {human(seconds)}")
        elif kind == "gang_starting":
            lane.starting = t
        elif kind == "gang_started":
            start = start if lane.starting is None else lane.starting
            places = _places(event.get("ranks"))
            title = f"loading: {human(t - start)}" + (f" on {', '.join(places)}" if places else "")
            self._span(lane, start, t, "loading", title)
            lane.alive.append([t, math.inf])
            if len(lane.alive) > _LIVES:
                older = lane.alive.pop(0)
                lane.older_life += max(0.0, min(older[1], t) - older[0])
            lane.starting = None
        else:
            self._ended(lane, kind, event, t)

    def _ended(self, lane: _OpenLane, kind: str, event: Mapping[str, Any], t: float) -> None:
        """The replica was lost or given back."""
        lost = kind == "gang_lost"
        if lane.starting is not None:
            title = f"loading, {'lost' if lost else 'given back'} before it was ready"
            self._span(lane, lane.starting, t, "loading", title, not lost)
            lane.starting = None
        elif lane.alive:
            lane.alive[-1][1] = min(lane.alive[-1][1], t)
        if lost:
            lane.marks.add(t, "lost", f"replica lost: {str(event.get('reason'))[:200]}")

    def _span(self, lane: _OpenLane, start: float, end: float, kind: str, title: str, ok: bool = True) -> None:
        if start < self._begin or end > self._end:
            self._reach(start, end)
        if start < lane.first:
            lane.first = start
        if (total := lane.totals.get(kind)) is None:
            total = lane.totals[kind] = [0, 0.0]
        total[0] += 1
        total[1] += end - start
        if self._binned:
            self._bin(lane, start, end, kind)
            return
        self._spans += 1
        lane.spans.append(Span(start, end, kind, _clean(title), ok))
        if self._spans > MAX_SPANS:
            self._binned = True
            for each in self._lanes.values():
                for span in each.spans:
                    self._bin(each, span.start, span.end, span.kind)
                each.spans.clear()

    def _bin(self, lane: _OpenLane, start: float, end: float, kind: str) -> None:
        """Add a span to the bins of its lane."""
        if not lane.kept:
            return
        while end - self._zero > _BINS * self._width:
            self._widen()
        if (bins := lane.bins.get(kind)) is None:
            bins = lane.bins[kind] = []
        width = self._width
        start, end = max(0.0, start - self._zero), max(0.0, end - self._zero)
        first, last = int(start / width), min(_BINS - 1, int(end / width))
        if last >= len(bins):
            bins.extend([0.0] * (last + 1 - len(bins)))
        if first == last:
            bins[first] += end - start
        elif first < last:
            bins[first] += (first + 1) * width - start
            for number in range(first + 1, last):
                bins[number] += width
            bins[last] += min(end - last * width, width)

    def _widen(self) -> None:
        """Double the width of the bins."""
        self._width *= 2
        for lane in self._lanes.values():
            lane.bins = {kind: _folded(bins) for kind, bins in lane.bins.items()}

    def timeline(self) -> Timeline | None:
        """The events so far; None when none was about a replica."""
        lanes = {key: lane for key, lane in self._lanes.items() if lane.used or self._is_loading(lane)}
        # Bins begin with the first event, and a load of which only the end is known may have begun before it.
        begin = self._zero if self._binned else self._begin
        end = max(self._end, begin + 1e-3)
        if not lanes or begin >= end:  # no second is added to a damaged time of many digits
            return None
        names = sorted({role for role, _ in lanes})
        most, folds = max(1, MAX_LANES // len(names)), 0
        kept = sum(min(most, self._roles[name]) for name in names)
        while kept * (_BINS >> folds) > _KEPT_BINS:
            folds += 1
        return Timeline(
            begin,
            end,
            self._width * 2**folds if self._binned else None,
            tuple(self._role(name, lanes, most, folds) for name in names),
            tuple(self._failed.marks),
        )

    def _is_loading(self, lane: _OpenLane) -> bool:
        return lane.starting is not None and self._end > lane.starting

    def _role(self, name: str, lanes: Mapping[tuple[str, str], _OpenLane], most: int, folds: int) -> Role:
        own = [(replica, lane) for (role, replica), lane in lanes.items() if role == name]
        own.sort(key=lambda pair: _natural(pair[0]))
        # A replica that is only loading is a lane without work.
        busy = sum(lane.busy(self._end) for _, lane in own if lane.totals) / len(own)
        kept = [(replica, lane) for replica, lane in own if lane.kept][:most]
        return Role(name, len(own), round(busy, 4), tuple(self._lane(*each, folds) for each in kept))

    def _lane(self, replica: str, lane: _OpenLane, folds: int) -> Lane:
        spans, loading = tuple(lane.spans), self._is_loading(lane)
        if loading and not self._binned:
            assert lane.starting is not None
            spans += (Span(lane.starting, self._end, "loading", "loading, not ready by the end", True),)
        work: dict[str, SpanSums] = {}
        for kind, bins in lane.bins.items():
            count, seconds = lane.totals[kind]
            for _ in range(folds):
                bins = _folded(bins)
            work[kind] = SpanSums(int(count), round(seconds, 3), tuple(round(spent, 2) for spent in bins))
        return Lane(
            replica,
            round(lane.busy(self._end), 4) if lane.totals or loading else None,
            tuple((start, min(stop, self._end)) for start, stop in lane.alive),
            tuple(lane.marks.marks),
            spans,
            work,
        )


def build_timeline(events: Iterable[Mapping[str, Any]]) -> Timeline | None:
    """The timeline of `events`; None when none was about a replica."""
    builder = TimelineBuilder()
    for event in events:
        builder.add(event)
    return builder.timeline()


def _call_title(event: Mapping[str, Any], stage: str, seconds: float, ok: bool) -> str:
    return f"{KINDS.get(stage, stage)}, {event.get('id')}: {human(seconds)}{'' if ok else ', failed'}"


def _clean(title: str) -> str:
    """The title without what UTF-8 cannot hold, such as bytes of file names."""
    return title.encode("utf-8", "replace").decode()


def _places(ranks: Any) -> list[str]:
    listed = ranks if isinstance(ranks, list) else []
    return sorted({f"{rank.get('node')} {rank.get('device')}" for rank in listed if isinstance(rank, dict)})


def _folded(bins: list[float]) -> list[float]:
    """Bins of twice the width."""
    return [sum(bins[number : number + 2]) for number in range(0, len(bins), 2)]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts "x10" after "x9"."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", name)]
