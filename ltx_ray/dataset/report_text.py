"""How the report reads and writes text, times and numbers."""

from __future__ import annotations

import html
import math
import re
from datetime import UTC, datetime
from typing import Any

from ltx_ray.records import first_line
from ltx_ray.stages import Stage

#: What the report calls the stages that have a column of seconds in the index.
STAGE_NAMES: dict[str, str] = {
    Stage.TEXT: "text",
    Stage.STAGE1: "stage 1",
    Stage.STAGE2: "stage 2",
    Stage.DECODE: "decode",
}


def esc(value: Any) -> str:
    """`value` as text of HTML or of a quoted attribute. Control characters, which HTML forbids, become U+FFFD."""
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", str(value)), quote=True)


def human(seconds: float | None, step: float = 0.0) -> str:
    """A duration for people: "0.42 s", "12.3 s", "4 min 12 s", "3 h 05 min", "2 d 4 h"; "–" for None.

    `step` is given for ticks of an axis: the distance between them. Zeros below it are left out ("2 min", "3 h").
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


def when(seconds: float) -> str:
    """Seconds since the epoch as a date and time for people, in UTC."""
    try:
        moment = datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, OSError, ValueError):
        return "unknown time"
    return f"{moment.day} {moment.strftime('%B %Y, %H:%M')} UTC"


def count(number: int, noun: str) -> str:
    """`number` with the noun in singular or plural: "1 clip", "2 clips"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def words(flag: Any) -> str:
    """A flag such as "prompt_truncated" with spaces."""
    return str(flag).replace("_", " ")


def short(error: BaseException) -> str:
    """The first line of the error's message, at most 300 characters of it."""
    return first_line(error)[:300]


def finite(value: Any) -> float | None:
    """`value` as a float; None when it is not a finite number."""
    if type(value) is float:
        return value if math.isfinite(value) else None
    try:
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
    except OverflowError:
        return None


def epoch_seconds(value: Any) -> float | None:
    """An ISO time (UTC without a zone) or a number as seconds since the epoch; None for anything else."""
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            return None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return finite(value)
