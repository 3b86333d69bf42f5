"""The report's chart of what each replica did over time, as an inline SVG.

Its size in bytes is bounded for any number of events, and damaged events do not raise.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ltx_ray.dataset.report_text import STAGE_NAMES, esc, human

#: Kinds of spans, with their names in the legend.
_KINDS: Mapping[str, str] = {"loading": "loading", **STAGE_NAMES, "switch": "LoRA switch", "other": "other"}
#: Roles of replicas in the order of their groups, and the names of the groups.
_ROLES = ("text", "diffusion", "stage1", "stage2", "decode")
_ROLE_NAMES: Mapping[str, str] = {"diffusion": "stage 1 + 2", **STAGE_NAMES}
_SIGNS = {
    "failed": '<path class="mark" d="M0-5.5l5.8 10.5h-11.6z">',
    "lost": '<path class="lost" d="M-4.5-4.5l9 9m0-9l-9 9">',
}
#: Most lanes that are drawn.
MAX_LANES = 120
#: Up to this many spans, each is a bar with a hover title of its own. Above it, lanes are binned.
MAX_SPANS = 900
#: Most bins of all lanes together.
_BINS = 9000
#: Above this many lanes, lanes are drawn thin.
_DENSE_LANES = 40


@dataclass
class _Lane:
    """What one replica did. Times are in seconds since the epoch."""

    #: (start, end, kind, hover title, ok) of each call, switch and load.
    spans: list[tuple[float, float, str, str, bool]] = field(default_factory=list)
    #: (time, "failed" or "lost", hover title).
    marks: list[tuple[float, str, str]] = field(default_factory=list)
    #: [start, end] of each life, from loaded to lost or given back.
    alive: list[list[float]] = field(default_factory=list)
    starting: float | None = None

    def busy(self, end: float) -> float:
        """Fraction of its life, without loading, in which it ran calls. Switching weights does not count."""
        life = sum(max(0.0, stop - start) for start, stop in self.alive)
        life = life or end - min(s[0] for s in self.spans)
        calls = sum(s[1] - s[0] for s in self.spans if s[2] not in ("loading", "switch"))
        return min(1.0, calls / life) if life > 0 else 0.0


def make_timeline(events: list[dict[str, Any]]) -> str:
    """A section of HTML with one lane per replica, grouped by role; "" when no event is about a replica.

    `events` are those of events.jsonl, each with a finite number `t` (seconds since the epoch) and `event`.
    """
    every_lane, failed = _lanes(events)
    lanes = {key: lane for key, lane in every_lane.items() if lane.spans or lane.marks}
    if not lanes:
        return ""
    times = [event["t"] for event in events]
    begin = min(times + [s[0] for lane in lanes.values() for s in lane.spans])
    end = max(times + [s[1] for lane in lanes.values() for s in lane.spans])
    chart = _Chart(lanes, begin, max(end, begin + 1e-3))
    chart.add_failed_rows(failed)
    order = {role: i for i, role in enumerate(_ROLES)}
    for role in sorted({role for role, _ in lanes}, key=lambda role: (order.get(role, len(order)), role)):
        chart.add_role(role)
    return chart.html(legend=_legend(lanes, bool(failed)))


class _Chart:
    """The chart as it is drawn, group by group from the top. `y` is the height so far, in pixels."""

    def __init__(self, lanes: dict[tuple[str, str], _Lane], begin: float, end: float):
        self.lanes, self.begin, self.end = lanes, begin, end
        for lane in lanes.values():
            lane.alive = [[start, end if stop is math.inf else stop] for start, stop in lane.alive]
        self.lanes_a_role = max(1, MAX_LANES // len({role for role, _ in lanes}))
        self.dense = len(lanes) > _DENSE_LANES
        self.lane_height = 12 if self.dense else 22
        self.binned = sum(len(lane.spans) for lane in lanes.values()) > MAX_SPANS
        self.bins = max(24, min(240, _BINS // min(len(lanes), MAX_LANES)))
        self.y = self.hidden = 0
        self.labels: list[str] = []
        self.busy: list[str] = []
        self.bars: list[str] = []
        self.marks: list[str] = []
        self.summary: list[str] = []

    def x(self, t: float) -> float:
        """Position of the time `t`, in per cent of the chart's width."""
        return round(100 * (t - self.begin) / (self.end - self.begin), 3)

    def add_failed_rows(self, failed: list[tuple[float, str]]) -> None:
        if failed:
            self._add_group("failed rows", f"{len(failed):,}")
            self.marks += _marks([(t, "failed", title) for t, title in failed], self.x, self.y - 9)

    def add_role(self, role: str) -> None:
        lanes = [(name, lane) for (lane_role, name), lane in self.lanes.items() if lane_role == role]
        lanes.sort(key=lambda pair: _natural(pair[0]))
        mean = sum(lane.busy(self.end) for _, lane in lanes if lane.spans) / len(lanes)
        title = _ROLE_NAMES.get(role, role)
        self.summary.append(f"{title}: replicas {len(lanes)}, busy {mean:.0%} of the time")
        self._add_group(title, f"{mean:.0%}")
        self.hidden += max(0, len(lanes) - self.lanes_a_role)
        for name, lane in lanes[: self.lanes_a_role]:
            self._add_lane(name, lane)

    def _add_group(self, title: str, value: str) -> None:
        self.labels.append(f'<div class="group">{esc(title)}</div>')
        self.busy.append(f'<div class="group">{value}</div>')
        self.y += 26

    def _add_lane(self, name: str, lane: _Lane) -> None:
        self.labels.append(f'<div title="{esc(name)}">{esc(name)}</div>')
        self.busy.append(f"<div>{lane.busy(self.end):.0%}</div>" if lane.spans else "<div>–</div>")
        box = f'y="{self.y + self.lane_height * 0.14:.1f}" height="{self.lane_height * 0.72:.1f}"'
        for start, stop in lane.alive:
            width = max(0, self.x(stop) - self.x(start))
            self.bars.append(f'<rect class="track" x="{self.x(start)}%" width="{width:.3f}%" {box}/>')
        if self.binned:
            self.bars += _binned(lane, name, self.begin, self.end, self.bins, box)
        else:
            self.bars += _bars(lane, self.x, box)
        self.marks += _marks(lane.marks, self.x, self.y + self.lane_height / 2)
        self.y += self.lane_height

    def html(self, legend: str) -> str:
        """The finished section."""
        seconds = self.end - self.begin
        notes = [f"{self.hidden:,} more replicas are not drawn."] if self.hidden else []
        if self.binned:
            notes.append(f"Height of a bar: share of {human(seconds / self.bins)} spent at work.")
        grid, axis = self._axis()
        return (
            '<section id="timeline"><div class="head"><h2>What each pool was doing</h2><span class="soft">'
            f"{human(seconds)}, share of time at work on the right</span></div>"
            f'<div class="timeline"><ul class="legend">{legend}</ul>'
            f'<div class="chart{" dense" if self.dense else ""}" style="--lane:{self.lane_height}px">'
            f'<div class="lanes">{"".join(self.labels)}</div>'
            f'<svg class="plot" height="{self.y}" role="img" aria-label="{esc("; ".join(self.summary))}">'
            f'{grid}{"".join(self.bars + self.marks)}</svg><div class="busy">{"".join(self.busy)}</div>'
            f'<div class="axis" aria-hidden="true">{axis}</div></div>'
            + "".join(f'<p class="soft small">{note}</p>' for note in notes)
            + "</div></section>"
        )

    def _axis(self) -> tuple[str, str]:
        """Lines of the grid, and the labels below them."""
        step, ticks = _ticks(self.end - self.begin)
        at = [(t, f"{self.x(self.begin + t)}%") for t in ticks]
        grid = "".join(f'<line class="grid" x1="{left}" x2="{left}" y1="0" y2="{self.y}"/>' for _, left in at)
        every = 3 if len(ticks) > 6 else 2  # more labels do not fit on a phone
        axis = "".join(
            f'<span{" class=extra" if i % every else ""} style="left:{left}">{human(t, step)}</span>'
            for i, (t, left) in enumerate(at)
        )
        return grid, axis


def _legend(lanes: dict[tuple[str, str], _Lane], failed_rows: bool) -> str:
    kinds = {span[2] for lane in lanes.values() for span in lane.spans}
    signs = {mark[1] for lane in lanes.values() for mark in lane.marks} | ({"failed"} if failed_rows else set())
    return "".join(
        [f'<li><i class="k-{kind}"></i>{name}</li>' for kind, name in _KINDS.items() if kind in kinds]
        + [
            f'<li><svg width="16" height="12" viewBox="-8 -6 16 12" aria-hidden="true">{_SIGNS[sign]}</path></svg>'
            f"{name}</li>"
            for sign, name in (("failed", "failed call"), ("lost", "replica lost"))
            if sign in signs
        ]
    )


def _lanes(events: list[dict[str, Any]]) -> tuple[dict[tuple[str, str], _Lane], list[tuple[float, str]]]:
    """Lanes by (role, replica), and (time, title) of each failed row. Events with bad fields are skipped."""
    lanes: dict[tuple[str, str], _Lane] = {}
    failed: list[tuple[float, str]] = []
    for event in events:
        kind, t = event["event"], float(event["t"])
        try:
            if kind == "item_failed":
                message = str(event.get("message"))[:160]
                failed.append((t, f"{event.get('id')} failed in {event.get('stage')}: {message}"))
            if kind not in ("gang_starting", "gang_started", "gang_lost", "gang_given_back", "call", "switch"):
                continue
            seconds = float(event.get("seconds") or 0)
            start = float(event["start"]) if kind == "call" else t - seconds
            if not (math.isfinite(start) and math.isfinite(seconds) and seconds >= 0):
                continue
            lane = lanes.setdefault((str(event["role"]), str(event["replica"])), _Lane())
            _add(lane, event, kind, t, start, seconds)
        except (KeyError, TypeError, ValueError):
            continue
    for lane in lanes.values():  # a replica may still be loading when the events end
        if lane.starting is not None and events[-1]["t"] > lane.starting:
            last = events[-1]["t"]
            lane.spans.append((lane.starting, last, "loading", "loading, not ready by the end", True))
    return lanes, failed


def _add(lane: _Lane, event: dict[str, Any], kind: str, t: float, start: float, seconds: float) -> None:
    """Add one event to its lane."""
    if kind == "gang_starting":
        lane.starting = t
    elif kind == "gang_started":
        start = start if lane.starting is None else lane.starting
        listed = event.get("ranks")
        ranks = listed if isinstance(listed, list) else []
        places = sorted({f"{r.get('node')} {r.get('device')}" for r in ranks if isinstance(r, dict)})
        title = f"loading: {human(t - start)}" + (f" on {', '.join(places)}" if places else "")
        lane.spans.append((start, t, "loading", title, True))
        lane.alive.append([t, math.inf])
        lane.starting = None
    elif kind in ("gang_lost", "gang_given_back"):
        lost = kind == "gang_lost"
        if lane.starting is not None:
            end = "lost" if lost else "given back"
            lane.spans.append((lane.starting, t, "loading", f"loading, {end} before it was ready", not lost))
            lane.starting = None
        elif lane.alive:
            lane.alive[-1][1] = t
        if lost:
            lane.marks.append((t, "lost", f"replica lost: {str(event.get('reason'))[:200]}"))
    elif kind == "switch":
        lane.spans.append((start, t, "switch", f"switch to {event.get('to')}: {human(seconds)}", True))
    else:
        stage, ok = str(event.get("stage")), event.get("ok") is not False
        title = f"{_KINDS.get(stage, stage)}, {event.get('id')}: {human(seconds)}{'' if ok else ', failed'}"
        lane.spans.append((start, start + seconds, stage if stage in STAGE_NAMES else "other", title, ok))
        if not ok:
            lane.marks.append((start + seconds, "failed", title))


def _bars(lane: _Lane, x: Callable[[float], float], box: str) -> list[str]:
    """A rectangle for each span, wide enough that a short call can be seen."""
    return [
        f'<rect class="k-{kind}{"" if ok else " failed"}" x="{x(start)}%" '
        f'width="{max(0.15, x(end) - x(start)):.3f}%" {box} rx="1"><title>{esc(title)}</title></rect>'
        for start, end, kind, title, ok in lane.spans
    ]


def _binned(lane: _Lane, name: str, begin: float, end: float, bins: int, box: str) -> list[str]:
    """A path for each kind of span. In a bin, its bar is as high as its share of the time, and kinds are stacked."""
    width = (end - begin) / bins
    shares: dict[str, dict[int, float]] = {kind: {} for kind in _KINDS}
    for start, stop, kind, _, _ in lane.spans:
        for i in range(max(0, int((start - begin) / width)), min(bins - 1, int((stop - begin) / width)) + 1):
            left = begin + i * width
            spent = max(0.0, min(stop, left + width) - max(start, left)) / width
            shares[kind][i] = shares[kind].get(i, 0.0) + spent
    total: dict[int, float] = {}
    for share in shares.values():
        for i, spent in share.items():
            total[i] = total.get(i, 0.0) + spent
    paths: list[str] = []
    floor: Counter[int] = Counter()
    for kind, share in shares.items():
        path = []
        for i in sorted(share):
            tall = round(100 * share[i] / max(1.0, total[i]))  # calls of one replica may overlap
            if tall:
                path.append(f"M{i} {100 - floor[i]}h1v-{tall}h-1z")
                floor[i] += tall
        if path:
            seconds = [s[1] - s[0] for s in lane.spans if s[2] == kind]
            title = f"{name}: {_KINDS[kind]} {len(seconds):,} times, {human(sum(seconds))} in all"
            paths.append(f'<path class="k-{kind}" d="{"".join(path)}"><title>{esc(title)}</title></path>')
    frame = f'x="0" width="100%" {box} viewBox="0 0 {bins} 100" preserveAspectRatio="none"'
    return [f"<svg {frame}>", *paths, "</svg>"] if paths else []


def _marks(marks: list[tuple[float, str, str]], x: Callable[[float], float], y: float) -> list[str]:
    """A sign for each mark. Marks that would overlap become one sign that says how many."""
    groups: dict[tuple[str, int], list[tuple[float, str, str]]] = {}
    for mark in marks:
        groups.setdefault((mark[1], int(x(mark[0]) * 1.5)), []).append(mark)
    drawn = []
    for (kind, _), group in groups.items():
        more = f" (and {len(group) - 1:,} more here)" if len(group) > 1 else ""
        place = f'x="{x(group[0][0])}%" y="{y:.1f}" overflow="visible"'
        drawn.append(f"<svg {place}>{_SIGNS[kind]}<title>{esc(group[0][2] + more)}</title></path></svg>")
    return drawn


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts "x10" after "x9"."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", name)]


def _ticks(length: float) -> tuple[float, list[float]]:
    """(step, ticks) in seconds for an axis of `length` seconds: at most nine ticks, at round steps."""
    minute, hour, day = 60, 3600, 86400
    steps = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30]
    steps += [minutes * minute for minutes in (1, 2, 5, 10, 15, 30)]
    steps += [hour, 2 * hour, 3 * hour, 6 * hour, 12 * hour, day, 2 * day, 7 * day]
    step = next((s for s in steps if length / s <= 8.5), length / 8)
    return step, [i * step for i in range(int(length / step) + 1) if i * step <= 0.98 * length]
