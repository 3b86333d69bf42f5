"""The report's chart of what each replica did over time, as an inline SVG. Its size in bytes is bounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from ltx_ray.dataset.report_text import STAGE_NAMES, esc, human
from ltx_ray.dataset.timeline import KINDS, Lane, Mark, Role, Span, Timeline

#: Roles of replicas in the order of their groups, and the names of the groups.
_ROLES = ("text", "diffusion", "stage1", "stage2", "decode")
_ROLE_NAMES = {"diffusion": "stage 1 + 2", **STAGE_NAMES}
_SIGNS = {
    "failed": '<path class="mark" d="M0-5.5l5.8 10.5h-11.6z">',
    "lost": '<path class="lost" d="M-4.5-4.5l9 9m0-9l-9 9">',
}
#: Most bins that are drawn in all lanes together.
_BINS = 9000
#: Above this many lanes, lanes are drawn thin.
_DENSE_LANES = 40


def draw_timeline(timeline: Timeline | None) -> str:
    """A section of HTML with one lane per replica, grouped by role; "" when there is no timeline."""
    if timeline is None:
        return ""
    chart = _Chart(timeline)
    chart.add_failed_rows(timeline.failed)
    order = {role: i for i, role in enumerate(_ROLES)}
    for role in sorted(timeline.roles, key=lambda role: (order.get(role.name, len(order)), role.name)):
        chart.add_role(role)
    return chart.html(legend=_legend(timeline))


class _Chart:
    """The chart as it is drawn, group by group from the top. `y` is the height so far, in pixels."""

    def __init__(self, timeline: Timeline):
        self.begin, self.end = timeline.begin, timeline.end
        self.bin_seconds = timeline.bin_seconds
        lanes = sum(len(role.lanes) for role in timeline.roles)
        self.dense = lanes > _DENSE_LANES
        self.lane_height = 12 if self.dense else 22
        self.bins = max(24, min(240, _BINS // max(1, lanes)))
        self.y = self.hidden = 0
        self.labels: list[str] = []
        self.busy: list[str] = []
        self.bars: list[str] = []
        self.marks: list[str] = []
        self.summary: list[str] = []

    def x(self, t: float) -> float:
        """Position of the time `t`, in per cent of the chart's width."""
        return round(min(100.0, max(0.0, 100 * (t - self.begin) / (self.end - self.begin))), 3)

    def add_failed_rows(self, failed: Sequence[Mark]) -> None:
        if failed:
            self._add_group("failed rows", f"{sum(mark.count for mark in failed):,}")
            self.marks += _marks(failed, self.x, self.y - 9)

    def add_role(self, role: Role) -> None:
        title = _ROLE_NAMES.get(role.name, role.name)
        self.summary.append(f"{title}: replicas {role.replicas}, busy {role.busy:.0%} of the time")
        self._add_group(title, f"{role.busy:.0%}")
        self.hidden += role.replicas - len(role.lanes)
        for lane in role.lanes:
            self._add_lane(lane)

    def _add_group(self, title: str, value: str) -> None:
        self.labels.append(f'<div class="group">{esc(title)}</div>')
        self.busy.append(f'<div class="group">{value}</div>')
        self.y += 26

    def _add_lane(self, lane: Lane) -> None:
        self.labels.append(f'<div title="{esc(lane.replica)}">{esc(lane.replica)}</div>')
        self.busy.append("<div>–</div>" if lane.busy is None else f"<div>{lane.busy:.0%}</div>")
        box = f'y="{self.y + self.lane_height * 0.14:.1f}" height="{self.lane_height * 0.72:.1f}"'
        for start, stop in lane.alive:
            width = max(0, self.x(stop) - self.x(start))
            self.bars.append(f'<rect class="track" x="{self.x(start)}%" width="{width:.3f}%" {box}/>')
        if self.bin_seconds is None:
            self.bars += _bars(lane.spans, self.x, box)
        else:
            self.bars += self._binned(lane, self.bin_seconds, box)
        self.marks += _marks(lane.marks, self.x, self.y + self.lane_height / 2)
        self.y += self.lane_height

    def _binned(self, lane: Lane, bin_seconds: float, box: str) -> list[str]:
        """A path per kind of span. In a bin, its bar is as high as its share of the time, and kinds are stacked."""
        edges = np.linspace(0, self.end - self.begin, self.bins + 1)
        shares = {}
        for kind, work in lane.work.items():
            so_far = np.concatenate([[0.0], np.cumsum(work.bins)])
            within = np.interp(edges, bin_seconds * np.arange(len(so_far)), so_far)
            shares[kind] = np.diff(within) * self.bins / edges[-1]
        total = sum(shares.values(), np.zeros(self.bins))
        paths: list[str] = []
        floor: Counter[int] = Counter()
        for kind in (kind for kind in KINDS if kind in shares):
            path = []
            for i in np.flatnonzero(shares[kind]).tolist():
                tall = round(100 * shares[kind][i] / max(1.0, total[i]))  # calls of one replica may overlap
                if tall:
                    path.append(f"M{i} {100 - floor[i]}h1v-{tall}h-1z")
                    floor[i] += tall
            if path:
                work = lane.work[kind]
                title = f"{lane.replica}: {KINDS[kind]} {work.times:,} times, {human(work.seconds)} in all"
                paths.append(f'<path class="k-{kind}" d="{"".join(path)}"><title>{esc(title)}</title></path>')
        frame = f'x="0" width="100%" {box} viewBox="0 0 {self.bins} 100" preserveAspectRatio="none"'
        return [f"<svg {frame}>", *paths, "</svg>"] if paths else []

    def html(self, legend: str) -> str:
        """The finished section."""
        seconds = self.end - self.begin
        notes = [f"{self.hidden:,} more replicas are not drawn."] if self.hidden else []
        if self.bin_seconds is not None:
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


def _legend(timeline: Timeline) -> str:
    lanes = [lane for role in timeline.roles for lane in role.lanes]
    kinds = {span.kind for lane in lanes for span in lane.spans}.union(*(lane.work for lane in lanes))
    signs = {mark.sign for lane in lanes for mark in lane.marks} | {mark.sign for mark in timeline.failed}
    return "".join(
        [f'<li><i class="k-{kind}"></i>{name}</li>' for kind, name in KINDS.items() if kind in kinds]
        + [
            f'<li><svg width="16" height="12" viewBox="-8 -6 16 12" aria-hidden="true">{_SIGNS[sign]}</path></svg>'
            f"{name}</li>"
            for sign, name in (("failed", "failed call"), ("lost", "replica lost"))
            if sign in signs
        ]
    )


def _bars(spans: Sequence[Span], x: Callable[[float], float], box: str) -> list[str]:
    """A rectangle for each span, wide enough that a short call can be seen."""
    return [
        f'<rect class="k-{esc(span.kind)}{"" if span.ok else " failed"}" x="{x(span.start)}%" '
        f'width="{max(0.15, x(span.end) - x(span.start)):.3f}%" {box} rx="1"><title>{esc(span.title)}</title></rect>'
        for span in spans
    ]


def _marks(marks: Sequence[Mark], x: Callable[[float], float], y: float) -> list[str]:
    """A sign for each mark. Marks that would overlap become one sign that says how many."""
    groups: dict[tuple[str, int], list[Mark]] = {}
    for mark in marks:
        groups.setdefault((mark.sign, int(x(mark.time) * 1.5)), []).append(mark)
    drawn = []
    for (sign, _), group in groups.items():
        count = sum(mark.count for mark in group)
        more = f" (and {count - 1:,} more here)" if count > 1 else ""
        place = f'x="{x(group[0].time)}%" y="{y:.1f}" overflow="visible"'
        drawn.append(f"<svg {place}>{_SIGNS[sign]}<title>{esc(group[0].title + more)}</title></path></svg>")
    return drawn


def _ticks(length: float) -> tuple[float, list[float]]:
    """(step, ticks) in seconds for an axis of `length` seconds: at most nine ticks, at round steps."""
    minute, hour, day = 60, 3600, 86400
    steps = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30]
    steps += [minutes * minute for minutes in (1, 2, 5, 10, 15, 30)]
    steps += [hour, 2 * hour, 3 * hour, 6 * hour, 12 * hour, day, 2 * day, 7 * day]
    step = next((s for s in steps if length / s <= 8.5), length / 8)
    return step, [i * step for i in range(int(length / step) + 1) if i * step <= 0.98 * length]
