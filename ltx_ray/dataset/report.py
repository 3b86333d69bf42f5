"""OUT/report.html: one self-contained page of a dataset: failures, what each pool did, a strip a clip.

Everything that reaches the page (prompts, ids, messages, paths, even run.json) is untrusted: text goes
through `esc`, links through `_href`, and the page's own policy forbids it to load anything.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import json
import math
import os
import re
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ltx_ray.dataset.thumbnails import Strip, make_strip
from ltx_ray.dataset.timeline import STAGES, esc, human, make_timeline
from ltx_ray.storage.store import Store

MAX_FAILURES = 300
STRIP_BYTES = 72_000  # of one clip, at most
PAGE_STRIP_BYTES = 24_000_000  # of all clips together
_INDEX_COLUMNS = (
    "id prompt negative_prompt seed height width num_frames frame_rate num_inference_steps video_cfg_scale "
    "pipeline images loras item_id clip clip_sha256 latents_sha256 flags attempts stage1_replica "
    "stage2_replica switches text_seconds stage1_seconds stage2_seconds decode_seconds gpu_seconds device "
    "recipe_digest versions finished_at"
).split()
_FAILED_COLUMNS = "id prompt item_id stage attempts error_class message traceback source".split()


def write_report(output_dir: str, *, max_clips: int = 2000) -> str:
    """Write OUT/report.html and return its path (within OUT's filesystem).

    output_dir: OUT, a local folder or a URI that `Store` understands. Whatever is missing or damaged in it
    is said on the page. max_clips: how many clips get a card; flagged ones come first, then in order of
    finishing.
    Raises FileNotFoundError when there is no OUT, another OSError when the page cannot be written.
    """
    store = Store(output_dir)
    if not store.exists(""):
        raise FileNotFoundError(f"{output_dir}: there is no dataset")
    data = _read(store, max_clips)
    strips = _strips(store, data.clips)
    template = resources.files(__package__).joinpath("report_template.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "script_hash": f"sha256-{digest}",
        "title": esc(f"{data.run.get('run_id') or 'dataset'} · ltx-ray report"),
        "header": _header(data, strips),
        "failures": _failures(data),
        "timeline": make_timeline(data.events),
        "clips": _gallery(data, strips),
        "footer": f"Written by ltx-ray, {esc(_when(time.time()))}. This page loads nothing from "
        "anywhere; clip names link to the files beside it.",
    }
    # One pass, so that a "{{...}}" inside a prompt stays what it is.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
    store.write_bytes("report.html", page.encode("utf-8", "replace"))
    return store.path("report.html")


# ---------------------------------------------------------------- reading


@dataclass
class _Data:
    """What the page shows. clips and failed are capped; the counters and sums are over everything."""

    run: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    clips: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    rendered: int = 0
    flags: Counter = field(default_factory=Counter)
    flagged: int = 0
    failures: Counter = field(default_factory=Counter)  # by (error class, stage)
    since_rendered: int = 0
    clip_seconds: float = 0.0
    gpu_seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def _read(store: Store, max_clips: int) -> _Data:
    data = _Data()
    run = _json(_text(store, "run.json", data.problems))
    data.run = run if isinstance(run, dict) else {}
    data.events = _read_events(_text(store, "events.jsonl", data.problems) or "", data.problems)
    failed = list(_rows(store, "failed", _FAILED_COLUMNS, data.problems))
    failed_items, rendered_items, seen = {row.get("item_id") for row in failed}, set(), set()

    def indexed() -> Iterator[tuple[tuple, dict]]:
        for row in _rows(store, "index", _INDEX_COLUMNS, data.problems):
            item, flags = row.get("item_id"), row.get("flags") or []
            data.rendered += 1
            data.flagged += bool(flags)
            data.flags.update(flags)
            if item not in seen:  # rows that share an item were rendered once
                seen.add(item)
                data.clip_seconds += _duration(row) or 0
                data.gpu_seconds += _number(row.get("gpu_seconds")) or 0
            if item and item in failed_items:
                rendered_items.add(item)
            yield (not flags, _done(row), str(row.get("id")), data.rendered), row

    data.clips = [row for _, row in heapq.nsmallest(max_clips, indexed(), key=lambda pair: pair[0])]
    data.since_rendered = sum(row.get("item_id") in rendered_items for row in failed)
    failed = [row for row in failed if row.get("item_id") not in rendered_items]
    data.failures.update((str(row.get("error_class")), str(row.get("stage"))) for row in failed)
    data.failed = failed[:MAX_FAILURES]
    return data


def _rows(store: Store, folder: str, columns: list[str], problems: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of every part-*.parquet of `folder`, with those of `columns` that it has."""
    for name in store.list_names(folder):
        if not (name.startswith("part-") and name.endswith(".parquet")):
            continue
        try:
            with pq.ParquetFile(store.fs.open_input_file(store.path(f"{folder}/{name}"))) as file:
                present = [column for column in columns if column in file.schema_arrow.names]
                for batch in file.iter_batches(1024, columns=present):
                    yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            problems.append(f"{folder}/{name} cannot be read: {_first_line(error)}")


def _text(store: Store, name: str, problems: list[str]) -> str | None:
    try:
        return store.read_bytes(name).decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{name} cannot be read: {_first_line(error)}")
        return None


def _read_events(text: str, problems: list[str]) -> list[dict[str, Any]]:
    """Events of the newest run in order of the file; malformed lines are counted and skipped."""
    events, bad = [], 0
    for line in text.splitlines():
        event = _json(line)
        good = isinstance(event, dict) and isinstance(event.get("event"), str)
        if good and _number(event.get("t")) is not None:
            if event["event"] == "run_started":
                events = []
            events.append(event)
        else:
            bad += bool(line.strip())
    if bad:
        problems.append(f"events.jsonl: {bad:,} malformed line{'s' * (bad > 1)} skipped")
    return events


def _strips(store: Store, clips: list[dict[str, Any]]) -> list[Strip]:
    """A strip for every clip, in order, all together within PAGE_STRIP_BYTES."""
    budget = min(STRIP_BYTES, PAGE_STRIP_BYTES // max(1, len(clips)))

    def one(row: dict[str, Any]) -> Strip:
        if not row.get("clip"):
            return Strip((), None, "no clip: the run stopped after stage 1, only its latents were kept")
        if _href(row["clip"]) is None:
            return Strip((), None, f"not a path inside the dataset: {row['clip']}")
        try:
            with store.fs.open_input_file(store.path(row["clip"])) as file:
                return make_strip(file, seconds=_duration(row), budget=budget)
        except FileNotFoundError:
            return Strip((), None, f"{row['clip']} is missing")
        except OSError as error:
            return Strip((), None, f"{row['clip']} cannot be read: {_first_line(error)}")

    with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:  # PyAV decodes outside the GIL
        return list(pool.map(one, clips))


# ---------------------------------------------------------------- page


def _header(data: _Data, strips: list[Strip]) -> str:
    run, first = data.run, data.clips[0] if data.clips else {}
    counts = run.get("counts") if isinstance(run.get("counts"), dict) else {}
    failed = sum(data.failures.values())
    begun, ended = _epoch(run.get("started_at")), _epoch(run.get("finished_at"))
    times = [_number(event["t"]) for event in data.events]
    begun, ended = begun or (min(times) if times else None), ended or (max(times) if times else None)
    wall = ended - begun if begun and ended and ended > begun else None
    fresh = _number(counts.get("rendered"))
    fresh = data.rendered if fresh is None else fresh
    if not data.rendered and not failed:
        title = "Nothing rendered"
    elif not failed:
        title = f"{_count(data.rendered, 'clip')} rendered, none failed"
    else:
        title = f"{_count(data.rendered, 'clip')} rendered, {failed:,} failed"
    state = str(run.get("state") or "")
    rows = f"of {counts['rows']:,} rows in the manifest" if isinstance(counts.get("rows"), int) else ""
    each = f"{data.gpu_seconds / data.clip_seconds:,.1f} s a second of video" if data.clip_seconds else ""
    flags = ", ".join(f"{n:,} {_words(flag)}" for flag, n in data.flags.most_common(3))
    rate = f"{fresh / wall * 3600:,.0f} / h" if wall and fresh else "–"
    link = '<a href="#failures">Failed</a>'
    tiles = [
        ('<a href="#clips">Rendered</a>', f"{data.rendered:,}", rows, ""),
        (link if failed else "Failed", f"{failed:,}", _failed_kinds(data), "bad" if failed else ""),
        ("Flagged", f"{data.flagged:,}", flags, "warn" if data.flagged else ""),
        ("Video", human(data.clip_seconds or None), "total length of the clips", ""),
        ("Wall time", human(wall), "of the newest run", ""),
        ("GPU time", human(data.gpu_seconds or None), each if data.gpu_seconds else "", ""),
        ("Throughput", rate, "clips, newest run", ""),
    ]
    about = {
        "Recipe": run.get("recipe_digest") or first.get("recipe_digest"),
        "Device": run.get("device") or first.get("device"),
        "Pools": _pairs(run.get("pools")) + (f" · tp {run['tp']}" if run.get("tp") else ""),
        "Versions": _pairs(run.get("versions") or first.get("versions")),
        "Manifest": run.get("manifest"),
    }
    folded = ("command", "output", "numerics", "recipe", "counts")
    folded = {name: run[name] for name in folded if run.get(name)}
    folded = json.dumps(folded, indent=2, ensure_ascii=False, default=str) if folded else ""
    problems = data.problems[:20]
    pairs = zip(data.clips, strips, strict=True)
    bad = [str(row.get("id")) for row, strip in pairs if row.get("clip") and strip.problem]
    if bad:
        names = ", ".join(bad[:8]) + " …" * (len(bad) > 8)
        problems.append(f"{_count(len(bad), 'clip')} of the index missing or damaged: {names}")
    eyebrow = [
        f'<span class="state {esc(state)}">{esc(state)}</span>' if state else "",
        "<span>ltx-ray</span>",
        f'<span class="mono">{esc(run["run_id"])}</span>' if run.get("run_id") else "",
        f"<span>{esc(_when(begun))}</span>" if begun else "",
    ]
    return "\n".join([
        f'<p class="eyebrow">{"".join(eyebrow)}</p><h1>{title}</h1>',
        '<dl class="tiles">',
        *(f'<div><dt>{name}</dt><dd class="{tone}">{esc(value)}<span class="sub">{esc(sub)}</span></dd></div>'
          for name, value, sub, tone in tiles),
        "</dl>",
        _list({name: value for name, value in about.items() if value}, "about"),
        '<details class="more"><summary>Command, numerics and recipe</summary>'
        f"<pre>{esc(folded)}</pre></details>" if folded else "",
        *(f'<p class="note">{esc(problem)}</p>' for problem in problems),
    ])  # fmt: skip


def _failed_kinds(data: _Data) -> str:
    kinds = Counter()
    for (kind, _), number in data.failures.items():
        kinds[kind] += number
    most = kinds.most_common()
    return ", ".join(_count(n, "row error") if kind == "row" else f"{n:,} {kind}" for kind, n in most)


def _failures(data: _Data) -> str:
    total = sum(data.failures.values())
    if not total and not data.since_rendered:
        return ""
    by_stage = Counter()
    for (_, stage), number in data.failures.items():
        by_stage[stage] += number
    kinds = "".join(_badge(f"{STAGES.get(stage, stage)}: {n:,}") for stage, n in by_stage.most_common(12))
    notes = []
    if total > len(data.failed):
        more = total - len(data.failed)
        notes.append(f"{more:,} more are not shown here; all are in failed/, which is itself a manifest.")
    if data.since_rendered:
        notes.append(f"{_count(data.since_rendered, 'earlier failure')} rendered since, not listed.")
    return (
        f'<section id="failures"><div class="head"><h2>Failed rows</h2><span class="soft">{total:,}</span>'
        f"{kinds}</div>"
        + (f'<ol class="failures">{"".join(map(_failure, data.failed))}</ol>' if data.failed else "")
        + "".join(f'<p class="soft small after">{note}</p>' for note in notes)
        + "</section>"
    )


def _failure(row: dict[str, Any]) -> str:
    stage, kind = row.get("stage") or "?", str(row.get("error_class") or "unknown")
    attempts, source = row.get("attempts"), row.get("source")
    trace = str(row.get("traceback") or "")[-6000:]
    fold = '<details class="fold">'
    tried = _count(attempts, "attempt") if isinstance(attempts, int) and attempts else ""
    return (
        f'<li><div class="row"><h3 class="mono">{esc(row.get("id") or "(no id)")}</h3>'
        + _badge(STAGES.get(stage, stage), "bad")
        + _badge("row error" if kind == "row" else kind)
        + (f'<span class="soft small">{tried}</span>' if tried else "")
        + (f'<span class="soft small mono">{esc(source)}</span>' if source else "")
        + f'</div><p class="message" dir="auto">{esc(str(row.get("message") or "no message")[:2000])}</p>'
        + _prompt(row.get("prompt"))
        + (f"{fold}<summary>Traceback</summary><pre>{esc(trace)}</pre></details>" if trace else "")
        + "</li>"
    )


def _gallery(data: _Data, strips: list[Strip]) -> str:
    head = f'<div class="head"><h2>Clips</h2><span class="soft">{data.rendered:,}</span></div>'
    if not data.clips:
        hidden = " shown here" if data.rendered else " yet. Finished clips appear here"
        return f'<section id="clips">{head}<p class="empty">No clips{hidden}.</p></section>'
    flags = "".join(
        f'<option value="={esc(flag)}">{esc(_words(flag))} ({n:,})</option>' for flag, n in data.flags.most_common(40)
    )
    orders = {"": "Flagged first", "new": "Newest first", "slow": "Slowest first", "id": "By id"}
    orders = "".join(f'<option value="{value}">{name}</option>' for value, name in orders.items())
    controls = (
        '<div class="controls" hidden>'
        '<input type="search" placeholder="Filter by words in id, prompt, flags …" '
        'aria-label="Filter clips by words"><select name="flag" aria-label="Filter by flag">'
        f'<option value="">All clips</option><option value="*">Flagged</option>{flags}</select>'
        f'<select name="sort" aria-label="Sort clips">{orders}</select>'
        '<output aria-live="polite"></output></div>'
    )
    slowest = max(sum(_timings(row).values()) for row in data.clips) or 1.0
    cards = "\n".join(_card(row, strip, slowest) for row, strip in zip(data.clips, strips, strict=True))
    more = data.rendered - len(data.clips)
    note = f"{_count(more, 'more clip')} not shown here; all are in index/ and clips/."
    note = f'<p class="note">{note}</p>' if more else ""
    return f'<section id="clips">{head}{controls}<div class="clips">{cards}</div>{note}</section>'


def _card(row: dict[str, Any], strip: Strip, slowest: float) -> str:
    name, href = esc(row.get("id") or row.get("item_id") or "?"), _href(row.get("clip"))
    flags, images, loras = (row.get(column) or [] for column in ("flags", "images", "loras"))
    timings, seconds, rate = _timings(row), _duration(row), _number(row.get("frame_rate"))
    work, done = sum(timings.values()), _done(row)
    facts = [
        f"{row['width']} × {row['height']}" if row.get("width") and row.get("height") else "",
        _count(row["num_frames"], "frame") if isinstance(row.get("num_frames"), int) else "",
        f"{rate:.5g} fps" if rate else "",
        f"{seconds:.2f} s" if seconds else "",
        f"seed {row['seed']}" if row.get("seed") is not None else "",
        row.get("pipeline"),
        _count(len(images), "image") if images else "",
    ]
    attempts = row.get("attempts") or 1
    badges = "".join(_badge(_words(flag), "warn") for flag in flags)
    badges += _badge(f"{attempts} attempts") if attempts > 1 else ""
    badges += _badge("damaged file", "bad") if strip.problem and href else ""
    wide = {stage: f"{100 * t / slowest:.2f}%" for stage, t in timings.items() if t}
    bars = "".join(f'<i class="k-{stage}" style="width:{width}"></i>' for stage, width in wide.items())
    legend = "".join(f'<span><i class="k-{s}"></i>{STAGES[s]} {human(t)}</span>' for s, t in timings.items())
    times = f'<div class="times" aria-hidden="true">{bars}</div>'
    times += f'<p class="timing">{legend}<b>{human(work)}</b></p>'
    replicas = [row.get("stage1_replica"), row.get("stage2_replica")]
    details = {
        "negative prompt": str(row.get("negative_prompt") or "")[:2000],
        "steps": row.get("num_inference_steps"),
        "guidance": f"video cfg {row['video_cfg_scale']:g}" if _number(row.get("video_cfg_scale")) else "",
        "loras": ", ".join(f"{lora.get('name')} × {_number(lora.get('strength')) or 0:g}" for lora in loras),
        "images": ", ".join(f"{image.get('path')} at frame {image.get('frame_idx')}" for image in images),
        "replicas": " → ".join(str(replica) for replica in replicas if replica is not None),
        "switches": row.get("switches") or "",
        "GPU time": human(_number(row.get("gpu_seconds"))) if row.get("gpu_seconds") else "",
        "device": row.get("device"),
        "finished": _when(done) if done else "",
        "item": row.get("item_id"),
        "latents": row.get("latents_sha256"),
        "clip": row.get("clip_sha256"),
        "problem": strip.problem if strip.frames else "",
    }
    details = _list({key: value for key, value in details.items() if value}, "")
    title = f'<a href="{href}">{name}</a>' if href else name
    return (
        f'<article class="clip" data-id="{name}" data-work="{work:.3f}" data-done="{done:.0f}" '
        f'data-flags="{esc(json.dumps(flags, ensure_ascii=False)) if flags else ""}">{strip.html(name, href)}'
        f'<div class="body"><div class="row"><h3>{title}</h3>{badges}</div>{_prompt(row.get("prompt"))}'
        f'<p class="facts">{"".join(f"<span>{esc(fact)}</span>" for fact in facts if fact)}</p>'
        f"{times if work else ''}"
        f'<details class="fold"><summary>Details</summary>{details}</details></div></article>'
    )


def _badge(text: str, tone: str = "") -> str:
    return f'<span class="badge {tone}">{esc(text)}</span>'


def _prompt(prompt: Any) -> str:
    """A prompt in its own direction of writing; three lines of it when long (wide characters count twice)."""
    text = str(prompt or "")
    shown = esc(text if len(text) <= 6000 else f"{text[:6000]} … ({len(text):,} characters in all)")
    if not text:
        return ""
    if len(text) + sum(ord(char) >= 0x2E80 for char in text[:400]) <= 190 and text.count("\n") < 3:
        return f'<p class="prompt" dir="auto">{shown}</p>'
    return f'<details class="prompt"><summary><span dir="auto">{shown}</span></summary></details>'


# ---------------------------------------------------------------- small things


def _href(path: Any) -> str | None:
    """A relative link to a file inside OUT, or None for anything else (schemes, absolute paths, '..')."""
    if not isinstance(path, str) or path[:1] in ("", "/") or "\\" in path or ".." in path.split("/"):
        return None
    return urllib.parse.quote(path, safe="/", errors="replace")  # ":" is quoted, so no scheme survives


def _list(pairs: dict[str, Any], kind: str) -> str:
    rows = "".join(f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>" for name, value in pairs.items())
    return f'<dl class="{kind}">{rows}</dl>'


def _json(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None


def _number(value: Any) -> float | None:
    """A finite number as float, else None."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _duration(row: dict[str, Any]) -> float | None:
    """Length of a clip in seconds."""
    frames, rate = _number(row.get("num_frames")), _number(row.get("frame_rate"))
    return frames / rate if frames and rate and rate > 0 else None


def _timings(row: dict[str, Any]) -> dict[str, float]:
    return {stage: max(0.0, _number(row.get(f"{stage}_seconds")) or 0.0) for stage in STAGES}


def _pairs(value: Any) -> str:
    """{"torch": "2.11", ...} (or its JSON) as "torch 2.11 · ..."."""
    value = _json(value) if isinstance(value, str) else value
    value = value if isinstance(value, dict) else {}
    return " · ".join(f"{name} {part}" for name, part in value.items() if part is not None)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _words(flag: Any) -> str:
    return str(flag).replace("_", " ")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _epoch(value: Any) -> float | None:
    """Seconds since the epoch of an ISO time (without a zone: UTC) or of a number."""
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            return None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return _number(value)


def _done(row: dict[str, Any]) -> float:
    """When a clip was finished, in seconds since the epoch; 0 when it is not known."""
    done = row.get("finished_at")
    return done.timestamp() if isinstance(done, datetime) else 0.0


def _when(seconds: float) -> str:
    """Seconds since the epoch as a date and time for people."""
    try:
        moment = datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, OSError, ValueError):
        return "unknown time"
    return f"{moment.day} {moment.strftime('%B %Y, %H:%M')} UTC"
