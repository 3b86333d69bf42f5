"""What a run costs: the GPU time that it has reserved, at the price of an hour of a card.

Reserved time counts from a card's first replica to its last, loading, waiting and lost attempts included, as the bill
does. `gpu_seconds` of a row has its calls alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ltx_ray.dataset.report_text import finite


@dataclass(frozen=True)
class RunCost:
    """`cost` of `run.json`. Dollars are None without a price, and those of a clip before the first one."""

    gpu_hours: float
    dollars: float | None = None
    dollars_per_clip: float | None = None
    dollars_per_video_hour: float | None = None

    def __str__(self) -> str:
        """`12.3 GPU hours, $30.75: $0.0427 a clip, $30.5 an hour of video`."""
        hours = f"{self.gpu_hours:,.2f} GPU hours"
        if self.dollars is None:
            return hours
        each = [
            f"{dollars_text(value)} {what}"
            for value, what in ((self.dollars_per_clip, "a clip"), (self.dollars_per_video_hour, "an hour of video"))
            if value is not None
        ]
        return f"{hours}, {dollars_text(self.dollars)}" + (f": {', '.join(each)}" if each else "")


def cost_of(gpu_seconds: float, price: float | None, clips: int, video_seconds: float) -> RunCost:
    """The cost of `clips` that last `video_seconds` in all. `price`: dollars for an hour of one GPU."""
    hours = gpu_seconds / 3600
    if price is None:
        return RunCost(hours)
    dollars = hours * price
    return RunCost(
        hours,
        dollars,
        dollars / clips if clips else None,
        dollars / (video_seconds / 3600) if video_seconds > 0 else None,
    )


def recorded_cost(record: Mapping[str, Any]) -> RunCost | None:
    """The cost in a `run.json`; None in one of a version before, and for a run that has reserved no GPU."""
    cost = record.get("cost")
    fields = cost if isinstance(cost, dict) else {}
    hours = finite(fields.get("gpu_hours"))
    if not hours:
        return None
    return RunCost(hours, *(finite(fields.get(f"dollars{of}")) for of in ("", "_per_clip", "_per_video_hour")))


def cost_lines(record: Mapping[str, Any], all_runs: float) -> list[str]:
    """What the newest run has cost, by its `run.json`, and the GPU time of all runs, which is `all_runs` in seconds."""
    cost, hours = recorded_cost(record), all_runs / 3600
    lines = [] if cost is None else [f"cost of the run: {cost}"]
    if hours > (cost.gpu_hours if cost is not None else 0.0) + 0.005:
        lines.append(f"all runs into this output: {hours:,.2f} GPU hours")
    return lines


def dollars_text(dollars: float) -> str:
    """`$30.75`; below ten cents with three digits, such as `$0.0427`."""
    return f"${dollars:,.2f}" if dollars >= 0.1 or not dollars else f"${dollars:.3g}"
