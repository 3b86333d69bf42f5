"""report.html of a dataset: one self-contained page with failures, what each pool did, and a strip of each clip.

Everything that reaches the page (prompts, ids, messages, paths, even run.json) is untrusted. Text goes through `esc`,
links go through `relative_link`, and the page's own policy forbids it to load anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from ltx_ray.dataset import layout
from ltx_ray.dataset.clip_rate import rate_text
from ltx_ray.dataset.quality import MEASURES, measure_lines, quality_text
from ltx_ray.dataset.report_data import (
    ReportData,
    clip_length,
    finished_at,
    make_missing_sheets,
    make_strips,
    parse_json,
    read_report_data,
    relative_link,
)
from ltx_ray.dataset.report_failures import failures_section
from ltx_ray.dataset.report_links import MAX_SIGNED, SignedLinks, sign_links
from ltx_ray.dataset.report_list import (
    IMAGES,
    MAX_LISTED,
    Listed,
    list_data,
    list_script,
    listed_items,
    measured_columns,
)
from ltx_ray.dataset.report_status import failed_cards, left_out, name_of, status_options, statuses
from ltx_ray.dataset.report_text import STAGE_NAMES, count, epoch_seconds, esc, finite, human, when, words
from ltx_ray.dataset.report_throughput import draw_throughput
from ltx_ray.dataset.run_cost import recorded_cost
from ltx_ray.dataset.run_summary import wait_lines
from ltx_ray.dataset.thumbnails import Strip
from ltx_ray.dataset.timeline_chart import draw_timeline
from ltx_ray.storage.store import Store

#: Up to this many clips, the page holds everything, pictures included. Above it, it lists them (report_list.py).
_CARDS = 500
#: The filter by time: seconds before the newest row was finished.
_TIMES = {"": "Any time", 3600: "Newest hour", 86_400: "Newest day", 604_800: "Newest week"}


def write_report(
    output_dir: str, *, cards: int = _CARDS, max_listed: int = MAX_LISTED, signed_seconds: float | None = None
) -> str:
    """Write the report of the dataset at `output_dir` and return its path (within the dataset's filesystem).

    `output_dir` is a local folder or a URI that `Store` takes. The page says what is missing or damaged in it.
    Up to `cards` clips get a card each, with its pictures in the page. More are listed, at most `max_listed`: flagged
    ones first, then in the order in which they were finished. With `signed_seconds`, links to clips and pictures carry
    an object store's signature for so long, and the page may be opened anywhere.
    Raises FileNotFoundError when there is no dataset, another OSError when the page cannot be written.
    """
    store = Store(output_dir)
    if not store.exists(""):
        raise FileNotFoundError(f"{store.name}: there is no dataset")
    if signed_seconds is not None:
        max_listed = min(max_listed, MAX_SIGNED)
        sign_links(store, (), signed_seconds)  # Whether the store signs is said before everything is read.
    data = read_report_data(store, max_listed)
    is_list = data.rendered > cards
    strips: list[Strip] = []
    if is_list:
        make_missing_sheets(store, data.clips)
    else:
        strips = make_strips(store, data.clips)
    links = SignedLinks() if signed_seconds is None else _sign(store, data, is_list, signed_seconds)
    page = fill_template(
        {
            "images": f"{IMAGES} {links.origin}".strip() if is_list else "data:",
            "media": f"'self' file: {links.origin}".strip(),
            "list": list_data(data.listed, data.flags, links, *_failed(data)) if is_list else "",
            "title": esc(f"{data.run.record.get('run_id') or 'dataset'} · ltx-ray report"),
            "header": _header(data, strips),
            "failures": failures_section(data.failures, data.since_rendered, data.run.record, _place(store)),
            "timeline": draw_timeline(data.run.timeline) + draw_throughput(data.finished, *_run_times(data)),
            "clips": _clips(data, strips, is_list, links),
            "footer": f"Written by ltx-ray, {esc(when(time.time()))}. This page loads nothing from "
            f"{'elsewhere; pictures are in thumbs/ beside it, and' if is_list else 'anywhere;'} "
            "clip names link to the files beside it.",
        },
        [list_script()] if is_list else [],
    )
    store.write_bytes(layout.REPORT, page.encode("utf-8", "replace"))
    return store.path(layout.REPORT)


def fill_template(parts: Mapping[str, str], scripts: Sequence[str] = ()) -> str:
    """A page of the parts by their names, as HTML, and of `scripts`, which follow the part `list`."""
    template = resources.files(__package__).joinpath("report_template.html").read_text(encoding="utf-8")
    own = re.search(r"<script>(.*?)</script>", template, re.DOTALL)
    assert own is not None
    allowed = " ".join(map(_digest, (own[1], *scripts)))
    more = "".join(f"\n<script>{script}</script>" for script in scripts)
    parts = {**parts, "scripts": allowed, "list": parts.get("list", "") + more}
    # In one pass, so that a "{{...}}" in a prompt is not replaced.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts.get(match[1], ""), template)


def _digest(script: str) -> str:
    """A script as the page's policy allows it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _header(data: ReportData, strips: list[Strip]) -> str:
    run, first = data.run.record, data.clips[0] if data.clips else {}
    failed = data.failures.total
    if not data.rendered and not failed:
        title = "Nothing rendered"
    elif not failed:
        title = f"{_rows_and_clips(data)} rendered, none failed"
    else:
        title = f"{_rows_and_clips(data)} rendered, {failed:,} failed"
    state = str(run.get("state") or "")
    begun, _ = _run_times(data)
    eyebrow = [
        f'<span class="state {esc(state)}">{esc(state)}</span>' if state else "",
        "<span>ltx-ray</span>",
        f'<span class="mono">{esc(run["run_id"])}</span>' if run.get("run_id") else "",
        f"<span>{esc(when(begun))}</span>" if begun else "",
    ]
    about = {
        "Recipe": run.get("recipe_digest") or first.get("recipe_digest"),
        "Device": run.get("device") or first.get("device"),
        "Pools": _pairs(run.get("pools")) + (f" · tp {run['tp']}" if run.get("tp") else ""),
        "Versions": _pairs(run.get("versions") or first.get("versions")),
        "Manifest": run.get("manifest"),
        "Measured": quality_text({**data.quality.summary(), "flags": None}),
    }
    more = {name: run[name] for name in ("command", "output", "numerics", "recipe", "counts") if run.get(name)}
    folded = json.dumps(more, indent=2, ensure_ascii=False, default=str) if more else ""
    return "\n".join([
        f'<p class="eyebrow">{"".join(eyebrow)}</p><h1>{title}</h1>',
        '<dl class="tiles">',
        *(f'<div><dt>{name}</dt><dd class="{tone}">{esc(value)}<span class="sub">{esc(sub)}</span></dd></div>'
          for name, value, sub, tone in _tiles(data)),
        "</dl>",
        _list({name: value for name, value in about.items() if value}, "about"),
        '<details class="more"><summary>Command, numerics and recipe</summary>'
        f"<pre>{esc(folded)}</pre></details>" if folded else "",
        *(f'<p class="note">{esc(problem)}</p>' for problem in _problems(data, strips)),
    ])  # fmt: skip


def _rows_and_clips(data: ReportData) -> str:
    """How many rows there are, and how many clips where rows share some."""
    if data.items == data.rendered:
        return count(data.rendered, "clip")
    return f"{count(data.rendered, 'row')} of {count(data.items, 'clip')}"


def _failed(data: ReportData) -> tuple[list[tuple[Listed, int, str]], list[str]]:
    """The failed rows as the list has them, and the names of their statuses."""
    known = statuses(data.failures)
    return [(one.row, known.index(one.status), one.why) for one in data.failed], list(map(name_of, known))


def _run_times(data: ReportData) -> tuple[float | None, float | None]:
    """Start and end of the newest run in seconds since the epoch, so far as they are known."""
    run, timeline = data.run, data.run.timeline
    begun, ended = epoch_seconds(run.record.get("started_at")), epoch_seconds(run.record.get("finished_at"))
    return begun or (timeline.begin if timeline else None), ended or run.last


def _tiles(data: ReportData) -> list[tuple[str, str, str, str]]:
    """(title as HTML, value, subtitle, tone) of each figure at the top."""
    listed = data.run.record.get("counts")
    counts = listed if isinstance(listed, dict) else {}
    failed = data.failures.total
    begun, ended = _run_times(data)
    wall = ended - begun if begun and ended and ended > begun else None
    rows = f"of {counts['rows']:,} rows in the manifest" if isinstance(counts.get("rows"), int) else ""
    shared = f"rows of {count(data.items, 'clip')}" if data.items != data.rendered else ""
    rows = " · ".join(filter(None, (shared, rows)))
    each = f"{data.gpu_seconds / data.clip_seconds:,.1f} s a second of video" if data.clip_seconds else ""
    flags = ", ".join(f"{n:,} {words(flag)}" for flag, n in data.flags.most_common(3))
    rate, waits = data.run.clips_per_hour, wait_lines(data.run.waits)
    link = '<a href="#failures">Failed</a>'
    return [
        ('<a href="#clips">Rendered</a>', f"{data.rendered:,}", rows, ""),
        (link if failed else "Failed", f"{failed:,}", _failed_kinds(data), "bad" if failed else ""),
        ("Flagged", f"{data.flagged:,}", flags, "warn" if data.flagged else ""),
        ("Video", human(data.clip_seconds or None), "total length of the clips", ""),
        ("Wall time", human(wall), "of the newest run", ""),
        ("GPU time", human(data.gpu_seconds or None), each if data.gpu_seconds else "", ""),
        *_cost_tile(data),
        ("Throughput", rate_text(rate) if rate else "–", waits[0] if waits else "of the newest run", ""),
    ]


def _cost_tile(data: ReportData) -> list[tuple[str, str, str, str]]:
    cost = recorded_cost(data.run.record)
    if cost is None:
        return []
    hours, _, each = str(cost).partition(", ")
    return [("Reserved", hours, each or "by the newest run", "")]


def _problems(data: ReportData, strips: list[Strip]) -> list[str]:
    """What is missing or damaged, in words."""
    problems = data.problems[:20] + data.run.odd_nodes
    pairs = zip(data.clips, strips, strict=False)
    bad = [str(row.get("id")) for row, strip in pairs if row.get("clip") and strip.problem]
    if bad:
        names = ", ".join(bad[:8]) + " …" * (len(bad) > 8)
        problems.append(f"{count(len(bad), 'clip')} of the index missing or damaged: {names}")
    return problems


def _place(store: Store) -> str:
    """The dataset as a command takes it."""
    near = os.path.relpath(store.root) if store.is_local else store.name
    return store.name if near.startswith("..") else near


def _failed_kinds(data: ReportData) -> str:
    most = data.failures.by("kind").most_common()
    return ", ".join(count(n, "row error") if kind == "row" else f"{n:,} {kind}" for kind, n in most)


def _sign(store: Store, data: ReportData, is_list: bool, seconds: float) -> SignedLinks:
    """Sign what the page links to."""
    if not is_list:
        return sign_links(store, [row["clip"] for row in data.clips if relative_link(row.get("clip"))], seconds)
    items = [item for item in listed_items(data.listed) if layout.ITEM_ID.fullmatch(item)]
    return sign_links(store, [path(item) for item in items for path in (layout.clip_path, layout.thumb_path)], seconds)


def _clips(data: ReportData, strips: list[Strip], is_list: bool, links: SignedLinks) -> str:
    """The clips as cards, which have a strip each, or an empty list, which a script fills."""
    total = f"{data.rendered:,}" if data.items == data.rendered else _rows_and_clips(data)
    head = f'<div class="head"><h2>Clips</h2><span class="soft">{total}</span></div>'
    if not data.clips:
        hidden = " shown here" if data.rendered else " yet. Finished clips appear here"
        return f'<section id="clips">{head}<p class="empty">No clips{hidden}.</p></section>'
    flags = "".join(
        f'<option value="={esc(flag)}">{esc(words(flag))} ({n:,})</option>' for flag, n in data.flags.most_common(40)
    )
    newest, slowest_first = ("done", "work") if is_list else ("new", "slow")
    orders = {"": "Flagged first", newest: "Newest first", slowest_first: "Slowest first"}
    orders |= {"size": "Largest first", "id": "By id"}
    sizes = "".join(
        f'<option value="{width}x{height}">{width} × {height} ({n:,})</option>'
        for (width, height), n in data.sizes.most_common(40)
    )
    options = "".join(f'<option value="{value}">{name}</option>' for value, name in orders.items())
    options += _measured_orders(data) if is_list else ""
    times = "".join(f'<option value="{seconds}">{name}</option>' for seconds, name in _TIMES.items())
    controls = (
        '<div class="controls" hidden>'
        '<input type="search" placeholder="Filter by words in id, prompt, flags …" '
        'aria-label="Filter clips by words"><select name="flag" aria-label="Filter by flag">'
        f'<option value="">With or without flags</option><option value="*">Flagged</option>{flags}</select>'
        f'<select name="status" aria-label="Filter by status">{status_options(data.rendered, data.failures)}</select>'
        f'<select name="time" aria-label="Filter by time">{times}</select>'
        f'<select name="size" aria-label="Filter by size"><option value="">All sizes</option>{sizes}</select>'
        f'<select name="sort" aria-label="Sort clips">{options}</select>'
        '<output aria-live="polite"></output></div>'
    )
    if is_list:
        shown, failed, clips = len(data.listed), len(data.failed), '<div class="list"></div>'
    else:
        slowest = max(sum(_timings(row).values()) for row in data.clips) or 1.0
        pairs = zip(data.clips, strips, strict=True)
        cards = "\n".join(_card(row, strip, slowest, links.urls.get(row.get("clip") or "")) for row, strip in pairs)
        others = data.failed[:_CARDS]
        shown, failed = len(data.clips), len(others)
        clips = f'<div class="clips">{cards}{failed_cards(others, statuses(data.failures))}</div>'
    more = data.rendered - shown
    notes = [f"{count(more, 'more row')} not shown here; all are in index/ and clips/."] if more else []
    notes += filter(None, [left_out(data.failures, failed)])
    return (
        f'<section id="clips">{head}{controls}{clips}{"".join(f"<p class=note>{note}</p>" for note in notes)}</section>'
    )


def _measured_orders(data: ReportData) -> str:
    """The orders of a list by what was measured of its clips."""
    ways = {"+": "least first", "-": "most first"}
    options = [
        f'<option value="{way}{name}">{MEASURES[name].title}, {title}</option>'
        for name in measured_columns(data.listed) for way, title in ways.items()
    ]  # fmt: skip
    return f'<optgroup label="By what was measured">{"".join(options)}</optgroup>' if options else ""


def _card(row: dict[str, Any], strip: Strip, slowest: float, signed: str | None) -> str:
    name, href = esc(row.get("id") or row.get("item_id") or "?"), relative_link(row.get("clip"))
    href = esc(signed) if signed else href
    flags, images, loras = (row.get(column) or [] for column in ("flags", "images", "loras"))
    timings, seconds, rate = _timings(row), clip_length(row), finite(row.get("frame_rate"))
    total, finished = sum(timings.values()), finished_at(row)
    facts = [
        f"{row['width']} × {row['height']}" if row.get("width") and row.get("height") else "",
        count(row["num_frames"], "frame") if isinstance(row.get("num_frames"), int) else "",
        f"{rate:.5g} fps" if rate else "",
        f"{seconds:.2f} s" if seconds else "",
        f"seed {row['seed']}" if row.get("seed") is not None else "",
        row.get("pipeline"),
        count(len(images), "image") if images else "",
    ]
    attempts = row.get("attempts") or 1
    badges = "".join(_badge(words(flag), "warn") for flag in flags)
    badges += _badge(f"{attempts} attempts") if attempts > 1 else ""
    badges += _badge("damaged file", "bad") if strip.problem and href else ""
    widths = {stage: f"{100 * t / slowest:.2f}%" for stage, t in timings.items() if t}
    bars = "".join(f'<i class="k-{stage}" style="width:{width}"></i>' for stage, width in widths.items())
    legend = "".join(f'<span><i class="k-{s}"></i>{STAGE_NAMES[s]} {human(t)}</span>' for s, t in timings.items())
    times = f'<div class="times" aria-hidden="true">{bars}</div>'
    times += f'<p class="timing">{legend}<b>{human(total)}</b></p>'
    replicas = [row.get("stage1_replica"), row.get("stage2_replica")]
    details = {
        "negative prompt": str(row.get("negative_prompt") or "")[:2000],
        "steps": row.get("num_inference_steps"),
        "guidance": f"video cfg {row['video_cfg_scale']:g}" if finite(row.get("video_cfg_scale")) else "",
        "loras": ", ".join(f"{lora.get('name')} × {finite(lora.get('strength')) or 0:g}" for lora in loras),
        "images": ", ".join(f"{image.get('path')} at frame {image.get('frame_idx')}" for image in images),
        "replicas": " → ".join(str(replica) for replica in replicas if replica is not None),
        "switches": row.get("switches") or "",
        **measure_lines(row),
        "GPU time": human(finite(row.get("gpu_seconds"))) if row.get("gpu_seconds") else "",
        "device": row.get("device"),
        "finished": when(finished) if finished else "",
        "item": row.get("item_id"),
        "latents": row.get("latents_sha256"),
        "clip": row.get("clip_sha256"),
        "problem": strip.problem if strip.frames else "",
    }
    listed = _list({key: value for key, value in details.items() if value}, "")
    title = f'<a href="{href}">{name}</a>' if href else name
    width, height = finite(row.get("width")) or 0, finite(row.get("height")) or 0
    size, pixels = f"{width:.0f}x{height:.0f}", width * height * (finite(row.get("num_frames")) or 0)
    return (
        f'<article class="clip" data-id="{name}" data-size="{size}" data-pixels="{pixels:.0f}" '
        f'data-work="{total:.3f}" data-done="{finished:.0f}" '
        f'data-flags="{esc(json.dumps(flags, ensure_ascii=False)) if flags else ""}">{strip.html(name, href)}'
        f'<div class="body"><div class="row"><h3>{title}</h3>{badges}</div>{_prompt(row.get("prompt"))}'
        f'<p class="facts">{"".join(f"<span>{esc(fact)}</span>" for fact in facts if fact)}</p>'
        f"{times if total else ''}"
        f'<details class="fold"><summary>Details</summary>{listed}</details></div></article>'
    )


def _badge(text: str, tone: str = "") -> str:
    return f'<span class="badge {tone}">{esc(text)}</span>'


def _prompt(prompt: Any) -> str:
    """A prompt in its own writing direction. A long one is folded to three lines (wide characters count twice)."""
    text = str(prompt or "")
    shown = esc(text if len(text) <= 6000 else f"{text[:6000]} … ({len(text):,} characters in all)")
    if not text:
        return ""
    if len(text) + sum(ord(char) >= 0x2E80 for char in text[:400]) <= 190 and text.count("\n") < 3:
        return f'<p class="prompt" dir="auto">{shown}</p>'
    return f'<details class="prompt"><summary><span dir="auto">{shown}</span></summary></details>'


def _list(pairs: dict[str, Any], kind: str) -> str:
    rows = "".join(f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>" for name, value in pairs.items())
    return f'<dl class="{kind}">{rows}</dl>'


def _timings(row: dict[str, Any]) -> dict[str, float]:
    return {stage: max(0.0, finite(row.get(f"{stage}_seconds")) or 0.0) for stage in STAGE_NAMES}


def _pairs(value: Any) -> str:
    """{"torch": "2.11", ...} (or its JSON) as "torch 2.11 · ..."."""
    value = parse_json(value) if isinstance(value, str) else value
    value = value if isinstance(value, dict) else {}
    return " · ".join(f"{name} {part}" for name, part in value.items() if part is not None)
