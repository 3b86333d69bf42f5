"""Rows of the dataset's tables: of index/ and previews/ one per finished manifest row, of failed/ one per failed row.

The rows go to a `RowLog`, which commits them. No torch.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ltx_ray.dataset import layout
from ltx_ray.dataset.existing import failure_of
from ltx_ray.dataset.failures import FailureScope
from ltx_ray.dataset.layout import SECONDS_COLUMNS
from ltx_ray.dataset.row_log import RowLog
from ltx_ray.manifest.columns import COLUMNS
from ltx_ray.manifest.raw import FAILED_ROW_COLUMN, RawRow
from ltx_ray.manifest.rules import resolved_values
from ltx_ray.records import Clip, RenderRequest, plain
from ltx_ray.storage.credentials import masked
from ltx_ray.storage.locations import recorded_image


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

    @property
    def flags(self) -> tuple[str, ...]:
        return (*self.clip.flags, *self.extra_flags)

    @property
    def measures(self) -> dict[str, Any]:
        """What was measured of the clip, by columns."""
        return {**vars(self.clip.picture), **vars(self.clip.sound)}


@dataclass(frozen=True)
class Failure:
    """Why a row has no clip. `error_class` is "row" (its own fault) or "infrastructure"."""

    stage: str
    attempts: int
    error_class: str
    message: str
    traceback: str = ""


class DatasetWriter:
    """Makes the rows of a run and adds them to `log`. None is finished before the log has committed it."""

    def __init__(self, log: RowLog):
        self.log = log

    def write_index(self, item_id: str, request: RenderRequest, rendered: Rendered) -> None:
        """Add the index row of a manifest row whose clip is complete. An older failure of it is overcome."""
        self.log.add(layout.INDEX, _rendered_row(item_id, request, rendered))

    def write_preview(self, item_id: str, request: RenderRequest, raw: RawRow, rendered: Rendered) -> None:
        """Add the row of an item that stopped after stage 1; its `clip` is the preview."""
        self._add_preview({**_rendered_row(item_id, request, rendered)}, request, raw)

    def copy_index_row(self, item_id: str, from_key: str, request: RenderRequest) -> None:
        """Add the index row of another manifest row of a finished item, from its row with key `from_key`.

        Raises UnreadablePart or FileNotFoundError when that row cannot be read.
        """
        row = self.log.row(layout.INDEX, item_id, from_key)
        # Its images may be elsewhere, and its LoRAs have other names, than those of the row that was rendered.
        self.log.add(layout.INDEX, {**row, **_recorded_row(request)})

    def copy_preview_row(self, item_id: str, from_key: str, request: RenderRequest, raw: RawRow) -> None:
        """The same for an item that has a preview."""
        row = self.log.row(layout.PREVIEWS, item_id, from_key)
        self._add_preview({**row, **_recorded_row(request)}, request, raw)

    def _add_preview(self, row: dict[str, Any], request: RenderRequest, raw: RawRow) -> None:
        row |= {"source": raw.source, FAILED_ROW_COLUMN: _resolved_row(request)}
        self.log.add(layout.PREVIEWS, row)
        self.forget_failure(row["item_id"], request.id)

    def write_failed(self, item_id: str, request: RenderRequest, raw: RawRow, failure: Failure) -> None:
        """Add the failure of a legal row, in place of an older one."""
        row = {**_recorded_row(request), "item_id": item_id, **_failure_columns(raw, failure)}
        row[FAILED_ROW_COLUMN] = _resolved_row(request)
        self.log.add(layout.FAILED, row)

    def write_illegal(self, raw: RawRow, messages: list[str]) -> bytes:
        """Add the failure of an illegal row and return its key."""
        return self.write_unplanned(raw, Failure("plan", 0, "row", "\n".join(messages)))

    def write_unplanned(self, raw: RawRow, failure: Failure) -> bytes:
        """Add the failure of a row that has no item, and return its key.

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
        row.update(_failure_columns(raw, failure))
        self.log.add(layout.FAILED, row)
        return failure_of(None, row["id"], row["source"], failure.error_class)[1]

    def complete(self, scope: FailureScope) -> None:
        """Every row of the manifest was read. When the run ends, its older illegal rows leave failed/."""
        self.log.scope = scope

    def forget_older_failures(self, item_id: str, request: RenderRequest, source: str) -> None:
        """The failures of the manifest row at `source` as other items are overcome."""
        self._mark(item_id, request.id, layout.AS_OTHER_ITEMS, source)

    def forget_unplanned(self, raw: RawRow) -> None:
        """The failure is overcome that the row at this place, with this id, has had without an item, if any."""
        row_id = raw.values.get("id")
        self.log.add(layout.FAILED, {"id": row_id, "source": raw.source, "mark": layout.OVERCOME})

    def forget_failure(self, item_id: str, row_id: str | None) -> None:
        """The row's failure is overcome, if it has one."""
        if self.log.existing.failure(item_id, layout.row_key(row_id)) is not None:
            self._mark(item_id, row_id, layout.OVERCOME)

    def _mark(self, item_id: str, row_id: str | None, mark: str, source: str | None = None) -> None:
        self.log.add(layout.FAILED, {"item_id": item_id, "id": row_id, "source": source, "mark": mark})


def _rendered_row(item_id: str, request: RenderRequest, rendered: Rendered) -> dict[str, Any]:
    return {
        **_recorded_row(request),
        "item_id": item_id,
        "clip": rendered.clip.path,
        "clip_sha256": rendered.clip.sha256,
        "latents_sha256": rendered.clip.latents_sha256,
        "audio_stage": rendered.clip.audio_stage,
        "flags": list(rendered.flags),
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
        **rendered.measures,
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
