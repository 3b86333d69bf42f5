"""What the report shows of a dataset, read from its files. Damage is noted in `problems` and never raised."""

from __future__ import annotations

import contextlib
import hashlib
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
from ltx_ray.dataset.quality import QualitySums
from ltx_ray.dataset.report_failures import FailureGroups
from ltx_ray.dataset.report_list import Listed, Smallest, listed
from ltx_ray.dataset.report_status import FailedRow, failed_row
from ltx_ray.dataset.report_text import finite, short
from ltx_ray.dataset.report_throughput import COUNTED_SECONDS
from ltx_ray.dataset.run_summary import RecordedRun, read_run
from ltx_ray.dataset.thumbnails import Strip, make_strip, read_sheet, sheet_of
from ltx_ray.storage.id_table import IdTable
from ltx_ray.storage.lease import holder
from ltx_ray.storage.store import Store

#: Most clips that the report decodes, of those that have no picture of a worker's.
MAX_DECODED = 2000
#: Most bytes of pictures for one clip, and for all clips together.
STRIP_BYTES, PAGE_STRIP_BYTES = 72_000, 24_000_000
_INDEX_COLUMNS = (
    "id prompt negative_prompt seed height width num_frames frame_rate num_inference_steps video_cfg_scale "
    "pipeline images loras item_id clip clip_sha256 latents_sha256 flags attempts stage1_replica "
    "stage2_replica switches text_seconds stage1_seconds stage2_seconds decode_seconds gpu_seconds device "
    "recipe_digest versions finished_at motion sharpness loudness_lufs "
    "clipped_samples mean_luma cuts"
).split()
_FAILED_COLUMNS = (
    "id prompt item_id stage attempts error_class message traceback source failed_at seed height width num_frames "
    "frame_rate"
).split()


@dataclass
class ReportData:
    """What the page shows. `clips`, `listed` and `failed` are capped; counts and sums are over the whole dataset."""

    run: RecordedRun
    clips: list[dict[str, Any]] = field(default_factory=list)
    #: More of them, as far as the list of a large dataset shows them.
    listed: list[Listed] = field(default_factory=list)
    rendered: int = 0
    #: Items of them: rows of one item share its clip.
    items: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    flagged: int = 0
    #: Rows by width and height.
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    #: Clips by when they were finished, in COUNTED_SECONDS since the epoch.
    finished: Counter[int] = field(default_factory=Counter)
    failures: FailureGroups = field(default_factory=FailureGroups)
    failed: list[FailedRow] = field(default_factory=list)
    #: Failed rows whose item has been rendered since.
    since_rendered: int = 0
    clip_seconds: float = 0.0
    gpu_seconds: float = 0.0
    #: What was measured of all clips.
    quality: QualitySums = field(default_factory=QualitySums)
    problems: list[str] = field(default_factory=list)


def read_report_data(store: Store, max_listed: int) -> ReportData:
    """Read the dataset, each part once.

    `clips` holds up to MAX_DECODED rows and `listed` up to `max_listed`: flagged ones first, then in the order of
    finishing.
    """
    problems: list[str] = []
    record = parse_json(_text(store, layout.RUN_RECORD, problems))
    now = time.time() if holder(store) is not None else None
    run = read_run(store, record if isinstance(record, dict) else {}, now, note=problems.append)
    data = ReportData(run, problems=problems)
    rendered = _ItemIds()
    _read_index(store, data, max_listed, rendered)
    for row in _rows(store, layout.FAILED, _FAILED_COLUMNS, problems):
        if row.get("item_id") and rendered.has(row["item_id"]):
            data.since_rendered += 1
            continue
        data.failures.add(row)
        if len(data.failed) < max_listed:
            data.failed.append(failed_row(row, finished_at(row, "failed_at")))
    return data


def _read_index(store: Store, data: ReportData, max_listed: int, rendered: _ItemIds) -> None:
    """Take in every row of the index, and add its item to `rendered`."""
    clips: Smallest[dict[str, Any]] = Smallest(MAX_DECODED)
    lines: Smallest[Listed] = Smallest(max_listed)
    for row in read_index_rows(store, data.problems):
        flags, done = row.get("flags") or [], finished_at(row)
        data.rendered += 1
        data.flagged += bool(flags)
        data.flags.update(map(str, flags))
        if isinstance(row.get("width"), int) and isinstance(row.get("height"), int):
            data.sizes[row["width"], row["height"]] += 1
        if rendered.add(row.get("item_id")):  # rows of one item share its clip
            data.items += 1
            data.clip_seconds += clip_length(row) or 0
            data.gpu_seconds += finite(row.get("gpu_seconds")) or 0
            data.quality.add(row, flags)
            if done:
                data.finished[int(done // COUNTED_SECONDS)] += 1
        key = (not flags, done, str(row.get("id")), data.rendered)
        if clips.takes(key):
            clips.add(key, row)
        if lines.takes(key):
            lines.add(key, listed(row, relative_link(row.get("clip")), done))
    data.clips, data.listed = clips.values(), lines.values()


def read_index_rows(store: Store, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of the index with the columns that pages show."""
    return _rows(store, layout.INDEX, _INDEX_COLUMNS, problems)


class _ItemIds:
    """A set of item_ids, which may be any text, at some 16 bytes each."""

    def __init__(self) -> None:
        self._table = IdTable(16, cap=None)

    def add(self, item_id: Any) -> bool:
        """Whether it is new."""
        head, rest = self._halves(item_id)
        if self._table.has(head, rest):
            return False
        self._table.put(head, rest)
        self._table.settle()
        return True

    def has(self, item_id: Any) -> bool:
        return self._table.has(*self._halves(item_id))

    def _halves(self, item_id: Any) -> tuple[bytes, bytes]:
        digest = hashlib.blake2b(str(item_id).encode("utf-8", "replace"), digest_size=16).digest()
        return digest[:8], digest[8:]


def make_strips(store: Store, clips: list[dict[str, Any]]) -> list[Strip]:
    """A strip for every clip, in order. Together they have at most PAGE_STRIP_BYTES."""
    budget = min(STRIP_BYTES, PAGE_STRIP_BYTES // max(1, len(clips)))

    def one(row: dict[str, Any]) -> Strip:
        if not row.get("clip"):
            return Strip((), None, "no clip: the run stopped after stage 1 and saved only latents")
        if relative_link(row["clip"]) is None:
            return Strip((), None, f"not a path inside the dataset: {row['clip']}")
        try:
            if (strip := _of_sheet(store, row, budget)) is not None:
                return strip
            with store.fs.open_input_file(store.path(row["clip"])) as file:
                return make_strip(file, seconds=clip_length(row), budget=budget)
        except FileNotFoundError:
            return Strip((), None, f"{row['clip']} is missing")
        except OSError as error:
            return Strip((), None, f"{row['clip']} cannot be read: {short(error)}")

    with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:  # PyAV decodes outside the GIL
        return list(pool.map(one, clips))


def make_missing_sheets(store: Store, clips: list[dict[str, Any]]) -> None:
    """Make the pictures that workers have not made, in `thumbs/`. Clips that cannot be decoded have none."""

    def make(row: dict[str, Any]) -> None:
        item_id = str(row.get("item_id"))
        if layout.ITEM_ID.fullmatch(item_id) is None or relative_link(row.get("clip")) is None:
            return
        with contextlib.suppress(OSError):
            if store.size(layout.thumb_path(item_id)):
                return
            with store.fs.open_input_file(store.path(row["clip"])) as file:
                strip = make_strip(file, seconds=clip_length(row))
            if strip.frames:
                store.write_bytes(layout.thumb_path(item_id), sheet_of(strip))

    with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
        list(pool.map(make, clips))


def _of_sheet(store: Store, row: dict[str, Any], budget: int) -> Strip | None:
    """The strip that the worker made of a clip as it decoded it; None where there is none, or no clip."""
    item_id = str(row.get("item_id"))
    if layout.ITEM_ID.fullmatch(item_id) is None:
        return None
    try:
        strip = read_sheet(store.read_bytes(layout.thumb_path(item_id)), budget)
    except FileNotFoundError:
        return None
    return strip if strip is not None and store.size(row["clip"]) else None


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


def finished_at(row: dict[str, Any], column: str = "finished_at") -> float:
    """When a clip was finished, in seconds since the epoch; 0 when that is unknown."""
    finished = row.get(column)
    return finished.timestamp() if isinstance(finished, datetime) else 0.0
