"""From manifest rows to work: identity, what is done already, what is left, and what it costs."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ltx_ray.config import ModelFiles, Numerics, Selection
from ltx_ray.cost import H100_TFLOPS, clip_tflop
from ltx_ray.dataset.writer import Done, row_key
from ltx_ray.imagefiles import image_digest
from ltx_ray.lorafiles import lora_digest
from ltx_ray.manifest import Problem, RawRow, Row, RowRules, duplicate_id, judge, read_manifest
from ltx_ray.modelfiles import cached_digest, open_checkpoint
from ltx_ray.recipe import item_id, recipe_digest
from ltx_ray.records import Recipe, RenderRequest, WorkItem

#: Status of a planned row.
TODO, DONE, COPY, FAILED, ILLEGAL, REPEATED = "todo", "done", "copy", "failed", "illegal", "repeated"


@dataclass(frozen=True)
class PlannedRow:
    """A manifest row and what is to happen with it.

    status: "todo" (render), "done" (in the index), "copy" (its clip is there under another id),
    "failed" (failed by its own fault in an earlier run), "illegal", "repeated" (the same row again).
    """

    status: str
    row: Row
    item: WorkItem | None = None
    messages: tuple[str, ...] = ()

    @property
    def request(self) -> RenderRequest:
        assert self.row.request is not None
        return self.row.request

    @property
    def key(self) -> str:
        return row_key(self.request.id)


class UnreadableImage(Exception):
    """A conditioning image of a row cannot be read: (path, why)."""


def _digest(path: str) -> str:
    try:
        return image_digest(path)
    except (ValueError, OSError) as error:
        raise UnreadableImage(path, str(error)) from None


class RecipeBook:
    """The recipe of each row: the run's weights and numbers, the row's pipeline, LoRAs and strengths."""

    def __init__(self, model: ModelFiles, numerics: Numerics):
        local = model.local()
        self.checkpoint = open_checkpoint(local.checkpoint_path)
        self._numerics = numerics
        self._digests = {
            "checkpoint": cached_digest(local.checkpoint_path),
            "gemma": cached_digest(local.gemma_root),
            "upsampler": cached_digest(local.spatial_upsampler_path),
            "distilled_lora": lora_digest(local.distilled_lora) if local.distilled_lora else None,
        }
        self._loras = {lora.name: lora_digest(lora.path) for lora in local.loras}

    def recipe(self, request: RenderRequest) -> Recipe:
        return Recipe(
            pipeline=request.pipeline,
            dtype=self._numerics.dtype,
            precision=self._numerics.precision,
            noise_device=self._numerics.noise_device,
            distilled_lora_strengths=(
                request.distilled_lora_strength_stage_1,
                request.distilled_lora_strength_stage_2,
            ),
            loras=tuple((self._loras[use.name], use.strength) for use in request.loras),
            **self._digests,
        )

    def item(self, request: RenderRequest) -> WorkItem:
        """Raises UnreadableImage."""
        recipe = self.recipe(request)
        digests = tuple(_digest(image.path) for image in request.images)
        name = item_id(request, recipe, digests)
        if request.id is None:
            request = dataclasses.replace(request, id=name[:16])
        return WorkItem(name, request, recipe, recipe_digest(recipe), digests)


@dataclass
class Plan:
    """A manifest held against the dataset, row by row.

    As the rows are consumed, `counts` fills with "rows", one entry a status and "clips" (what is to be
    rendered, once for all rows that share it), and `tflop` with the clips' cost.
    """

    manifest: str
    rules: RowRules
    book: RecipeBook
    done: Done
    selection: Selection = field(default_factory=Selection)
    retry_failed: bool = False
    #: The run stops after stage 1, so that an item with stored latents is done.
    latents_only: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    tflop: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether the plan takes every row of its manifest."""
        return self.selection == Selection()

    def open(self) -> Iterator[PlannedRow]:
        """Check the manifest as a whole (ValueError) and return its rows as a stream."""
        return self._rows(read_manifest(self.manifest))

    def _rows(self, raws: Iterator[RawRow]) -> Iterator[PlannedRow]:
        seen: dict[str, str] = {}
        taken = 0
        for raw in itertools.islice(raws, *self._shard()):
            planned = self._plan(raw, seen)
            if planned is None:
                continue
            self.counts["rows"] += 1
            self.counts[planned.status] += 1
            if planned.status == TODO and planned.item.item_id not in self._to_render:
                self._to_render.add(planned.item.item_id)
                self.counts["clips"] += 1
                self.tflop += clip_tflop(self.book.checkpoint.transformer, planned.request)
            yield planned
            taken += 1
            if self.selection.limit is not None and taken >= self.selection.limit:
                return

    def _plan(self, raw: RawRow, seen: dict[str, str]) -> PlannedRow | None:
        row = judge(raw, self.rules)
        wanted = self.selection.ids
        if row.request is None:
            if wanted is not None and row.id not in wanted:
                return None
            return PlannedRow(ILLEGAL, row, messages=tuple(row.messages()))
        try:
            item = self.book.item(row.request)
        except UnreadableImage as error:
            path, why = error.args
            row = Row(raw, None, (Problem("images", path, f"an image that can be read ({why})"),))
            return PlannedRow(ILLEGAL, row, messages=tuple(row.messages()))
        row = dataclasses.replace(row, request=item.request)
        row_id = item.request.id
        assert row_id is not None
        if wanted is not None and row_id not in wanted:
            return None
        first = seen.setdefault(row_id, item.item_id)
        if first != item.item_id:
            row = Row(dataclasses.replace(raw, duplicate=True), None, (duplicate_id(row_id),))
            return PlannedRow(ILLEGAL, row, messages=tuple(row.messages()))
        return PlannedRow(self._status(item, row_key(row_id), seen, raw), row, item)

    def _status(self, item: WorkItem, key: str, seen: dict[str, str], raw: RawRow) -> str:
        if (item.item_id, key) in self._handed_out:
            return REPEATED
        self._handed_out.add((item.item_id, key))
        if (item.item_id, key) in self.done.rows or (self.latents_only and item.item_id in self.done.latents):
            return DONE
        if item.item_id in self.done.items:
            return COPY
        if self.done.failed.get((item.item_id, key)) == "row" and not self.retry_failed:
            return FAILED
        return TODO

    def __post_init__(self) -> None:
        self._handed_out: set[tuple[str, str]] = set()
        self._to_render: set[str] = set()

    def _shard(self) -> tuple[int, None, int]:
        index, count = self.selection.shard or (0, 1)
        return index, None, count


def cost_line(counts: Mapping[str, int], tflop: float) -> str:
    """An estimate in words: the arithmetic of what is to be rendered, and what that takes on an H100."""
    clips = counts.get("clips", 0)
    if not clips:
        return "nothing to render"
    hours = tflop / H100_TFLOPS / 3600
    what = f"{clips} clip{'s' if clips > 1 else ''}"
    return f"about {_quantity(tflop)}TFLOP in {what}, {hours:.2g} hours of an H100 at {H100_TFLOPS:.0f} TFLOP/s"


def _quantity(value: float) -> str:
    return f"{value:,.0f} " if value >= 100 else f"{value:.3g} "
