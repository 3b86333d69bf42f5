"""From manifest rows to work: identity, what is done already, what is left, and what it costs."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ltx_ray.checkpoints.checkpoint import open_checkpoint
from ltx_ray.checkpoints.digests import cached_digest
from ltx_ray.checkpoints.lora import lora_digest
from ltx_ray.checkpoints.transformer_config import TransformerConfig
from ltx_ray.config import ModelFiles, Numerics, Selection
from ltx_ray.dataset.existing import ExistingRows, Known
from ltx_ray.manifest.columns import LONGEST_ID
from ltx_ray.manifest.reader import RawRow, read_manifest
from ltx_ray.manifest.rules import Row, RowProblem, RowRules, duplicate_id, judge
from ltx_ray.planning.cost import H100_TFLOPS, clip_tflop
from ltx_ray.planning.identity import item_id, recipe_digest
from ltx_ray.planning.templates import Template, Templates, sample_id, sample_seed
from ltx_ray.records import Recipe, RenderRequest, WorkItem
from ltx_ray.storage.id_table import IdTable
from ltx_ray.storage.images import image_digest

#: Status of a planned row.
TODO, DONE, COPY, FAILED, ILLEGAL, REPEATED = "todo", "done", "copy", "failed", "illegal", "repeated"

#: Rows that are looked up together, those of them that are read without a look at the clock, and for how long.
_CHUNK_ROWS, _CHUNK_STEP, _CHUNK_SECONDS = 4096, 16, 0.1


class PlannedRow:
    """A manifest row, or one of its samples, and what is to happen with it.

    status: "todo" (render), "done" (in the index), "copy" (its clip is there under another id),
    "failed" (failed by its own fault in an earlier run), "illegal", "repeated" (the same row again).
    `item_id`, `id`, `key` and `request` are those of a legal row, `item` is None for an illegal one; what is
    large is made when it is asked for.
    """

    __slots__ = (
        "_item", "_raw", "_row", "_seed", "_template",
        "digest", "head", "id", "id_digest", "id_head", "messages", "status",
    )  # fmt: skip

    def __init__(
        self,
        raw: RawRow,
        template: Template,
        digest: bytes,
        given_id: str | None,
        seed: int,
        item: WorkItem | None = None,
    ):
        self.status = TODO
        self.messages: tuple[str, ...] = ()
        self.id: str | None = digest[:8].hex() if given_id is None else given_id
        #: 16 bytes: the item_id. Its head, and the id's, are what tables are searched by.
        self.digest, self.head = digest, digest[:8]
        #: sha256 of the id; it starts with the row's key.
        self.id_digest = hashlib.sha256(self.id.encode()).digest()
        self.id_head = self.id_digest[:8]
        self._raw, self._template, self._seed, self._item = raw, template, seed, item
        self._row: Row | None = None

    @classmethod
    def illegal(cls, row: Row) -> PlannedRow:
        planned = cls.__new__(cls)
        planned.status, planned.messages, planned.id = ILLEGAL, tuple(row.messages()), row.id
        planned._row, planned._template, planned._item = row, None, None
        return planned

    def refused(self, problem: RowProblem) -> PlannedRow:
        """The row as an illegal one. It keeps its resolved values, so that a retry asks for the very same clip."""
        request = self.request
        resolved = {name: value for name, value in request.row().items() if name != "extra"}
        raw = self.row.raw._replace(values={**json.loads(request.extra or "{}"), **resolved})
        return PlannedRow.illegal(Row(raw, None, (problem,)))

    @property
    def item_id(self) -> str:
        return self.digest.hex()

    @property
    def key(self) -> str:
        """What row_key makes of the id."""
        return self.id_digest[:4].hex()

    @property
    def from_failed(self) -> bool:
        """Whether it stands in a table of the dataset (failed/ or previews/), as it was resolved."""
        return self._raw.from_failed

    @property
    def item(self) -> WorkItem | None:
        if self._item is None and self._template is not None:
            self._item = self._template.fill(self._raw, self.item_id, self.id, self._seed)
        return self._item

    @property
    def request(self) -> RenderRequest:
        assert self.item is not None
        return self.item.request

    @property
    def row(self) -> Row:
        if self._row is None:
            self._row = Row(self._raw, self.request)
        return self._row

    def samples(self, count: int, given_id: str | None) -> list[PlannedRow]:
        """This row and those of its other samples; `given_id` is the id that stands in the manifest."""
        rows, prompt = [self], self._raw.values["prompt"]
        for number in range(1, count):
            seed = sample_seed(self.item_id, number)
            digest = self._template.identity.of(prompt, seed)
            row_id = None if given_id is None else sample_id(given_id, number)
            rows.append(PlannedRow(self._raw, self._template, digest, row_id, seed))
        return rows

    def tflop(self, transformer: TransformerConfig) -> float:
        """Cost of the clip in TFLOP."""
        if self._template.tflop is None:
            self._template.tflop = clip_tflop(transformer, self._template.item.request)
        return self._template.tflop


class UnreadableImage(Exception):
    """A conditioning image of a row cannot be read: (path, why)."""


def _digest(path: str) -> str:
    try:
        return image_digest(path)
    except (ValueError, OSError) as error:
        raise UnreadableImage(path, str(error)) from None


class ItemBuilder:
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


@dataclass(frozen=True)
class _LookedUp:
    """What the tables hold of a batch of rows, by the first bytes of their digests."""

    ids: set[bytes]
    to_render: set[bytes]
    done: Known


@dataclass
class Plan:
    """A manifest held against the dataset, row by row.

    As the rows are consumed, `counts` fills with "rows", one entry a status and "clips" (what is to be
    rendered, once for all rows that share it), and `tflop` with the clips' cost.

    With `samples` N, each row stands for N: itself, and N-1 with seeds that follow from its item_id and with
    "-s1" and so on behind its id. A selection takes a row with all of its samples, except that an id with its
    ending takes that sample alone. Rows of a dataset's failed/ are samples already.
    """

    manifest: str
    rules: RowRules
    builder: ItemBuilder
    existing: ExistingRows
    selection: Selection = field(default_factory=Selection)
    retry_failed: bool = False
    #: The run stops after stage 1, so that a row with a preview is done.
    latents_only: bool = False
    samples: int = 1
    counts: Counter[str] = field(default_factory=Counter)
    tflop: float = 0.0

    def __post_init__(self) -> None:
        #: Ids that are selected and that no row has had so far.
        self.unmet: set[str | None] = set(self.selection.ids or ())
        self._templates = Templates(self.rules, self.builder.item)
        # 96 bits of each id met and 32 of the item it stands for
        self._ids = IdTable(16)
        # 48 bits of each item to render: they are only counted, a few in fifty million may be missed
        self._to_render = IdTable(6, head=4)

    @property
    def complete(self) -> bool:
        """Whether the plan takes every row of its manifest."""
        return self.selection == Selection()

    def open(self) -> Iterator[PlannedRow]:
        """Check the manifest as a whole (ValueError) and return its rows as a stream."""
        if self.retry_failed and self.samples != 1:
            raise ValueError(f"--samples-per-prompt: {self.samples}, legal: 1 for a retry, whose rows are samples")
        return self._rows(read_manifest(self.manifest))

    def _rows(self, raws: Iterator[RawRow]) -> Iterator[PlannedRow]:
        taken = 0
        for chunk in _chunks(itertools.islice(raws, *self._shard())):
            drafts = [self._drafted(raw) for raw in chunk]
            found = self._look_up([row for rows in drafts if rows for row in rows])
            for raw, rows in zip(chunk, drafts, strict=True):
                # what has to be judged by itself may have images to read: only when it is its turn
                rows, its = (self._judged(raw), None) if rows is None else (rows, found)
                some = False
                for row in self._wanted(rows):
                    some = True
                    yield self._decided(row, its)
                taken += some
                if self.selection.limit is not None and taken >= self.selection.limit:
                    return

    # --- rows, but for their status --------------------------------------------------------------

    def _drafted(self, raw: RawRow) -> Sequence[PlannedRow] | None:
        """The samples of a row that a template fits; None for another."""
        matched = self._templates.match(raw)
        if matched is None:
            return None
        template, seed, given_id = matched
        row = PlannedRow(raw, template, template.identity.of(raw.values["prompt"], seed), given_id, seed)
        count = self._count(raw)
        if count == 1:
            return (row,)
        return None if _too_long(given_id, count) else row.samples(count, given_id)

    def _judged(self, raw: RawRow) -> Sequence[PlannedRow]:
        """The samples of any row, or the row when it is illegal."""
        row = judge(raw, self.rules)
        if row.request is None:
            return (PlannedRow.illegal(row),)
        count, given_id = self._count(raw), row.request.id
        if _too_long(given_id, count):
            room = LONGEST_ID - len(sample_id("", count - 1))
            legal = f"at most {room} characters, so that {sample_id('', count - 1)} fits behind (--samples-per-prompt)"
            return (PlannedRow.illegal(Row(raw, None, (RowProblem("id", given_id, legal),))),)
        try:
            item = self.builder.item(row.request)
        except UnreadableImage as error:
            path, why = error.args
            problem = RowProblem("images", path, f"an image that can be read ({why})")
            return (PlannedRow.illegal(Row(raw, None, (problem,))),)
        digest = bytes.fromhex(item.item_id)
        return PlannedRow(raw, Template(item), digest, given_id, row.request.seed, item).samples(count, given_id)

    def _count(self, raw: RawRow) -> int:
        return 1 if raw.from_failed else self.samples

    def _wanted(self, rows: Sequence[PlannedRow]) -> Sequence[PlannedRow]:
        wanted = self.selection.ids
        if wanted is not None:
            self.unmet.difference_update(row.id for row in rows)
        if wanted is None or rows[0].id in wanted:
            return rows
        return [row for row in rows if row.id in wanted]

    # --- their status ----------------------------------------------------------------------------

    def _look_up(self, rows: Sequence[PlannedRow]) -> _LookedUp:
        self._ids.settle()
        self._to_render.settle()
        return _LookedUp(
            self._ids.settled([row.id_head for row in rows]),
            self._to_render.settled([row.digest[:4] for row in rows]),
            self.existing.known([row.head for row in rows]),
        )

    def _decided(self, row: PlannedRow, found: _LookedUp | None) -> PlannedRow:
        """The row with its status, and counted; `found` is None when it was not looked up before."""
        if row.status != ILLEGAL:
            row = self._with_status(row, found)
        self.counts["rows"] += 1
        self.counts[row.status] += 1
        if row.status == TODO:
            head, rest = row.digest[:4], row.digest[4:6]
            if not self._to_render.has(head, rest, settled=found is None or head in found.to_render):
                self._to_render.put(head, rest)
                self.counts["clips"] += 1
                self.tflop += row.tflop(self.builder.checkpoint.transformer)
        return row

    def _with_status(self, row: PlannedRow, found: _LookedUp | None) -> PlannedRow:
        head, more, item = row.id_head, row.id_digest[8:12], row.digest[8:12]
        for rest in self._ids.rests(head, settled=found is None or head in found.ids):
            if rest[:4] == more:
                if rest[4:] == item:
                    row.status = REPEATED
                    return row
                if row.from_failed:
                    continue  # rows of several manifests, each judged beside its own
                raw = row.row.raw._replace(duplicate=True)
                return PlannedRow.illegal(Row(raw, None, (duplicate_id(row.id),)))
        self._ids.put(head, more + item)
        row.status = self._status(row, found)
        return row

    def _status(self, row: PlannedRow, found: _LookedUp | None) -> str:
        done = self.existing
        if found is None or found.done.may_have(row.head):
            if done.has_row(row.item_id, row.key):
                return DONE
            copied = done.key_of(row.item_id) is not None
        else:
            copied = False
        if self.latents_only and done.has_preview(row.item_id, row.key):
            return DONE
        if copied:
            return COPY
        if not self.retry_failed and done.failed_count and done.failure(row.item_id, row.key) == "row":
            return FAILED
        return TODO

    def _shard(self) -> tuple[int, None, int]:
        index, count = self.selection.shard or (0, 1)
        return index, None, count


def _chunks(raws: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    """Rows in batches, small ones where they come slowly."""
    while True:
        chunk: list[RawRow] = []
        deadline = time.monotonic() + _CHUNK_SECONDS
        while len(chunk) < _CHUNK_ROWS and time.monotonic() < deadline:
            more = list(itertools.islice(raws, _CHUNK_STEP))
            chunk += more
            if len(more) < _CHUNK_STEP:
                yield chunk
                return
        yield chunk


def _too_long(given_id: str | None, count: int) -> bool:
    return given_id is not None and count > 1 and len(sample_id(given_id, count - 1)) > LONGEST_ID


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
