"""The plan: which items a manifest's rows ask for, which of them a dataset has, and what the rest costs."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias, cast

from ltx_ray.checkpoints.checkpoint import open_checkpoint
from ltx_ray.checkpoints.digests import cached_digest
from ltx_ray.checkpoints.lora import lora_digest
from ltx_ray.checkpoints.transformer_config import TransformerConfig
from ltx_ray.config import NEWEST_SCHEME, ModelFiles, RecipeNumerics, Selection
from ltx_ray.dataset.existing import ExistingRows, ItemLookup
from ltx_ray.manifest.columns import LONGEST_ID
from ltx_ray.manifest.raw import RawRow
from ltx_ray.manifest.reader import open_manifest
from ltx_ray.manifest.rules import IllegalRow, LegalRow, RowProblem, RowRules, duplicate_id, judge, resolved_values
from ltx_ray.planning.estimate import ClipEstimate, PlannedWork, estimate_clip
from ltx_ray.planning.identity import item_id, recipe_digest
from ltx_ray.planning.image_lookahead import ImageLookAhead, Use
from ltx_ray.planning.row_images import ImageOutOfReach, UnreadableImage, UnreadRow, digest_of_image, images_of
from ltx_ray.planning.templates import RowTemplate, TemplateCache, item_sample_seed, sample_id, sample_seed
from ltx_ray.records import Recipe, RenderRequest, WorkItem
from ltx_ray.storage.id_table import IdTable
from ltx_ray.storage.locations import recorded

#: Statuses of a row.
TODO, DONE, COPY, FAILED, REPEATED, ILLEGAL = "todo", "done", "copy", "failed", "repeated", IllegalRow.status
REMOVED, UNREAD = "removed", UnreadRow.status

#: Most rows of a chunk, which are looked up at once; rows read between two checks of the clock; seconds for which a
#: chunk grows.
_CHUNK_ROWS, _CHUNK_STEP, _CHUNK_SECONDS = 4096, 16, 0.1


class PlannedRow:
    """A legal manifest row, or one of its samples, and what the run does with it.

    status: "todo" (render), "done" (in the index), "copy" (the clip exists under another id), "failed" (failed by its
    own fault in an earlier run), "repeated" (the same row again), "removed" (taken down, never to be rendered again).
    """

    __slots__ = (
        "_item", "_seed", "_template",
        "id", "id_hash", "id_head", "item_head", "item_id_bytes", "raw", "status",
    )  # fmt: skip

    def __init__(
        self,
        raw: RawRow,
        template: RowTemplate,
        item_id_bytes: bytes,
        given_id: str | None,
        seed: int,
        item: WorkItem | None = None,
    ):
        """`given_id` is the id in the manifest, or None. `item` is made on demand when it is not given."""
        self.status = TODO
        self.raw = raw
        self.id = item_id_bytes[:8].hex() if given_id is None else given_id
        #: The item_id as 16 bytes. Its first 8, and those of the id's sha256, are the heads that tables search by.
        self.item_id_bytes, self.item_head = item_id_bytes, item_id_bytes[:8]
        self.id_hash = hashlib.sha256(self.id.encode()).digest()
        self.id_head = self.id_hash[:8]
        self._template, self._seed, self._item = template, seed, item

    @property
    def item_id(self) -> str:
        return self.item_id_bytes.hex()

    @property
    def key(self) -> str:
        """The row's key in names of parts; equals `row_key(self.id)`."""
        return self.id_hash[:4].hex()

    @property
    def from_failed(self) -> bool:
        """Whether the row was read from failed/ or previews/ of a dataset, with its defaults resolved."""
        return self.raw.from_failed

    @property
    def item(self) -> WorkItem:
        if self._item is None:
            self._item = self._template.fill(self.raw, self.item_id, self.id, self._seed)
        return self._item

    @property
    def request(self) -> RenderRequest:
        return self.item.request

    def samples(self, count: int, given_id: str | None) -> list[PlannedRow]:
        """This row and its other samples, `count` in all; `given_id` is the id in the manifest."""
        rows, prompt = [self], self.raw.values["prompt"]
        scheme = self._template.item.recipe.scheme
        for number in range(1, count):
            seed = item_sample_seed(self.item_id, number) if scheme == 1 else sample_seed(prompt, self._seed, number)
            row_id = None if given_id is None else sample_id(given_id, number)
            item_id_bytes = self._template.hasher.item_id_bytes(prompt, seed)
            rows.append(PlannedRow(self.raw, self._template, item_id_bytes, row_id, seed))
        return rows

    def estimate(self, transformer: TransformerConfig) -> ClipEstimate:
        """What the clip costs, the same object for all rows of a template."""
        if self._template.estimate is None:
            self._template.estimate = estimate_clip(transformer, self._template.item.request)
        return self._template.estimate

    def refused(self, problem: RowProblem) -> IllegalRow:
        """The row as one that this run cannot render. With its defaults resolved, a retry asks for the same clip."""
        return IllegalRow(self.raw._replace(values=resolved_values(self.request), samples=1), (problem,))


def item_to_render(entry: PlanEntry) -> str | None:
    """The item_id of a row that is to be rendered; None of any other row."""
    return entry.item_id if isinstance(entry, PlannedRow) and entry.status == TODO else None


class ItemBuilder:
    """Makes the work items of requests: the recipe (the run's weights and dtypes, the row's LoRAs) and the item_id."""

    def __init__(self, model: ModelFiles, numerics: RecipeNumerics, scheme: int = NEWEST_SCHEME):
        local = model.in_place()
        self.checkpoint = open_checkpoint(local.checkpoint_path)
        self._numerics, self.scheme = numerics, scheme
        self._checkpoint = cached_digest(local.checkpoint_path, scheme=scheme)
        self._gemma = cached_digest(local.gemma_root, scheme=scheme)
        self._upsampler = cached_digest(local.spatial_upsampler_path, scheme=scheme)
        self._distilled_lora = lora_digest(local.distilled_lora, scheme) if local.distilled_lora else None
        self._loras = {lora.name: lora_digest(lora.path, scheme) for lora in local.loras}

    @property
    def digests(self) -> dict[str, str]:
        """Digests of the model's files by what they are, which recipes have and replicas show (records.Evidence)."""
        found = {
            "checkpoint_path": self._checkpoint,
            "gemma_root": self._gemma,
            "spatial_upsampler_path": self._upsampler,
            **{f"lora {name}": digest for name, digest in self._loras.items()},
        }
        return found if self._distilled_lora is None else {**found, "distilled_lora": self._distilled_lora}

    def recipe(self, request: RenderRequest) -> Recipe:
        return Recipe(
            pipeline=request.pipeline,
            dtype=self._numerics.dtype,
            precision=self._numerics.precision,
            noise_device=self._numerics.noise_device,
            checkpoint=self._checkpoint,
            gemma=self._gemma,
            upsampler=self._upsampler,
            distilled_lora=self._distilled_lora,
            distilled_lora_strengths=(
                request.distilled_lora_strength_stage_1,
                request.distilled_lora_strength_stage_2,
            ),
            loras=tuple((self._loras[use.name], use.strength) for use in request.loras),
            scheme=self.scheme,
        )

    def item(self, request: RenderRequest, digest: Callable[[str, int], str] = digest_of_image) -> WorkItem:
        """`digest` of an image by its location and crf. Raises UnreadableImage and ImageOutOfReach."""
        recipe = self.recipe(request)
        digests = tuple(digest(*use) for use in images_of(request))
        name = item_id(request, recipe, digests)
        if request.id is None:
            request = dataclasses.replace(request, id=name[:16])
        return WorkItem(name, request, recipe, recipe_digest(recipe), digests)


#: An entry of a plan.
PlanEntry: TypeAlias = PlannedRow | IllegalRow | UnreadRow


class _Judged(NamedTuple):
    """A row without a template: it is illegal, or has images, which are read only when it is nearly its turn."""

    raw: RawRow
    row: LegalRow | IllegalRow


def _images_of(draft: Sequence[PlannedRow] | _Judged) -> tuple[Use, ...]:
    """What has to be read before a row can be planned."""
    judged = draft.row if isinstance(draft, _Judged) else None
    return () if judged is None or isinstance(judged, IllegalRow) else images_of(judged.request)


@dataclass(frozen=True)
class _LookedUp:
    """The heads of ids and item_ids in a chunk of rows that are already in the tables."""

    ids: set[bytes]
    to_render: set[bytes]
    existing: ItemLookup


@dataclass
class Plan:
    """A manifest compared with a dataset, row by row.

    While the rows are consumed, `counts` fills with "rows", one entry for each status and "clips" (the items to
    render), and `work` with the cost of those items.

    With `samples` N, each row stands for N rows: itself, and N-1 whose seeds follow from its own and whose ids end in
    "-s1" and so on. A selection by id takes a row with all of its samples; an id with such an ending takes that
    sample alone. Rows of a dataset's failed/ are samples already, but for those that were illegal.
    """

    manifest: str
    rules: RowRules
    builder: ItemBuilder
    existing: ExistingRows = field(default_factory=ExistingRows)
    selection: Selection = field(default_factory=Selection)
    retry_failed: bool = False
    #: The run stops after stage 1, so a row with a preview is done.
    latents_only: bool = False
    samples: int = 1
    #: The manifest is a table of previews, of which these items are to be finished. The other previews are passed over.
    promote: frozenset[str] | None = None
    #: Rows of the manifest, once it was opened and if its files say so.
    manifest_rows: int | None = None
    counts: Counter[str] = field(default_factory=Counter, init=False)
    work: PlannedWork = field(default_factory=PlannedWork, init=False)
    #: The cost of items that were counted and then refused.
    refused_work: PlannedWork = field(default_factory=PlannedWork, init=False)

    def __post_init__(self) -> None:
        #: Selected ids that no row has had yet, of the shard where there is one.
        self.unmet: set[str | None] = set(self.selection.ids or ())
        self._templates = TemplateCache(self.rules, self.builder.item)
        self._images = ImageLookAhead(digest_of_image)
        # None where nothing was: it is asked for every row.
        self._removed = self.existing.removed or None
        # records of 96 bits of each id's hash and 32 bits of its row's item_id
        self._ids = IdTable(16)
        # 48 bits of each item_id to render: items are only counted, and a few in fifty million may be missed
        self._to_render = IdTable(6, head=4)

    @property
    def complete(self) -> bool:
        """Whether the plan takes every row of its manifest."""
        return self.selection == Selection()

    @property
    def expected_rows(self) -> int | None:
        """How many rows the plan will have; None where only reading the manifest tells. Repeated rows are counted."""
        if self.manifest_rows is None or self.selection.ids is not None:
            return None
        first, _, step = self._shard()
        rows = len(range(first, self.manifest_rows, step))
        limit = self.selection.limit
        return (rows if limit is None else min(rows, limit)) * self.samples

    @property
    def next_is_ready(self) -> bool:
        """Whether the next row of `rows` is to be had without waiting for its images."""
        return self._images.ready

    def against(self, existing: ExistingRows) -> Plan:
        """The same plan compared with another dataset. Nothing is counted yet."""
        return dataclasses.replace(self, existing=existing)

    def open(self) -> Iterator[PlanEntry]:
        """`rows` of `read`."""
        return self.rows(self.read())

    def read(self, say: Callable[[str], None] = lambda message: None, extra: bool = True) -> Iterator[RawRow]:
        """Check the manifest as a whole (ValueError), name the files that it leaves out, and return its rows.

        Without `extra` the rows may lack columns that no request has, which may be large.
        """
        if self.retry_failed and self.samples != 1:
            raise ValueError(f"--samples-per-prompt: {self.samples}, legal: 1 for a retry, whose rows are samples")
        manifest = open_manifest(self.manifest)
        manifest.say_skipped(say)
        self.manifest_rows = manifest.row_count
        return manifest.rows(extra)

    def selected_raws(self, raws: Iterator[RawRow]) -> Iterator[RawRow]:
        """Those of `raws` that the shard and the limit take; ids select none of them out."""
        return itertools.islice(itertools.islice(raws, *self._shard()), self.selection.limit)

    def rows(self, raws: Iterator[RawRow]) -> Iterator[PlanEntry]:
        """The selected ones of `raws` with their samples, judged, counted and with a status."""
        taken, all_ids = 0, self.selection.ids is None
        for chunk in _chunks(itertools.islice(raws, *self._shard())):
            drafts = [self._drafted(raw) for raw in chunk]
            looked_up = self._look_up([row for rows in drafts if rows for row in rows])
            ready: Iterable[Sequence[PlannedRow] | _Judged]
            if None in drafts:
                ready = self._images.over(map(self._judged, chunk, drafts), _images_of)
            else:
                ready = cast(list[Sequence[PlannedRow]], drafts)  # Rows with templates have no images.
            for draft in ready:
                rows, found = (self._samples(draft), None) if isinstance(draft, _Judged) else (draft, looked_up)
                selected = False
                for row in rows if all_ids else self._selected(rows):
                    selected = True
                    decided = self._decided(row, found) if isinstance(row, PlannedRow) else row
                    if isinstance(decided, PlannedRow):
                        if decided.status == TODO:
                            if self._passes_over(decided):
                                continue
                            self._count_clip(decided, found)
                    elif self._is_removed(decided):
                        self.counts[REMOVED] += 1
                        continue
                    self.counts["rows"] += 1
                    self.counts[decided.status] += 1
                    yield decided
                taken += selected
                if self.selection.limit is not None and taken >= self.selection.limit:
                    self.unmet.clear()  # The rest of the manifest, which may have them, is not read.
                    return

    def say_missing_ids(self, say: Callable[[str], None]) -> None:
        """Name ids that were selected and that the manifest, or the shard of it, read to its end, does not have."""
        if self.unmet:
            shown = ", ".join(sorted(str(row_id) for row_id in self.unmet)[:10])
            manifest, shard = recorded(self.manifest), self.selection.shard
            place = manifest if shard is None else f"shard {shard[0]}/{shard[1]} of {manifest}"
            say(f"--ids: {len(self.unmet)} ids are not in {place}, such as {shown}")

    # --- rows without a status ------------------------------------------------------------------

    def _drafted(self, raw: RawRow) -> Sequence[PlannedRow] | None:
        """The samples of a row that matches a template; None for another row."""
        matched = self._templates.match(raw)
        if matched is None:
            return None
        template, seed, given_id = matched
        item_id_bytes = template.hasher.item_id_bytes(raw.values["prompt"], seed)
        row = PlannedRow(raw, template, item_id_bytes, given_id, seed)
        count = self._count(raw)
        if count == 1:
            return (row,)
        return None if _too_long(given_id, count) else row.samples(count, given_id)

    def _judged(self, raw: RawRow, draft: Sequence[PlannedRow] | None) -> Sequence[PlannedRow] | _Judged:
        """The samples of a row that has a template; another row is judged here. Nothing is read for that."""
        return _Judged(raw, judge(raw, self.rules)) if draft is None else draft

    def _samples(self, judged: _Judged) -> Sequence[PlanEntry]:
        """The samples of a row without a template, or the row itself when it is illegal."""
        raw, row = judged
        # An illegal row stands for all its samples, and a retry renders them.
        count = self._count(raw)
        unplanned = raw._replace(samples=count)
        if isinstance(row, IllegalRow):
            return (replace(row, raw=unplanned),)
        given_id = row.request.id
        if _too_long(given_id, count):
            longest = LONGEST_ID - len(sample_id("", count - 1))
            legal = f"at most {longest} characters, because --samples-per-prompt appends {sample_id('', count - 1)}"
            return (IllegalRow(unplanned, (RowProblem("id", given_id, legal),)),)
        try:
            item = self.builder.item(row.request, self._images.digest)
        except UnreadableImage as error:
            problem = RowProblem("images", error.path, f"an image that can be read ({error.reason})")
            return (IllegalRow(unplanned, (problem,)),)
        except ImageOutOfReach as error:
            return (UnreadRow.of(unplanned, row.request, error),)
        planned = PlannedRow(raw, RowTemplate(item), bytes.fromhex(item.item_id), given_id, row.request.seed, item)
        return planned.samples(count, given_id)

    def _count(self, raw: RawRow) -> int:
        return raw.samples if raw.from_failed else self.samples

    def _selected(self, rows: Sequence[PlanEntry]) -> Sequence[PlanEntry]:
        """Those samples of a row that the ids select."""
        ids = self.selection.ids
        assert ids is not None
        self.unmet.difference_update(row.id for row in rows)
        if rows[0].id in ids:
            return rows
        return [row for row in rows if row.id in ids]

    # --- statuses --------------------------------------------------------------------------------

    def _look_up(self, rows: Sequence[PlannedRow]) -> _LookedUp:
        self._ids.settle()
        self._to_render.settle()
        return _LookedUp(
            self._ids.settled([row.id_head for row in rows]),
            self._to_render.settled([row.item_id_bytes[:4] for row in rows]),
            self.existing.look_up([row.item_head for row in rows]),
        )

    def _decided(self, row: PlannedRow, found: _LookedUp | None) -> PlanEntry:
        """The row with its status; `found` is None when it was not looked up with others."""
        head, more, item = row.id_head, row.id_hash[8:12], row.item_id_bytes[8:12]
        for rest in self._ids.rests(head, settled=found is None or head in found.ids):
            if rest[:4] == more:
                if rest[4:] == item:
                    row.status = REPEATED
                    return row
                if row.from_failed:
                    continue  # failed/ holds rows of several manifests, whose ids may clash
                return IllegalRow(row.raw._replace(duplicate=True), (duplicate_id(row.id),))
        self._ids.put(head, more + item)
        row.status = self._status(row, found)
        return row

    def _is_removed(self, row: IllegalRow | UnreadRow) -> bool:
        """Whether a row whose item is not known was taken down: it is not to be in failed/ again."""
        row_id = row.raw.values.get("id") if self._removed is not None else None
        return self._removed is not None and row_id is not None and self._removed.has_row(None, str(row_id))

    def _passes_over(self, row: PlannedRow) -> bool:
        """Whether a row is a preview that a promotion leaves out, such as an older one of the same id."""
        if self.promote is None or row.item_id in self.promote:
            return False
        return self.existing.has_preview(row.item_id, row.key)

    def _count_clip(self, row: PlannedRow, found: _LookedUp | None) -> None:
        """Count what is to be rendered, once for all rows of an item."""
        head, rest = row.item_id_bytes[:4], row.item_id_bytes[4:6]
        if not self._to_render.has(head, rest, settled=found is None or head in found.to_render):
            self._to_render.put(head, rest)
            self.counts["clips"] += 1
            self.work.add(row.estimate(self.builder.checkpoint.transformer))

    def _status(self, row: PlannedRow, found: _LookedUp | None) -> str:
        existing = self.existing
        if self._removed is not None and self._removed.has(row.item_id_bytes, row.id_hash):
            return REMOVED
        if found is None or found.existing.may_have_rows(row.item_head):
            if existing.has_row(row.item_id, row.key):
                return DONE
            copied = existing.key_of(row.item_id) is not None
        else:
            copied = False
        if self.latents_only and existing.has_preview(row.item_id, row.key):
            return DONE
        if copied:
            return COPY
        if not self.retry_failed and existing.may_have_failures and existing.failure(row.item_id, row.key) == "row":
            return FAILED
        return TODO

    def _shard(self) -> tuple[int, None, int]:
        index, count = self.selection.shard or (0, 1)
        return index, None, count


def _chunks(raws: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    """Rows in chunks, which are small where rows come slowly."""
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
