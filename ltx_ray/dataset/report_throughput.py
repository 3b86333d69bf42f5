"""The report's chart of clips per hour over time, as an inline SVG."""

from __future__ import annotations

from collections import Counter

from ltx_ray.dataset.clip_rate import rate_text
from ltx_ray.dataset.report_text import esc, human

#: Seconds of a bin in which clips are counted, and most bars of the chart.
COUNTED_SECONDS, _BARS = 10, 120
_HEIGHT = 96


def draw_throughput(finished: Counter[int], begin: float | None, end: float | None) -> str:
    """A section of HTML; "" for fewer than two bars.

    finished: the clips of the dataset by the COUNTED_SECONDS in which they were finished (since the epoch). `begin` and
    `end` of the newest run, which is shown when it made clips; otherwise all of them are.
    """
    run = {at: n for at, n in finished.items() if begin and end and begin <= at * COUNTED_SECONDS <= end}
    what, counts = ("of the newest run", run) if run else ("of all runs", dict(finished))
    if not counts:
        return ""
    first = int(begin // COUNTED_SECONDS) if run and begin else min(counts)
    last = max(max(counts), int(end // COUNTED_SECONDS) if run and end else 0)
    width = -(-(last - first + 1) // _BARS)
    bars = [0] * (-(-(last - first + 1) // width))
    if len(bars) < 2:
        return ""
    for at, n in counts.items():
        bars[(at - first) // width] += n
    rates = [n * 3600 / (width * COUNTED_SECONDS) for n in bars]
    top = max(rates)
    step = 100 / len(bars)
    drawn = "".join(
        f'<rect class="bar" x="{i * step:.3f}%" width="{0.85 * step:.3f}%" y="{_HEIGHT * (1 - rate / top):.1f}" '
        f'height="{_HEIGHT * rate / top:.1f}"><title>{esc(rate_text(rate))}</title></rect>'
        for i, rate in enumerate(rates)
        if rate
    )
    seconds = len(bars) * width * COUNTED_SECONDS
    ticks = "".join(f'<span style="left:{25 * i}%">{esc(human(seconds * i / 4, seconds / 4))}</span>' for i in range(5))
    total = sum(counts.values())
    return (
        f'<section id="throughput"><div class="head"><h2>Throughput</h2><span class="soft">{what}: {total:,} clips, '
        f"at most {esc(rate_text(top))} in {esc(human(width * COUNTED_SECONDS))}</span></div>"
        f'<div class="timeline"><svg class="rates" width="100%" height="{_HEIGHT}" role="img" '
        f'aria-label="Clips per hour over time, at most {esc(rate_text(top))}">{drawn}</svg>'
        f'<div class="axis">{ticks}</div></div></section>'
    )
