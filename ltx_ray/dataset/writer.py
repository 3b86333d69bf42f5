"""The dataset's tables: index/ with one row per finished manifest row, failed/ with one per failed row. No torch.

A part holds one row and is named after its item_id and its row's id. Writing it twice changes nothing, and a listing
of names says what is done.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ltx_ray.dataset import layout
from ltx_ray.dataset.layout import FAILED_SCHEMA, INDEX_SCHEMA, PREVIEW_SCHEMA, SECONDS_COLUMNS, row_key
from ltx_ray.manifest.columns import COLUMNS
from ltx_ray.manifest.raw import FAILED_ROW_COLUMN, RawRow
from ltx_ray.manifest.rules import resolved_values
from ltx_ray.records import Clip, RenderRequest, plain
from ltx_ray.storage.credentials import masked
from ltx_ray.storage.locations import join, recorded, recorded_image, resolve, split_options
from ltx_ray.storage.parquet import read_parquet
from ltx_ray.storage.store import Store


@dataclass(frozen=True)
class Rendered:
    """The columns of an index row that are known when the item is finished. `seconds`: see SECONDS_COLUMNS."""

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
    """Writes the parts of the dataset at `store`."""

    def __init__(self, store: Store):
        self.store = store

    def write_index(self, item_id: str, request: RenderRequest, rendered: Rendered) -> None:
        """Publish the index row of a manifest row whose clip is complete, and remove an older failure of it."""
        key = row_key(request.id)
        row = _rendered_row(item_id, request, rendered)
        self.store.write_bytes(layout.index_path(item_id, key), one_row(row, INDEX_SCHEMA))
        self.forget_failure(item_id, key)

    def write_preview(self, item_id: str, request: RenderRequest, raw: RawRow, rendered: Rendered) -> None:
        """Publish the row of an item that stopped after stage 1; its `clip` is the preview."""
        key = row_key(request.id)
        row = {
            **_rendered_row(item_id, request, rendered),
            "source": raw.source,
            FAILED_ROW_COLUMN: _resolved_row(request),
        }
        self.store.write_bytes(layout.preview_row_path(item_id, key), one_row(row, PREVIEW_SCHEMA))
        self.forget_failure(item_id, key)

    def copy_index_row(self, item_id: str, from_key: str, request: RenderRequest) -> None:
        """Publish the index row of another manifest row of a finished item, from its row with key `from_key`."""
        row = {**self._row(layout.index_path(item_id, from_key)), "id": request.id, "extra": request.extra}
        key = row_key(request.id)
        self.store.write_bytes(layout.index_path(item_id, key), one_row(row, INDEX_SCHEMA))
        self.forget_failure(item_id, key)

    def copy_preview_row(self, item_id: str, from_key: str, request: RenderRequest, raw: RawRow) -> None:
        """The same for an item that has a preview."""
        row = {
            **self._row(layout.preview_row_path(item_id, from_key)),
            "id": request.id,
            "extra": request.extra,
            "source": raw.source,
            FAILED_ROW_COLUMN: _resolved_row(request),
        }
        self.store.write_bytes(layout.preview_row_path(item_id, row_key(request.id)), one_row(row, PREVIEW_SCHEMA))

    def _row(self, path: str) -> dict[str, Any]:
        return read_part(self.store, path).to_pylist()[0]

    def write_failed(self, item_id: str, request: RenderRequest, raw: RawRow, failure: Failure) -> None:
        """Publish the failure of a legal row."""
        key = row_key(request.id)
        self.forget_failure(item_id, key)
        row = {**_recorded_row(request), "item_id": item_id, **_failure_columns(raw, failure)}
        row[FAILED_ROW_COLUMN] = _resolved_row(request)
        kind = layout.ROW if failure.error_class == "row" else layout.INFRASTRUCTURE
        self.store.write_bytes(layout.failed_path(kind, item_id, key), one_row(row, FAILED_SCHEMA))

    def write_illegal(self, raw: RawRow, messages: list[str]) -> str:
        """Publish the failure of an illegal row and return the part's name.

        A value that does not fit its column is null there; the manifest row as it was is in FAILED_ROW_COLUMN.
        """
        row: dict[str, Any] = {}
        for name, column in COLUMNS.items():
            try:
                value = raw.values.get(name)
                row[name] = None if value is None else plain(column.parse(value))
                if name == "images":
                    row[name] = _recorded_images(row[name])
                pa.array([row[name]], type=column.type)
            except Exception:
                row[name] = None
        failure = Failure("plan", 0, "row", "\n".join(messages))
        row.update(_failure_columns(raw, failure))
        content = hashlib.sha256(row[FAILED_ROW_COLUMN].encode("utf-8", "surrogatepass")).hexdigest()
        name = layout.failed_name(layout.ILLEGAL, content[:32], row_key(raw.source))
        self.store.write_bytes(f"{layout.FAILED}/{name}", one_row(row, FAILED_SCHEMA))
        return name

    def forget_illegal(self, manifest: str, keep: set[str]) -> None:
        """Remove the parts of illegal rows of `manifest` but those named in `keep`, which are still illegal.

        When the manifest is this dataset's own failed/, its rows are those of every manifest.
        """
        files = _place(recorded(manifest))
        every = Store(manifest).root == self.store.path(layout.FAILED)
        for name in self.store.list_names(layout.FAILED):
            if layout.is_illegal_part(name) and name not in keep and (source := self._source(name)) is not None:
                file = _place(source.rpartition(":")[0])
                if every or file == files or file.startswith(files + "/"):
                    self.store.delete(f"{layout.FAILED}/{name}")

    def forget_older_failures(self, names: Iterable[str], source: str) -> None:
        """Remove those of the parts `names` of failed/ that are about the manifest row at `source`."""
        for name in names:
            if (older := self._source(name)) is not None and _same_row(older, source):
                self.store.delete(f"{layout.FAILED}/{name}")

    def forget_failure(self, item_id: str, key: str) -> None:
        """Remove the row from failed/, if it is there."""
        for kind in (layout.ROW, layout.INFRASTRUCTURE):
            self.store.delete(layout.failed_path(kind, item_id, key))

    def _source(self, name: str) -> str | None:
        """Where the row of the part `name` of failed/ is in its manifest; None when the part is gone or damaged."""
        try:
            table = read_part(self.store, f"{layout.FAILED}/{name}", ["source"])
        except (FileNotFoundError, UnreadablePart):
            return None
        return table.column(0)[0].as_py() or ""


def _place(file: str) -> str:
    """The location of a manifest as `source` has it. A dataset may name it by a relative path."""
    try:
        return resolve(split_options(file)[0])
    except ValueError:
        return file


def _same_row(source: str, other: str) -> bool:
    (file, _, number), (other_file, _, other_number) = source.rpartition(":"), other.rpartition(":")
    return number == other_number and _place(file) == _place(other_file)


class UnreadablePart(OSError):
    """A part of the dataset, `path` in it, that is no Parquet file."""

    def __init__(self, message: str, *, path: str):
        super().__init__(message)
        self.path = path


def read_part(store: Store, path: str, columns: list[str] | None = None) -> pa.Table:
    """A part of the dataset. Raises FileNotFoundError, and UnreadablePart for a damaged one."""
    data = store.read_bytes(path)
    try:
        return read_parquet(data, columns=columns)
    except pa.ArrowException as error:
        raise UnreadablePart(
            f"{join(store.name, path)} is damaged ({error}); ltx-ray verify --repair sets it aside", path=path
        ) from None


def read_rows(store: Store, folder: str) -> Iterator[dict[str, Any]]:
    """All rows of index/, failed/ or previews/. Raises UnreadablePart."""
    for name in filter(layout.is_part, store.list_names(folder)):
        yield from read_part(store, f"{folder}/{name}").to_pylist()


def _rendered_row(item_id: str, request: RenderRequest, rendered: Rendered) -> dict[str, Any]:
    return {
        **_recorded_row(request),
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
        **plain(rendered.clip.picture),
        **plain(rendered.clip.sound),
    }


def _resolved_row(request: RenderRequest) -> str:
    """The manifest row with its defaults resolved, as JSON: it asks for the same clip in a run with others."""
    values = resolved_values(request)
    return _json({**values, "images": _recorded_images(values["images"])})


def _recorded_row(request: RenderRequest) -> dict[str, Any]:
    """The request's columns as the tables have them."""
    row = request.row()
    return {**row, "images": _recorded_images(row["images"])}


def _recorded_images(images: Any) -> Any:
    """A value of the column `images`, legal or not, as the tables have it."""
    if not isinstance(images, list):
        return images
    return [
        {**image, "path": recorded_image(image["path"])}
        if isinstance(image, Mapping) and isinstance(image.get("path"), str)
        else image
        for image in images
    ]


def _failure_columns(raw: RawRow, failure: Failure) -> dict[str, Any]:
    values = raw.stored()
    if "images" in values:
        values["images"] = _recorded_images(values["images"])
    return {
        "source": raw.source,
        "stage": failure.stage,
        "attempts": failure.attempts,
        "error_class": failure.error_class,
        "message": masked(failure.message),
        "traceback": masked(failure.traceback),
        "failed_at": datetime.datetime.now(datetime.UTC),
        FAILED_ROW_COLUMN: _json(values),
    }


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=True, default=str, sort_keys=True)


def one_row(row: Mapping[str, Any], schema: pa.Schema) -> bytes:
    """A Parquet file of one row. Columns that the row lacks are null."""
    complete = {name: row.get(name) for name in schema.names}
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([complete], schema=schema), buffer, compression="zstd")
    return buffer.getvalue()
