"""The report's chart of the pools over time, as an inline SVG, and how the report writes times and text.

Bounded in bytes however many events there are, and damaged events do not raise.
"""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

STAGES = {"text": "text", "stage1": "stage 1", "stage2": "stage 2", "decode": "decode"}
_KINDS = {"loading": "loading", **STAGES, "switch": "LoRA switch", "other": "other"}
_ROLES = ("text", "diffusion", "stage1", "stage2", "decode")
_ROLE_NAMES = {"diffusion": "stage 1 + 2", **STAGES}
_SIGNS = {
    "failed": '<path class="mark" d="M0-5.5l5.8 10.5h-11.6z">',
    "lost": '<path class="lost" d="M-4.5-4.5l9 9m0-9l-9 9">',
}
MAX_LANES = 120
MAX_SPANS = 900  # up to here every call is its own bar with its own hover title; beyond, lanes are binned
_BINS = 9000  # of all lanes together


@dataclass
class _Lane:
    """What one replica did. Times in seconds since the epoch.

    spans: (start, end, kind, hover title, ok). marks: (time, "failed" | "lost", hover title).
    alive: [start, end] of each life, from loaded to lost.
    """

    spans: list[tuple[float, float, str, str, bool]] = field(default_factory=list)
    marks: list[tuple[float, str, str]] = field(default_factory=list)
    alive: list[list[float]] = field(default_factory=list)
    starting: float | None = None

    def busy(self, end: float) -> float:
        """Fraction of its life (loading excluded) in which it worked; switching is not work."""
        life = sum(max(0.0, stop - start) for start, stop in self.alive)
        life = life or end - min(s[0] for s in self.spans)
        work = sum(s[1] - s[0] for s in self.spans if s[2] not in ("loading", "switch"))
        return min(1.0, work / life) if life > 0 else 0.0


def make_timeline(events: list[dict[str, Any]]) -> str:
    """A section with one lane a replica, grouped by role; "" when no event tells of a replica.

    events: dicts of events.jsonl, each with a finite number `t` (seconds since the epoch) and `event`.
    """
    lanes, failed = _lanes(events)
    lanes = {key: lane for key, lane in lanes.items() if lane.spans or lane.marks}
    if not lanes:
        return ""
    begin = min([event["t"] for event in events] + [s[0] for lane in lanes.values() for s in lane.spans])
    end = max([event["t"] for event in events] + [s[1] for lane in lanes.values() for s in lane.spans])
    end = max(end, begin + 1e-3)
    for lane in lanes.values():
        lane.alive = [[start, end if stop is math.inf else stop] for start, stop in lane.alive]
    order = {role: i for i, role in enumerate(_ROLES)}
    roles = sorted({role for role, _ in lanes}, key=lambda role: (order.get(role, len(order)), role))
    share = max(1, MAX_LANES // len(roles))
    dense = len(lanes) > 40
    height = 12 if dense else 22
    binned = sum(len(lane.spans) for lane in lanes.values()) > MAX_SPANS
    bins = max(24, min(240, _BINS // min(len(lanes), MAX_LANES)))

    def x(t: float) -> float:
        return round(100 * (t - begin) / (end - begin), 3)

    labels, busy, marks, plot, spoken, y, hidden = [], [], [], [], [], 0, 0
    if failed:
        labels.append('<div class="group">failed rows</div>')
        busy.append(f'<div class="group">{len(failed):,}</div>')
        marks += _marks([(t, "failed", title) for t, title in failed], x, y + 17)
        y += 26
    for role in roles:
        of_role = [(name, lane) for (r, name), lane in lanes.items() if r == role]
        of_role.sort(key=lambda pair: _natural(pair[0]))
        mean = sum(lane.busy(end) for _, lane in of_role if lane.spans) / len(of_role)
        title = _ROLE_NAMES.get(role, role)
        spoken.append(f"{title}: replicas {len(of_role)}, busy {mean:.0%} of the time")
        labels.append(f'<div class="group">{esc(title)}</div>')
        busy.append(f'<div class="group">{mean:.0%}</div>')
        y += 26
        hidden += max(0, len(of_role) - share)
        for name, lane in of_role[:share]:
            labels.append(f'<div title="{esc(name)}">{esc(name)}</div>')
            busy.append(f"<div>{lane.busy(end):.0%}</div>" if lane.spans else "<div>–</div>")
            box = f'y="{y + height * 0.14:.1f}" height="{height * 0.72:.1f}"'
            plot += [
                f'<rect class="track" x="{x(start)}%" width="{max(0, x(stop) - x(start)):.3f}%" {box}/>'
                for start, stop in lane.alive
            ]
            plot += _binned(lane, name, begin, end, bins, box) if binned else _bars(lane, x, box)
            marks += _marks(lane.marks, x, y + height / 2)
            y += height
    step, ticks = _ticks(end - begin)
    at = [(t, f"{x(begin + t)}%") for t in ticks]
    grid = "".join(f'<line class="grid" x1="{left}" x2="{left}" y1="0" y2="{y}"/>' for _, left in at)
    every = 3 if len(ticks) > 6 else 2  # on a phone only these have room
    axis = "".join(
        f'<span{" class=extra" if i % every else ""} style="left:{left}">{human(t, step)}</span>'
        for i, (t, left) in enumerate(at)
    )
    seen = {span[2] for lane in lanes.values() for span in lane.spans}
    legend = "".join(f'<li><i class="k-{k}"></i>{name}</li>' for k, name in _KINDS.items() if k in seen)
    seen = {mark[1] for lane in lanes.values() for mark in lane.marks} | ({"failed"} if failed else set())
    legend += "".join(
        f'<li><svg width="16" height="12" viewBox="-8 -6 16 12" aria-hidden="true">{_SIGNS[k]}</path></svg>{name}</li>'
        for k, name in (("failed", "failed call"), ("lost", "replica lost"))
        if k in seen
    )
    notes = [f"{hidden:,} more replicas are not drawn."] if hidden else []
    if binned:
        notes.append(f"Height of a bar: share of {human((end - begin) / bins)} spent at work.")
    return (
        '<section id="timeline"><div class="head"><h2>What each pool was doing</h2><span class="soft">'
        f"{human(end - begin)}, share of time at work on the right</span></div>"
        f'<div class="timeline"><ul class="legend">{legend}</ul>'
        f'<div class="chart{" dense" if dense else ""}" style="--lane:{height}px">'
        f'<div class="lanes">{"".join(labels)}</div>'
        f'<svg class="plot" height="{y}" role="img" aria-label="{esc("; ".join(spoken))}">'
        f'{grid}{"".join(plot + marks)}</svg><div class="busy">{"".join(busy)}</div>'
        f'<div class="axis" aria-hidden="true">{axis}</div></div>'
        + "".join(f'<p class="soft small">{note}</p>' for note in notes)
        + "</div></section>"
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
            if kind not in ("gang_starting", "gang_started", "gang_lost", "call", "switch"):
                continue
            seconds = float(event.get("seconds") or 0)
            start = float(event["start"]) if kind == "call" else t - seconds
            if not (math.isfinite(start) and math.isfinite(seconds) and seconds >= 0):
                continue
            lane = lanes.setdefault((str(event["role"]), str(event["replica"])), _Lane())
            _add(lane, event, kind, t, start, seconds)
        except (KeyError, TypeError, ValueError):
            continue
    for lane in lanes.values():  # still loading when the events end
        if lane.starting is not None and events[-1]["t"] > lane.starting:
            last = events[-1]["t"]
            lane.spans.append((lane.starting, last, "loading", "loading, not ready by the end", True))
    return lanes, failed


def _add(lane: _Lane, event: dict[str, Any], kind: str, t: float, start: float, seconds: float) -> None:
    """Enter one event into its lane."""
    if kind == "gang_starting":
        lane.starting = t
    elif kind == "gang_started":
        start = start if lane.starting is None else lane.starting
        ranks = event.get("ranks") if isinstance(event.get("ranks"), list) else []
        places = sorted({f"{r.get('node')} {r.get('device')}" for r in ranks if isinstance(r, dict)})
        title = f"loading: {human(t - start)}" + (f" on {', '.join(places)}" if places else "")
        lane.spans.append((start, t, "loading", title, True))
        lane.alive.append([t, math.inf])
        lane.starting = None
    elif kind == "gang_lost":
        if lane.starting is not None:
            lane.spans.append((lane.starting, t, "loading", "loading, lost before it was ready", False))
            lane.starting = None
        elif lane.alive:
            lane.alive[-1][1] = t
        lane.marks.append((t, "lost", f"replica lost: {str(event.get('reason'))[:200]}"))
    elif kind == "switch":
        lane.spans.append((start, t, "switch", f"switch to {event.get('to')}: {human(seconds)}", True))
    else:
        stage, ok = event.get("stage"), event.get("ok") is not False
        title = f"{_KINDS.get(stage, stage)}, {event.get('id')}: {human(seconds)}{'' if ok else ', failed'}"
        lane.spans.append((start, start + seconds, stage if stage in STAGES else "other", title, ok))
        if not ok:
            lane.marks.append((start + seconds, "failed", title))


def _bars(lane: _Lane, x, box: str) -> list[str]:
    """A rectangle a span; at least a hair wide, so that a short call is seen."""
    return [
        f'<rect class="k-{kind}{"" if ok else " failed"}" x="{x(start)}%" '
        f'width="{max(0.15, x(end) - x(start)):.3f}%" {box} rx="1"><title>{esc(title)}</title></rect>'
        for start, end, kind, title, ok in lane.spans
    ]


def _binned(lane: _Lane, name: str, begin: float, end: float, bins: int, box: str) -> list[str]:
    """A path a kind: in every bin a bar as high as the share of the bin spent on it, kinds stacked."""
    width = (end - begin) / bins
    shares: dict[str, Counter] = {kind: Counter() for kind in _KINDS}
    for start, stop, kind, _, _ in lane.spans:
        for i in range(max(0, int((start - begin) / width)), min(bins - 1, int((stop - begin) / width)) + 1):
            left = begin + i * width
            shares[kind][i] += max(0.0, min(stop, left + width) - max(start, left)) / width
    total = Counter()
    for share in shares.values():
        total.update(share)
    paths, floor = [], Counter()
    for kind, share in shares.items():
        path = []
        for i in sorted(share):
            tall = round(100 * share[i] / max(1.0, total[i]))  # calls of one replica may overlap
            if tall:
                path.append(f"M{i} {100 - floor[i]}h1v-{tall}h-1z")
                floor[i] += tall
        if path:
            spent = [s[1] - s[0] for s in lane.spans if s[2] == kind]
            title = f"{name}: {_KINDS[kind]} {len(spent):,} times, {human(sum(spent))} in all"
            paths.append(f'<path class="k-{kind}" d="{"".join(path)}"><title>{esc(title)}</title></path>')
    frame = f'x="0" width="100%" {box} viewBox="0 0 {bins} 100" preserveAspectRatio="none"'
    return [f"<svg {frame}>", *paths, "</svg>"] if paths else []


def _marks(marks: list[tuple[float, str, str]], x, y: float) -> list[str]:
    """A sign a mark; those that would lie on one another become one that says how many."""
    groups: dict[tuple[str, int], list] = {}
    for mark in marks:
        groups.setdefault((mark[1], int(x(mark[0]) * 1.5)), []).append(mark)
    drawn = []
    for (kind, _), group in groups.items():
        more = f" (and {len(group) - 1:,} more here)" if len(group) > 1 else ""
        place = f'x="{x(group[0][0])}%" y="{y:.1f}" overflow="visible"'
        drawn.append(f"<svg {place}>{_SIGNS[kind]}<title>{esc(group[0][2] + more)}</title></path></svg>")
    return drawn


def _natural(name: str) -> list:
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", name)]


def _ticks(length: float) -> tuple[float, list[float]]:
    """(step, ticks) in seconds for an axis of `length` seconds: at most nine, in steps people count in."""
    minute, hour, day = 60, 3600, 86400
    steps = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30]
    steps += [minutes * minute for minutes in (1, 2, 5, 10, 15, 30)]
    steps += [hour, 2 * hour, 3 * hour, 6 * hour, 12 * hour, day, 2 * day, 7 * day]
    step = next((s for s in steps if length / s <= 8.5), length / 8)
    return step, [i * step for i in range(int(length / step) + 1) if i * step <= 0.98 * length]


def human(seconds: float | None, step: float = 0.0) -> str:
    """A length of time for people: "0.42 s", "12.3 s", "4 min 12 s", "3 h 05 min", "2 d 4 h"; "–" for None.

    step: for marks on an axis, the distance between them; zeros below it are left out ("2 min", "3 h").
    """
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if step:
        if seconds == 0:
            return "0"
        if seconds < 60:
            return f"{seconds:.6g} s"
        text = human(seconds)
        return re.sub(r" 0?0 (s|min|h)$", "", text)
    if seconds == 0:
        return "0 s"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def esc(value: Any) -> str:
    """Text for HTML and for quoted attributes; control characters, which HTML forbids, become U+FFFD."""
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", str(value)), quote=True)
