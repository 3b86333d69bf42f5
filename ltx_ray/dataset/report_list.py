"""The report's list of the clips of a large dataset: its data, which a script in the page shows row by row.

The pictures are the files in `thumbs/` beside the page.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any, Generic, NamedTuple, TypeVar

from ltx_ray.dataset.quality import MEASURES, rounded_measures
from ltx_ray.dataset.report_links import SignedLinks
from ltx_ray.dataset.report_text import STAGE_NAMES, finite

T = TypeVar("T")

#: Most clips that are listed. The page holds some 550 bytes for each.
MAX_LISTED = 100_000
#: Most characters of a prompt that are shown and searched.
_PROMPT = 300
#: Where the page may load pictures from: its own folder, on a disk or behind a server.
IMAGES = "'self' file: data:"


class Smallest(Generic[T]):
    """The `most` values with the smallest keys of those that were added, in memory for twice as many."""

    def __init__(self, most: int):
        self._most = most
        self._kept: list[tuple[Any, T]] = []
        self._largest: Any = None

    def takes(self, key: Any) -> bool:
        """Whether a value with this key may be one of them. No key may come twice."""
        return self._largest is None or key < self._largest

    def add(self, key: Any, value: T) -> None:
        self._kept.append((key, value))
        if len(self._kept) >= 2 * self._most:
            self._cut()

    def _cut(self) -> None:
        self._kept.sort(key=lambda pair: pair[0])
        del self._kept[self._most :]
        if len(self._kept) == self._most:
            self._largest = self._kept[-1][0]

    def values(self) -> list[T]:
        """In the order of their keys."""
        self._cut()
        return [value for _, value in self._kept]


class Listed(NamedTuple):
    """What the list shows of a row."""

    id: str
    item: str
    clip: str
    prompt: str
    flags: tuple[str, ...]
    width: int | None
    height: int | None
    frames: int | None
    rate: float | None
    seed: str
    work: float
    done: int
    #: In the order of MEASURES; empty when nothing is known.
    measures: tuple[float | None, ...]


def listed(row: dict[str, Any], link: str | None, done: float) -> Listed:
    """What the list shows of a row. `link` to its clip, `done` in seconds since the epoch."""
    item = str(row.get("item_id") or "")
    prompt = str(row.get("prompt") or "")
    usual = link == f"clips/{item[:2]}/{item}.mp4"
    work = sum(max(0.0, finite(row.get(f"{stage}_seconds")) or 0.0) for stage in STAGE_NAMES)
    return Listed(
        str(row.get("id") or item), item, "" if usual else link or "#clips",
        prompt if len(prompt) <= _PROMPT else prompt[:_PROMPT] + " …", tuple(map(str, row.get("flags") or ())),
        row.get("width"), row.get("height"), row.get("num_frames"), finite(row.get("frame_rate")), str(row.get("seed")),
        round(work, 2), round(done), rounded_measures(row),
    )  # fmt: skip


def listed_items(clips: Iterable[Listed]) -> list[str]:
    """The item_ids of what is listed."""
    return [clip.item for clip in clips]


def measured_columns(clips: Sequence[Listed]) -> list[str]:
    """Those of MEASURES that are known of some clip."""
    return [
        name
        for number, name in enumerate(MEASURES)
        if any(clip.measures and clip.measures[number] is not None for clip in clips)
    ]


def _measured(clips: Sequence[Listed]) -> list[dict[str, Any]]:
    """Each measure as the script takes it, with its values in the order of the clips."""
    numbers = {name: number for number, name in enumerate(MEASURES)}
    return [
        {"column": name, **vars(MEASURES[name]),
         "values": [clip.measures[numbers[name]] if clip.measures else None for clip in clips]}
        for name in measured_columns(clips)
    ]  # fmt: skip


def list_data(
    clips: Sequence[Listed],
    flags: Counter[str],
    links: SignedLinks,
    failed: Sequence[tuple[Listed, int, str]] = (),
    statuses: Sequence[str] = (),
) -> str:
    """The data of the list as a script element, which is not run. Nothing in it can end the element.

    failed: rows that follow the clips, each with the number of its status and the reason. `statuses`: names of those.
    """
    names = [name for name, _ in flags.most_common()]
    numbers = {name: number for number, name in enumerate(names)}
    rows, status, why = zip(*failed, strict=True) if failed else ((), (), ())
    shown = Listed._fields[:-1]  # all but the measures
    columns: dict[str, list[Any]] = {name: [] for name in shown}
    for row in (*clips, *rows):
        for name, value in zip(shown, row, strict=False):
            columns[name].append([numbers[flag] for flag in value] if name == "flags" else value)
    signed = links.of_list(columns["item"][: len(clips)])
    fields: dict[str, Any] = {"names": names, **columns, "signed": signed, "rendered": len(clips)}
    fields["measures"] = _measured(clips)
    fields |= {"status": status, "why": why, "statuses": statuses}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    return f'<script type="application/json" id="listed">{text.replace("<", chr(92) + "u003c")}</script>'


def list_script() -> str:
    """The script that shows the list."""
    return resources.files(__package__).joinpath("report_list.js").read_text(encoding="utf-8")
