"""compare.html: what two datasets made of one manifest, side by side, matched by the ids of rows.

As in the report, everything that reaches the page is untrusted.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from ltx_ray.dataset import layout
from ltx_ray.dataset.report import fill_template
from ltx_ray.dataset.report_data import clip_length, make_strips, parse_json, read_index_rows, relative_link
from ltx_ray.dataset.report_links import SignedLinks, sign_links
from ltx_ray.dataset.report_list import Smallest
from ltx_ray.dataset.report_text import count, esc, finite, human, when, words
from ltx_ray.dataset.thumbnails import Strip
from ltx_ray.storage.store import Store

#: Rows of the first dataset that are compared: of more, those with the smallest hashes of their ids.
MAX_COMPARED = 50_000
#: Pairs of clips that are shown.
MAX_PAIRS = 200
#: What makes a row ask for the same clip, weights and numerics aside.
_REQUEST = ("prompt", "negative_prompt", "seed", "width", "height", "num_frames", "frame_rate", "num_inference_steps",
            "pipeline")  # fmt: skip
_MEASURES = {"gpu_seconds": "GPU seconds", "motion": "motion", "sharpness": "sharpness", "loudness_lufs": "LUFS"}

Row = dict[str, Any]


@dataclass
class Comparison:
    """Rows that two datasets share, by their ids, and counts."""

    pairs: list[tuple[Row, Row]] = field(default_factory=list)
    #: Rows in both, by what their clips have to do with each other: "same", "other" (latents), "request".
    kinds: Counter[str] = field(default_factory=Counter)
    only: tuple[int, int] = (0, 0)
    is_sample: bool = False
    flags: tuple[Counter[str], Counter[str]] = field(default_factory=lambda: (Counter(), Counter()))
    sums: dict[str, list[float]] = field(default_factory=dict)
    measured: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def take(self, first: Row, second: Row) -> str:
        """Count a pair; returns its kind."""
        if any(first.get(name) != second.get(name) for name in _REQUEST):
            kind = "request"
        else:
            kind = "same" if first.get("latents_sha256") == second.get("latents_sha256") else "other"
        self.kinds[kind] += 1
        for row, flags in zip((first, second), self.flags, strict=True):
            flags.update(map(str, row.get("flags") or ()))
        for name in _MEASURES:
            values = [finite(row.get(name)) for row in (first, second)]
            if values[0] is not None and values[1] is not None:
                sums = self.sums.setdefault(name, [0.0, 0.0])
                sums[0] += values[0]
                sums[1] += values[1]
                self.measured[name] += 1
        return kind


def compare(first: Store, second: Store) -> Comparison:
    """Match the rows of two datasets. Pairs that differ most come first: in flags, then in latents."""
    found = Comparison()
    kept: Smallest[Row] = Smallest(MAX_COMPARED)
    number = 0
    for number, row in enumerate(read_index_rows(first, found.problems), 1):
        place = (_hash(row), number)
        if kept.takes(place):
            kept.add(place, row)
    by_id = {str(row.get("id")): row for row in kept.values()}
    found.is_sample = number > MAX_COMPARED
    largest = max(map(_hash, by_id.values()), default=b"") if found.is_sample else None
    pairs: Smallest[tuple[Row, Row]] = Smallest(MAX_PAIRS)
    missing = 0
    for number, row in enumerate(read_index_rows(second, found.problems)):
        mate = by_id.pop(str(row.get("id")), None)
        if mate is None:
            missing += largest is None or _hash(row) <= largest
            continue
        kind = found.take(mate, row)
        rank = 0 if set(mate.get("flags") or ()) != set(row.get("flags") or ()) else 2 if kind == "same" else 1
        key = (rank, str(row.get("id")), number)
        if pairs.takes(key):
            pairs.add(key, (mate, row))
    found.only = (len(by_id), missing)
    found.pairs = pairs.values()
    return found


def _hash(row: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(str(row.get("id")).encode("utf-8", "replace")).digest()[:12]


def write_comparison(output: str, other: str, signed_seconds: float | None = None) -> str:
    """Write compare.html beside the report of `output` and return its path (within the dataset's filesystem).

    With `signed_seconds`, links carry an object store's signature for so long. Raises OSError.
    """
    stores = Store(output), Store(other)
    if signed_seconds is not None:
        for store in stores:
            sign_links(store, (), signed_seconds)
    found = compare(*stores)
    sides = [[pair[n] for pair in found.pairs] for n in (0, 1)]
    links = [SignedLinks() if signed_seconds is None else _signed(*side, signed_seconds) for side in zip(stores, sides)]
    strips = [make_strips(store, rows) for store, rows in zip(stores, sides, strict=True)]
    relative = ("", _way(*stores))
    cards = "\n".join(
        _pair(pair, (strips[0][n], strips[1][n]), [_link(pair[k], links[k], relative[k]) for k in (0, 1)])
        for n, pair in enumerate(found.pairs)
    )
    origins = " ".join(dict.fromkeys(link.origin for link in links if link.origin))
    page = fill_template(
        {
            "images": "data:",
            "media": f"'self' file: {origins}".strip(),
            "title": f"{esc(stores[0].name)} and {esc(stores[1].name)} · ltx-ray",
            "header": _header(found, stores),
            "clips": _clips(found, cards),
            "footer": f"Written by ltx-ray, {esc(when(time.time()))}. This page loads nothing from anywhere but the "
            "clips that are played.",
        }
    )
    stores[0].write_bytes(layout.COMPARISON, page.encode("utf-8", "replace"))
    return stores[0].path(layout.COMPARISON)


def _signed(store: Store, rows: Iterable[Row], seconds: float) -> SignedLinks:
    return sign_links(store, [row["clip"] for row in rows if relative_link(row.get("clip"))], seconds)


def _way(first: Store, second: Store) -> str | None:
    """From the page to the other dataset; None where there is no relative way."""
    if not (first.is_local and second.is_local):
        return None
    return quote(os.path.relpath(second.root, first.root)) + "/"


def _link(row: Row, links: SignedLinks, way: str | None) -> str | None:
    """The link to a row's clip, as HTML."""
    if signed := links.urls.get(row.get("clip") or ""):
        return esc(signed)
    inside = relative_link(row.get("clip"))
    return None if inside is None or way is None else f"{way}{inside}"


def _header(found: Comparison, stores: tuple[Store, Store]) -> str:
    both = found.kinds.total()
    tiles = [
        (
            "In both",
            f"{both:,}",
            f"of {MAX_COMPARED:,} that were compared" if found.is_sample else "rows, by their ids",
        ),
        ("Same latents", f"{found.kinds['same']:,}", "bit for bit"),
        ("Other latents", f"{found.kinds['other']:,}", "of the same request"),
        ("Other request", f"{found.kinds['request']:,}", "prompt, seed, size or steps"),
        ("Only in A", f"{found.only[0]:,}", ""),
        ("Only in B", f"{found.only[1]:,}", ""),
    ]
    records = [_record(store) for store in stores]
    lines = "".join(
        f"<tr><th>{esc(name)}</th>{''.join(f'<td>{esc(value)}</td>' for value in values)}</tr>"
        for name, values in [("dataset", [store.name for store in stores]), *_differences(found, records)]
    )
    return "\n".join([
        '<p class="eyebrow"><span>ltx-ray</span><span>comparison</span></p>',
        f"<h1>{count(both, 'row')} in both, {found.kinds['other']:,} with other latents</h1>",
        '<dl class="tiles">',
        *(f'<div><dt>{name}</dt><dd>{value}<span class="sub">{sub}</span></dd></div>' for name, value, sub in tiles),
        "</dl>",
        f'<table class="sides"><thead><tr><th></th><th>A</th><th>B</th></tr></thead><tbody>{lines}</tbody></table>',
        *(f'<p class="note">{esc(problem)}</p>' for problem in found.problems[:20]),
    ])  # fmt: skip


def _record(store: Store) -> dict[str, Any]:
    try:
        record = parse_json(store.read_bytes(layout.RUN_RECORD).decode("utf-8", "replace"))
    except OSError:
        record = None
    return record if isinstance(record, dict) else {}


def _differences(found: Comparison, records: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Means over the pairs, flags, and the fields of the newest runs that differ."""
    lines = [
        (f"{title} on average", [f"{total / found.measured[name]:.4g}" for total in found.sums[name]])
        for name, title in _MEASURES.items()
        if name in found.sums
    ]
    for flag in sorted(set(found.flags[0]) | set(found.flags[1])):
        lines.append((words(flag), [f"{flags[flag]:,}" for flags in found.flags]))
    for name in ("manifest", "device", "tp"):
        lines += _differing(name, *(record.get(name) for record in records))
    for group in ("numerics", "recipe", "versions"):
        sides = [value if isinstance(value := record.get(group), dict) else {} for record in records]
        for name in sorted(set(sides[0]) | set(sides[1])):
            lines += _differing(f"{group}: {name}", sides[0].get(name), sides[1].get(name))
    return lines


def _differing(name: str, first: Any, second: Any) -> list[tuple[str, list[str]]]:
    return [] if first == second else [(name, ["–" if value is None else str(value) for value in (first, second)])]


def _clips(found: Comparison, cards: str) -> str:
    head = f'<div class="head"><h2>Side by side</h2><span class="soft">{found.kinds.total():,}</span></div>'
    if not found.pairs:
        return f'<section id="clips">{head}<p class="empty">No row has its id in both datasets.</p></section>'
    more = found.kinds.total() - len(found.pairs)
    note = f'<p class="note">{count(more, "more row")} not shown here; those that differ in flags come first.</p>'
    return f'<section id="clips">{head}<div class="pairs">{cards}</div>{note if more else ""}</section>'


def _pair(pair: tuple[Row, Row], strips: tuple[Strip, Strip], links: list[str | None]) -> str:
    first, second = pair
    name = esc(first.get("id") or "?")
    same = first.get("latents_sha256") == second.get("latents_sha256")
    badge = '<span class="badge">same latents</span>' if same else '<span class="badge warn">other latents</span>'
    sides = "".join(
        f'<div class="side"><p class="row small"><b>{side}</b>{_facts(row)}</p>'
        f"{strip.html(f'{name} {side}', link)}</div>"
        for side, row, strip, link in zip("AB", pair, strips, links, strict=True)
    )
    prompt = str(first.get("prompt") or "")
    return (
        f'<article class="pair"><div class="row"><h3>{name}</h3>{badge}</div>'
        f'<p class="prompt" dir="auto">{esc(prompt[:600])}{" …" if len(prompt) > 600 else ""}</p>'
        f'<div class="sides">{sides}</div></article>'
    )


def _facts(row: Row) -> str:
    flags = "".join(f'<span class="badge warn">{esc(words(flag))}</span>' for flag in row.get("flags") or ())
    facts = [
        f"{row.get('width')} × {row.get('height')}",
        f"{seconds:.2f} s" if (seconds := clip_length(row)) else "",
        f"GPU {human(finite(row.get('gpu_seconds')))}" if row.get("gpu_seconds") else "",
        f"motion {value:.3f}" if (value := finite(row.get("motion"))) is not None else "",
    ]
    return f'<span class="soft">{esc(" · ".join(fact for fact in facts if fact))}</span>{flags}'
