"""The dataset's tables: `index/` with one row a finished manifest row, `failed/` with one a failed row.

A part holds one row and is named after its item and its row id, so that writing it twice changes
nothing and a listing of names says what is done. No torch here.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ltx_ray.dataset.layout import FAILED_SCHEMA, INDEX_SCHEMA, PREVIEW_SCHEMA, SECONDS_COLUMNS, index_part, row_key
from ltx_ray.manifest.columns import COLUMNS
from ltx_ray.manifest.reader import DUPLICATE, FAILED_ROW_COLUMN, UNREADABLE, RawRow
from ltx_ray.manifest.rules import resolved_values
from ltx_ray.records import Clip, RenderRequest, plain
from ltx_ray.storage.store import Store, split_options


@dataclass
class Rendered:
    """What is known of an item when it is finished; the rest of an index row."""

    clip: Clip
    attempts: int
    recipe: str
    recipe_digest: str
    numerics: str
    noise_ledger: str
    versions: str
    device: str
    seconds: Mapping[str, float]
    stage1_replica: str | None = None
    stage2_replica: str | None = None
    switches: int = 0
    extra_flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why a row has no clip. `error_class` is "row" (its own fault) or "infrastructure"."""

    stage: str
    attempts: int
    error_class: str
    message: str
    traceback: str = ""


class DatasetWriter:
    """Writes parts under the root of `store`."""

    def __init__(self, store: Store):
        self.store = store

    def write_index(self, item_id: str, request: RenderRequest, rendered: Rendered) -> None:
        """Publish the index row of a manifest row whose clip is complete; a failure of it is forgotten."""
        key = row_key(request.id)
        row = _rendered_row(item_id, request, rendered)
        self.store.write_bytes(f"index/{index_part(item_id, key)}", one_row(row, INDEX_SCHEMA))
        self.forget_failure(item_id, key)

    def write_preview(self, item_id: str, request: RenderRequest, raw: RawRow, rendered: Rendered) -> None:
        """Publish the row of a clip that stopped after stage 1; `clip` is that of its preview."""
        key = row_key(request.id)
        row = {
            **_rendered_row(item_id, request, rendered),
            "source": raw.source,
            FAILED_ROW_COLUMN: _resolved_row(request),
        }
        self.store.write_bytes(f"previews/{index_part(item_id, key)}", one_row(row, PREVIEW_SCHEMA))
        self.forget_failure(item_id, key)

    def copy_index_row(self, item_id: str, from_key: str, request: RenderRequest) -> None:
        """Give another manifest row the clip of an item that is done already."""
        row = {**self._row("index", item_id, from_key), "id": request.id, "extra": request.extra}
        key = row_key(request.id)
        self.store.write_bytes(f"index/{index_part(item_id, key)}", one_row(row, INDEX_SCHEMA))
        self.forget_failure(item_id, key)

    def copy_preview_row(self, item_id: str, from_key: str, request: RenderRequest, raw: RawRow) -> None:
        """Give another manifest row the preview of an item that has one already."""
        row = {
            **self._row("previews", item_id, from_key),
            "id": request.id,
            "extra": request.extra,
            "source": raw.source,
            FAILED_ROW_COLUMN: _resolved_row(request),
        }
        self.store.write_bytes(f"previews/{index_part(item_id, row_key(request.id))}", one_row(row, PREVIEW_SCHEMA))

    def _row(self, folder: str, item_id: str, key: str) -> dict[str, Any]:
        return read_part(self.store, f"{folder}/{index_part(item_id, key)}").to_pylist()[0]

    def write_failed(self, item_id: str, request: RenderRequest, raw: RawRow, failure: Failure) -> None:
        """Publish the failure of a legal row."""
        key = row_key(request.id)
        self.forget_failure(item_id, key)
        row = {**request.row(), "item_id": item_id, **_failure_columns(raw, failure)}
        row[FAILED_ROW_COLUMN] = _resolved_row(request)
        kind = "row" if failure.error_class == "row" else "infra"
        self.store.write_bytes(f"failed/part-{kind}-{item_id}-{key}.parquet", one_row(row, FAILED_SCHEMA))

    def write_illegal(self, raw: RawRow, messages: list[str]) -> str:
        """Publish the failure of an illegal row; what cannot stand in its column is left out there.

        Returns the part's name.
        """
        row: dict[str, Any] = {}
        for name, column in COLUMNS.items():
            try:
                value = raw.values.get(name)
                row[name] = None if value is None else plain(column.parse(value))
                pa.array([row[name]], type=column.type)
            except Exception:
                row[name] = None
        failure = Failure("plan", 0, "row", "\n".join(messages))
        row.update(_failure_columns(raw, failure))
        content = hashlib.sha256(row[FAILED_ROW_COLUMN].encode("utf-8", "surrogatepass")).hexdigest()
        name = f"part-illegal-{content[:32]}-{row_key(raw.source)}.parquet"
        self.store.write_bytes(f"failed/{name}", one_row(row, FAILED_SCHEMA))
        return name

    def forget_illegal(self, manifest: str, keep: set[str]) -> None:
        """Remove the illegal rows of `manifest` that are no longer among its illegal rows (`keep`).

        When the manifest is this dataset's own failed/, its rows are those of every manifest.
        """
        files = split_options(manifest)[0].rstrip("/")
        every = Store(manifest).root == self.store.path("failed")
        for name in self.store.list_names("failed"):
            if name.startswith("part-illegal-") and name not in keep:
                try:
                    table = read_part(self.store, f"failed/{name}", ["source"])
                except (FileNotFoundError, UnreadablePart):
                    continue
                file = (table.column(0)[0].as_py() or "").rpartition(":")[0]
                file = split_options(file)[0]
                if every or file == files or file.startswith(files + "/"):
                    self.store.delete(f"failed/{name}")

    def forget_older_failures(self, names: Iterable[str], source: str) -> None:
        """Remove those parts of `failed/` that are about the manifest row at `source`."""
        for name in names:
            try:
                table = read_part(self.store, f"failed/{name}", ["source"])
            except (FileNotFoundError, UnreadablePart):
                continue
            if table.column(0)[0].as_py() == source:
                self.store.delete(f"failed/{name}")

    def forget_failure(self, item_id: str, key: str) -> None:
        for kind in ("row", "infra"):
            self.store.delete(f"failed/part-{kind}-{item_id}-{key}.parquet")


class UnreadablePart(OSError):
    """A part of the dataset that is no Parquet file; the message names it."""


def read_part(store: Store, name: str, columns: list[str] | None = None) -> pa.Table:
    """A part of the dataset. Raises FileNotFoundError, and UnreadablePart for one that is damaged."""
    data = store.read_bytes(name)
    try:
        return pq.read_table(io.BytesIO(data), columns=columns)
    except pa.ArrowException as error:
        raise UnreadablePart(
            f"{store.uri}/{name} is damaged ({error}); ltx-ray verify --repair sets it aside"
        ) from None


def _rendered_row(item_id: str, request: RenderRequest, rendered: Rendered) -> dict[str, Any]:
    return {
        **request.row(),
        "item_id": item_id,
        "clip": rendered.clip.path,
        "clip_sha256": rendered.clip.sha256,
        "latents_sha256": rendered.clip.latents_sha256,
        "audio_stage": rendered.clip.audio_stage,
        "flags": [*rendered.clip.flags, *rendered.extra_flags],
        "attempts": rendered.attempts,
        "stage1_replica": rendered.stage1_replica,
        "stage2_replica": rendered.stage2_replica,
        "switches": rendered.switches,
        **{name: float(rendered.seconds.get(name, 0.0)) for name in SECONDS_COLUMNS},
        "device": rendered.device,
        "numerics": rendered.numerics,
        "recipe": rendered.recipe,
        "recipe_digest": rendered.recipe_digest,
        "noise_ledger": rendered.noise_ledger,
        "versions": rendered.versions,
        "finished_at": datetime.datetime.now(datetime.UTC),
    }


def _resolved_row(request: RenderRequest) -> str:
    """The manifest row as it was resolved, so that it gives the very same clip without the run's defaults."""
    return _json(resolved_values(request))


def _failure_columns(raw: RawRow, failure: Failure) -> dict[str, Any]:
    values = {**raw.values} if raw.unreadable is None else {UNREADABLE: raw.unreadable}
    return {
        "source": raw.source,
        "stage": failure.stage,
        "attempts": failure.attempts,
        "error_class": failure.error_class,
        "message": failure.message,
        "traceback": failure.traceback,
        "failed_at": datetime.datetime.now(datetime.UTC),
        FAILED_ROW_COLUMN: _json({**values, DUPLICATE: True} if raw.duplicate else values),
    }


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=True, default=str, sort_keys=True)


def one_row(row: Mapping[str, Any], schema: pa.Schema) -> bytes:
    """A Parquet file of one row; columns that it lacks are null."""
    complete = {name: row.get(name) for name in schema.names}
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([complete], schema=schema), buffer, compression="zstd")
    return buffer.getvalue()
