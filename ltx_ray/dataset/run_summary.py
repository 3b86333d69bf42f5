"""What people ask about a run: counts of its events, its rate, and what each replica did last.

The driver keeps it while the run goes on and writes it into `run.json`, with the timeline beside the run's events.
Nobody has to read the events, which may be gigabytes. Earlier versions wrote events alone, which are read line by line.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import FiniteFloat, TypeAdapter

from ltx_ray.dataset import layout
from ltx_ray.dataset.clip_rate import UNFINISHED, recorded_rate
from ltx_ray.dataset.report_text import finite, short
from ltx_ray.dataset.timeline import Timeline, TimelineBuilder, parse_timeline
from ltx_ray.stages import DIFFUSION_STAGES
from ltx_ray.storage.store import Store


@dataclass(frozen=True)
class LastCall:
    """The call that a replica finished last: `t` in seconds since the epoch."""

    stage: str
    id: str
    seconds: FiniteFloat
    t: FiniteFloat


@dataclass(frozen=True)
class RunSummary:
    """A run at the time `at`, in seconds since the epoch."""

    at: FiniteFloat
    #: While the run goes on; `recorded_rate` has that of a run that has ended.
    clips_per_hour: FiniteFloat | None
    #: How many events there were, by their names.
    events: dict[str, int]
    #: By replica; those that have ended are left out.
    replicas: dict[str, LastCall]
    #: By stage, shares of the time of its replicas, by what they waited for: in the last minute, or in a run that has
    #: ended.
    waits: dict[str, dict[str, FiniteFloat]] = field(default_factory=dict)
    #: Cards that are left alone, because no replica starts there.
    parked: tuple[str, ...] = ()
    #: Nodes that are excluded, and why.
    excluded: dict[str, str] = field(default_factory=dict)
    #: Nodes whose NVIDIA driver is another one than that of the others.
    other_drivers: dict[str, str] = field(default_factory=dict)


_SUMMARY = TypeAdapter(RunSummary)


class SummaryBuilder:
    """Sums up the events that it is given. Its memory grows with the replicas, not with the rows."""

    def __init__(self) -> None:
        self._events: Counter[str] = Counter()
        #: The event of the last call of each replica.
        self._calls: dict[str, Mapping[str, Any]] = {}
        self._last: float | None = None
        self._waits: dict[str, dict[str, float]] = {}
        #: By the replica that could not start, where that was.
        self._parked: dict[str, str] = {}
        #: By the node's id, its address and why it is excluded.
        self._excluded: dict[str, tuple[str, str]] = {}
        self._other_drivers: dict[str, str] = {}
        self._timeline = TimelineBuilder()

    def add(self, event: Mapping[str, Any]) -> None:
        """Take in an event: a line of events.jsonl. Damaged ones are passed over."""
        kind, t = event.get("event"), finite(event.get("t"))
        if t is None or not isinstance(kind, str):
            return
        self._events[kind] += 1
        if self._last is None or t > self._last:
            self._last = t
        self._timeline.take(kind, t, event)
        if kind == "call":
            if finite(event.get("seconds")) is not None:
                self._calls[str(event.get("replica"))] = event
        elif kind in ("gang_lost", "gang_given_back"):
            self._calls.pop(str(event.get("replica")), None)
        elif kind == "waits":
            self._waits = _shares(event.get("shares"))
        elif kind == "card_parked":
            self._parked[str(event.get("replica"))] = str(event.get("where"))
        elif kind == "card_retried":
            self._parked.pop(str(event.get("replica")), None)
        elif kind == "node_excluded":
            self._excluded[str(event.get("node"))] = str(event.get("where")), str(event.get("reason"))
        elif kind == "node_retried":
            self._excluded.pop(str(event.get("node")), None)
        elif kind == "driver_differs":
            self._other_drivers[str(event.get("where"))] = str(event.get("driver"))

    @property
    def counts(self) -> Mapping[str, int]:
        """How many events there were, by their names."""
        return self._events

    @property
    def excluded(self) -> int:
        """Nodes that are excluded now."""
        return len(self._excluded)

    @property
    def parked(self) -> int:
        """Cards that are left alone now."""
        return len(self._parked)

    @property
    def last(self) -> float | None:
        """When the last event was."""
        return self._last

    def summary(self, at: float, clips_per_hour: float | None) -> RunSummary:
        calls = {
            replica: LastCall(str(call.get("stage")), str(call.get("id")), float(call["seconds"]), float(call["t"]))
            for replica, call in self._calls.items()
        }
        return RunSummary(
            at, clips_per_hour, dict(self._events), calls, self._waits, tuple(self._parked.values()),
            dict(self._excluded.values()), dict(self._other_drivers),
        )  # fmt: skip

    def timeline(self) -> Timeline | None:
        """None when no event was about a replica."""
        return self._timeline.timeline()


@dataclass(frozen=True)
class RecordedRun:
    """What the records of the newest run say."""

    #: `run.json`; empty when there is none, or when it is damaged.
    record: dict[str, Any]
    #: Of the run, or so far; None when it has made no clip.
    clips_per_hour: float | None
    #: When the summary was written, or the last event was, in seconds since the epoch.
    last: float | None
    replicas: Mapping[str, LastCall]
    timeline: Timeline | None
    #: As in RunSummary.
    waits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    parked: Sequence[str] = ()
    excluded: Mapping[str, str] = field(default_factory=dict)
    other_drivers: Mapping[str, str] = field(default_factory=dict)

    @property
    def odd_nodes(self) -> list[str]:
        """The nodes and the cards that the run leaves alone, and the nodes that are not like the others."""
        drivers = [f"{where}: its NVIDIA driver is {driver}" for where, driver in self.other_drivers.items()]
        return excluded_lines(self.excluded) + parked_lines(self.parked) + drivers


def read_run(
    store: Store, record: dict[str, Any], now: float | None, note: Callable[[str], None] = lambda problem: None
) -> RecordedRun:
    """What is known of the run whose `run.json` is `record`.

    `now` is in seconds since the epoch, or None for a run that has ended or was killed. `note` is called with what
    cannot be read.
    """
    try:
        summary = _SUMMARY.validate_python(record["summary"])
    except (KeyError, ValueError):
        return _from_events(store, record, now, note)
    rate = summary.clips_per_hour if record.get("state") in UNFINISHED else recorded_rate(record, (), None)
    timeline = _read_timeline(store, str(record.get("run_id")), note)
    return RecordedRun(
        record, rate, summary.at, summary.replicas, timeline, summary.waits, summary.parked, summary.excluded,
        summary.other_drivers,
    )  # fmt: skip


def rows_text(record: Mapping[str, Any]) -> str:
    """How far the run of a `run.json` is."""
    counts, total = record.get("counts"), finite(record.get("expected_rows"))
    numbers = {name: finite(n) or 0.0 for name, n in counts.items()} if isinstance(counts, dict) else {}
    done, failed = (
        sum(numbers.get(name, 0.0) for name in names) for names in (("rendered", "already_done"), ("failed", "illegal"))
    )
    known = f"{done:,.0f}" if total is None else f"{done:,.0f} of {total:,.0f}"
    return f"{known} rows done" + (f", {failed:,.0f} failed" if failed else "")


def wait_lines(waits: Mapping[str, Mapping[str, float]], least: float = 0.1) -> list[str]:
    """`stage2 waits for decode 63% of the time`, the largest share first. Idle replicas of the DiT alone are dear."""
    shares = [
        (share, stage, cause)
        for stage in DIFFUSION_STAGES
        for cause, share in waits.get(stage, {}).items()
        if share >= least
    ]
    shares.sort(reverse=True)
    return [f"{stage} waits for {cause} {share:.0%} of the time" for share, stage, cause in shares]


def excluded_lines(excluded: Mapping[str, str]) -> list[str]:
    """The nodes on which a run places nothing, and why."""
    return [f"{where}: excluded, because {reason}" for where, reason in excluded.items()]


def parked_lines(parked: Sequence[str]) -> list[str]:
    """The cards that a run leaves alone."""
    return [f"{where}: left alone, because replicas failed there" for where in parked]


def _shares(value: Any) -> dict[str, dict[str, float]]:
    """The shares of an event. Damaged ones are left out."""
    stages = value.items() if isinstance(value, dict) else ()
    return {
        stage: {cause: share for cause, told in causes.items() if (share := finite(told)) is not None}
        for stage, causes in stages
        if isinstance(causes, dict)
    }


def _read_timeline(store: Store, run_id: str, note: Callable[[str], None]) -> Timeline | None:
    name = layout.timeline_path(run_id)
    try:
        return parse_timeline(store.read_bytes(name))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        note(f"{name} cannot be read: {short(error)}")
        return None


def _from_events(store: Store, record: dict[str, Any], now: float | None, note: Callable[[str], None]) -> RecordedRun:
    """The run from its events.jsonl, for a record without a summary: of a version before, or damaged."""
    builder = SummaryBuilder()
    bad = 0

    def events() -> Iterator[dict[str, Any]]:
        nonlocal builder, bad
        for line in _lines(store, note):
            event = _parsed(line)
            if event is None:
                bad += bool(line.strip())
                continue
            if event["event"] == "run_started":
                builder = SummaryBuilder()
            builder.add(event)
            yield event

    read = events()
    rate = recorded_rate(record, read, now)
    for _ in read:
        pass  # The rate of a run that has ended needs no events.
    if bad:
        note(f"{layout.EVENTS}: {bad:,} malformed line{'s' * (bad > 1)} skipped")
    summary = builder.summary(0.0, rate)
    return RecordedRun(
        record, rate, builder.last, summary.replicas, builder.timeline(), summary.waits, summary.parked,
        summary.excluded, summary.other_drivers,
    )  # fmt: skip


def _lines(store: Store, note: Callable[[str], None]) -> Iterator[bytes]:
    try:
        with store.fs.open_input_stream(store.path(layout.EVENTS)) as file:
            rest = b""
            while piece := file.read(1 << 20):
                *lines, rest = (rest + piece).split(b"\n")
                yield from lines
            yield rest
    except FileNotFoundError:
        return
    except OSError as error:
        note(f"{layout.EVENTS} cannot be read: {short(error)}")


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The event in a line; None when there is none, such as in the half-written last line of a running log."""
    try:
        event = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    good = isinstance(event, dict) and isinstance(event.get("event"), str) and finite(event.get("t")) is not None
    return event if good else None
