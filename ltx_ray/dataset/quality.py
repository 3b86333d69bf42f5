"""What was measured of clips, in words and summed up. Decode workers measure it; nothing is measured here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ltx_ray.dataset.report_text import finite, words


@dataclass(frozen=True)
class Measure:
    """What people call a column of the index, and with how many `digits` behind the point they read it."""

    title: str
    digits: int
    unit: str = ""

    def text(self, value: float) -> str:
        return f"{value:,.{self.digits}f} {self.unit}".rstrip()


#: By column.
MEASURES: Mapping[str, Measure] = {
    "loudness_lufs": Measure("loudness", 1, "LUFS"),
    "clipped_samples": Measure("clipped samples", 0),
    "motion": Measure("motion", 3),
    "sharpness": Measure("sharpness", 1),
    "mean_luma": Measure("mean luma", 0),
    "cuts": Measure("cuts", 0),
}


@dataclass(frozen=True)
class MeasureSummary:
    """Of the clips of which it is known."""

    clips: int
    mean: float
    least: float
    most: float


class QualitySums:
    """Sums up the measures of clips, each of which is to be added once."""

    def __init__(self) -> None:
        self._sums: dict[str, MeasureSummary] = {}
        self._flags: Counter[str] = Counter()

    def add(self, measured: Mapping[str, Any], flags: Iterable[str]) -> None:
        """`measured`: values by column; others than those of MEASURES are passed over."""
        self._flags.update(flags)
        for name in MEASURES:
            value = finite(measured.get(name))
            if value is None:
                continue
            if (known := self._sums.get(name)) is None:
                self._sums[name] = MeasureSummary(1, value, value, value)
                continue
            clips = known.clips + 1
            mean = known.mean + (value - known.mean) / clips
            self._sums[name] = MeasureSummary(clips, mean, min(known.least, value), max(known.most, value))

    def summary(self) -> dict[str, dict[str, Any]]:
        """`measures` by column, and `flags` with how many clips have them, for `run.json`."""
        return {"measures": {name: vars(found) for name, found in self._sums.items()}, "flags": dict(self._flags)}


def measure_lines(row: Mapping[str, Any]) -> dict[str, str]:
    """What is known of one clip, by its names for people."""
    known = ((measure, finite(row.get(name))) for name, measure in MEASURES.items())
    return {measure.title: measure.text(value) for measure, value in known if value is not None}


def rounded_measures(row: Mapping[str, Any]) -> tuple[float | None, ...]:
    """What is known of one clip, in the order of MEASURES and as exact as it is read; empty when nothing is known."""
    known = [finite(row.get(name)) for name in MEASURES]
    if not any(value is not None for value in known):
        return ()
    pairs = zip(known, MEASURES.values(), strict=True)
    return tuple(None if value is None else round(value, measure.digits or None) for value, measure in pairs)


def quality_text(quality: Any) -> str:
    """`loudness -21.3 LUFS (-40.0 LUFS to -9.1 LUFS), …; 2 black`, of a summary; "" where nothing is known.

    `quality` may be anything that stands in a record.
    """
    fields = quality if isinstance(quality, dict) else {}
    measures, flags = (found if isinstance(found := fields.get(name), dict) else {} for name in ("measures", "flags"))
    parts = []
    for name, measure in MEASURES.items():
        found = measures.get(name)
        known = found if isinstance(found, dict) else {}
        mean, least, most = (finite(known.get(of)) for of in ("mean", "least", "most"))
        if mean is not None and least is not None and most is not None:
            spread = "" if least == most else f" ({measure.text(least)} to {measure.text(most)})"
            parts.append(f"{measure.title} {measure.text(mean)}{spread}")
    counted = [(flag, n) for flag, count in flags.items() if (n := finite(count))]
    told = ", ".join(f"{n:,.0f} {words(flag)}" for flag, n in sorted(counted, key=lambda pair: -pair[1]))
    return "; ".join(filter(None, [", ".join(parts), told]))
