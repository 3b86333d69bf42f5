"""The table of docs/sizing.md follows from the figures of docs/benchmarks.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ltx_ray.planning.estimate import _BYTES_OF_PIXEL, _BYTES_OF_ROW, _BYTES_OF_SOUND, _BYTES_OF_THUMB

DOCS = Path(__file__).resolve().parents[3] / "docs"
TEXT = (DOCS / "sizing.md").read_text()
MEASURED = (DOCS / "benchmarks.md").read_text()
ROWS = re.findall(
    r"^\| ([\d,]+)(, measured)? \| (bf16|fp8) \| ([\d,]+) \| ([\d,]+) \| (\d+) (days|years) \| (\d+) \| ([\d.]+) \|$",
    TEXT, re.MULTILINE,
)  # fmt: skip
PRICE = 2.50
CLIP_BYTES = 1088 * 1920 * 121 * _BYTES_OF_PIXEL + 121 / 24 * _BYTES_OF_SOUND + _BYTES_OF_THUMB + _BYTES_OF_ROW


def number(text: str) -> float:
    return float(text.replace(",", ""))


def clips_an_hour(cards: float, precision: str, measured: bool) -> float:
    if measured:
        return 3600 / float(re.search(rf"^\| ours, {precision} \| ([\d.]+) \|", MEASURED, re.MULTILINE)[1])
    fleets = {"bf16": "64 cards, stages of 40", "fp8": "64 cards in fp8"}
    large = re.search(r"^\| 1,000 cards, .*? \| [\d,]+ of [\d,]+ \| ([\d.]+) \|", MEASURED, re.MULTILINE)
    bound, ratio = re.search(
        rf"^\| {re.escape(fleets[precision])}.*? \| [\d,]+ of ([\d,]+) \| ([\d.]+) \|", MEASURED, re.MULTILINE
    ).groups()
    return number(bound) / 64 * cards * float(large[1] if cards == 1000 else ratio)


def test_every_fleet_is_there():
    assert [(number(row[0]), row[2]) for row in ROWS] == [
        (cards, precision) for cards in (1, 8, 64, 1000) for precision in ("bf16", "fp8")
    ]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[2]}")
def test_the_table_follows_from_what_was_measured_and_simulated(row):
    cards, measured, precision, hour, day, time, unit, dollars, terabytes = row
    rate = clips_an_hour(number(cards), precision, bool(measured))
    assert number(hour) == pytest.approx(rate, rel=0.005, abs=0.5)
    assert number(day) == pytest.approx(24 * rate, rel=0.005)
    days = 1e7 / (24 * rate)
    assert float(time) == pytest.approx(days if unit == "days" else days / 365, rel=0.01, abs=0.5)
    assert float(dollars) == pytest.approx(1000 * number(cards) / rate * PRICE, abs=0.6)
    assert float(terabytes) == pytest.approx(24 * rate * CLIP_BYTES / 1e12, abs=0.06)


def test_the_bytes_of_a_clip_and_the_price_are_those_of_the_table():
    assert f"about {CLIP_BYTES / 1e6:.1f} MB" in TEXT and f"${PRICE:.2f} per card" in TEXT
