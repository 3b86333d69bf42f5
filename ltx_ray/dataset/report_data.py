"""What the report shows of a dataset, read from its files. Damage is noted in `problems` and never raised."""

from __future__ import annotations

import heapq
import json
import os
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ltx_ray.dataset import layout
from ltx_ray.dataset.report_text import finite, short
from ltx_ray.dataset.thumbnails import Strip, make_strip
from ltx_ray.storage.lease import holder
from ltx_ray.storage.store import Store

#: Most failed rows that are listed.
MAX_FAILURES = 300
#: Most bytes of pictures for one clip, and for all clips together.
STRIP_BYTES, PAGE_STRIP_BYTES = 72_000, 24_000_000
_INDEX_COLUMNS = (
    "id prompt negative_prompt seed height width num_frames frame_rate num_inference_steps video_cfg_scale "
    "pipeline images loras item_id clip clip_sha256 latents_sha256 flags attempts stage1_replica "
    "stage2_replica switches text_seconds stage1_seconds stage2_seconds decode_seconds gpu_seconds device "
    "recipe_digest versions finished_at"
).split()
_FAILED_COLUMNS = "id prompt item_id stage attempts error_class message traceback source".split()


@dataclass
class ReportData:
    """What the page shows. `clips` and `failed` are capped; counts and sums are over the whole dataset."""

    run: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    clips: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    rendered: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    flagged: int = 0
    #: Number of failed rows by (error class, stage).
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    #: Failed rows whose item has been rendered since.
    since_rendered: int = 0
    clip_seconds: float = 0.0
    gpu_seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    #: When the dataset was read, in seconds since the epoch, if a run is writing into it.
    now: float | None = None


def read_report_data(store: Store, max_clips: int) -> ReportData:
    """Read the dataset. `clips` holds up to `max_clips` rows: flagged ones first, then in the order of finishing."""
    data = ReportData()
    run = parse_json(_text(store, layout.RUN_RECORD, data.problems))
    data.run = run if isinstance(run, dict) else {}
    data.now = time.time() if holder(store) is not None else None
    data.events = _read_events(_text(store, layout.EVENTS, data.problems) or "", data.problems)
    failed_items = {row.get("item_id") for row in _rows(store, layout.FAILED, ["item_id"], [])}
    rendered_items: set[str] = set()
    seen: set[str | None] = set()

    def indexed() -> Iterator[tuple[tuple[bool, float, str, int], dict[str, Any]]]:
        for row in _rows(store, layout.INDEX, _INDEX_COLUMNS, data.problems):
            item_id, flags = row.get("item_id"), row.get("flags") or []
            data.rendered += 1
            data.flagged += bool(flags)
            data.flags.update(flags)
            if item_id not in seen:  # rows of one item share its clip
                seen.add(item_id)
                data.clip_seconds += clip_length(row) or 0
                data.gpu_seconds += finite(row.get("gpu_seconds")) or 0
            if item_id and item_id in failed_items:
                rendered_items.add(item_id)
            yield (not flags, finished_at(row), str(row.get("id")), data.rendered), row

    data.clips = [row for _, row in heapq.nsmallest(max_clips, indexed(), key=lambda pair: pair[0])]
    # Read once more, because tracebacks of all failed rows would take much memory.
    for row in _rows(store, layout.FAILED, _FAILED_COLUMNS, data.problems):
        if row.get("item_id") in rendered_items:
            data.since_rendered += 1
            continue
        data.failures[str(row.get("error_class")), str(row.get("stage"))] += 1
        if len(data.failed) < MAX_FAILURES:
            data.failed.append(row)
    return data


def make_strips(store: Store, clips: list[dict[str, Any]]) -> list[Strip]:
    """A strip for every clip, in order. Together they have at most PAGE_STRIP_BYTES."""
    budget = min(STRIP_BYTES, PAGE_STRIP_BYTES // max(1, len(clips)))

    def one(row: dict[str, Any]) -> Strip:
        if not row.get("clip"):
            return Strip((), None, "no clip: the run stopped after stage 1 and saved only latents")
        if relative_link(row["clip"]) is None:
            return Strip((), None, f"not a path inside the dataset: {row['clip']}")
        try:
            with store.fs.open_input_file(store.path(row["clip"])) as file:
                return make_strip(file, seconds=clip_length(row), budget=budget)
        except FileNotFoundError:
            return Strip((), None, f"{row['clip']} is missing")
        except OSError as error:
            return Strip((), None, f"{row['clip']} cannot be read: {short(error)}")

    with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:  # PyAV decodes outside the GIL
        return list(pool.map(one, clips))


def _rows(store: Store, folder: str, columns: list[str], problems: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of every part of `folder`, with those of `columns` that the part has."""
    for name in filter(layout.is_part, store.list_names(folder)):
        try:
            opened = store.fs.open_input_file(store.path(f"{folder}/{name}"))
            with pq.ParquetFile(opened, pre_buffer=False) as file:
                present = [column for column in columns if column in file.schema_arrow.names]
                for batch in file.iter_batches(1024, columns=present, use_threads=False):
                    yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            problems.append(f"{folder}/{name} cannot be read: {short(error)}")


def _text(store: Store, name: str, problems: list[str]) -> str | None:
    try:
        return store.read_bytes(name).decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{name} cannot be read: {short(error)}")
        return None


def _read_events(text: str, problems: list[str]) -> list[dict[str, Any]]:
    """Events of the newest run, in the order of the file. Malformed lines are counted and skipped."""
    events: list[dict[str, Any]] = []
    bad = 0
    for line in text.splitlines():
        event = parse_json(line)
        good = isinstance(event, dict) and isinstance(event.get("event"), str)
        if good and finite(event.get("t")) is not None:
            if event["event"] == "run_started":
                events = []
            events.append(event)
        else:
            bad += bool(line.strip())
    if bad:
        problems.append(f"{layout.EVENTS}: {bad:,} malformed line{'s' * (bad > 1)} skipped")
    return events


def relative_link(path: Any) -> str | None:
    """A relative link to a file inside the output; None for anything else (schemes, absolute paths, '..')."""
    if not isinstance(path, str) or path[:1] in ("", "/") or "\\" in path or ".." in path.split("/"):
        return None
    return urllib.parse.quote(path, safe="/", errors="replace")  # ":" is quoted, so no scheme survives


def parse_json(text: Any) -> Any:
    """The parsed text; None when it is not JSON."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None


def clip_length(row: dict[str, Any]) -> float | None:
    """Length of a clip in seconds."""
    frames, rate = finite(row.get("num_frames")), finite(row.get("frame_rate"))
    return frames / rate if frames and rate and rate > 0 else None


def finished_at(row: dict[str, Any]) -> float:
    """When a clip was finished, in seconds since the epoch; 0 when that is unknown."""
    finished = row.get("finished_at")
    return finished.timestamp() if isinstance(finished, datetime) else 0.0
