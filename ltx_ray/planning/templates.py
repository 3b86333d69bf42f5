"""Templates for rows that differ in prompt, seed, id and unknown columns only.

Such rows are judged once, and what they share is hashed once. Most manifests of millions of rows have few templates,
so planning takes a few microseconds per row.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from functools import cached_property
from operator import itemgetter
from typing import Any

from ltx_ray.manifest.columns import COLUMNS, MAX_SEED, Mistyped
from ltx_ray.manifest.raw import RawRow
from ltx_ray.manifest.rules import IllegalRow, RowRules, extra_json, judge
from ltx_ray.planning.estimate import ClipEstimate
from ltx_ray.planning.identity import ItemHasher
from ltx_ray.records import RenderRequest, WorkItem

_PROMPT, _SEED, _ID = (COLUMNS[name] for name in ("prompt", "seed", "id"))
_FREE = frozenset({"prompt", "seed", "id"})
#: Templates, and sets of columns, that are cached. A full cache is cleared.
_CACHED = 1024
_UNKNOWN: Any = object()


class RowTemplate:
    """What the rows of a template share, taken from the work item of one of them."""

    def __init__(self, item: WorkItem):
        self.item = item
        #: What each clip costs, once that is known.
        self.estimate: ClipEstimate | None = None

    @cached_property
    def hasher(self) -> ItemHasher:
        return ItemHasher(self.item.request, self.item.recipe, self.item.image_digests)

    def fill(self, raw: RawRow, item_id: str, row_id: str, seed: int) -> WorkItem:
        """The work item of a legal row."""
        own = {"prompt": raw.values["prompt"], "seed": seed, "id": row_id, "extra": extra_json(raw)}
        request = RenderRequest(**{**vars(self.item.request), **own})
        return dataclasses.replace(self.item, item_id=item_id, request=request)


class TemplateCache:
    """Templates of the rows seen so far. `item` makes the work item of a request without images."""

    def __init__(self, rules: RowRules, item: Callable[[RenderRequest], WorkItem]):
        self._rules, self._item = rules, item
        self._templates: dict[tuple, RowTemplate | None] = {}
        self._shared: dict[tuple[str, ...], tuple[tuple[str, ...], Callable]] = {}

    def match(self, raw: RawRow) -> tuple[RowTemplate, int, str | None] | None:
        """(template, seed, given id) of a legal row; None for a row that has to be judged on its own.

        These are illegal rows and rows with images, which take long to read.
        """
        values = raw.values
        if raw.unreadable is not None or raw.duplicate or values.get("images"):
            return None
        try:
            prompt = _PROMPT.parse(values.get("prompt"))
            seed = values.get("seed")
            seed = None if seed is None else _SEED.parse(seed)
            row_id = values.get("id")
            row_id = None if row_id is None else _ID.parse(row_id)
        except Mistyped:
            return None
        if not (
            _PROMPT.check(prompt)
            and (seed is None or _SEED.check(seed))
            and (row_id is None or _ID.check(row_id))
            and (template := self._of(raw)) is not None
        ):
            return None
        return template, template.item.request.seed if seed is None else seed, row_id

    def _of(self, raw: RawRow) -> RowTemplate | None:
        columns = tuple(raw.values)
        found = self._shared.get(columns)
        if found is None:
            _bound(self._shared)
            names = tuple(n for n in columns if n in COLUMNS and n not in _FREE)
            found = self._shared[columns] = names, _getter(names)
        shared, get = found
        values = get(raw.values)
        # 1, 1.0 and True are equal, but True is not a legal number
        key: tuple = raw.from_failed, shared, values, tuple(map(type, values))
        try:
            template = self._templates.get(key, _UNKNOWN)
        except TypeError:  # a list among the values
            key = raw.from_failed, shared, repr(values)
            template = self._templates.get(key, _UNKNOWN)
        if template is _UNKNOWN:
            _bound(self._templates)
            template = self._templates[key] = self._made(raw, shared)
        return template

    def _made(self, raw: RawRow, shared: tuple[str, ...]) -> RowTemplate | None:
        values: dict[str, Any] = {name: raw.values[name] for name in shared}
        row = judge(raw._replace(values={**values, "prompt": "any"}), self._rules)
        return None if isinstance(row, IllegalRow) else RowTemplate(self._item(row.request))


def _getter(names: tuple[str, ...]) -> Callable[[Any], tuple]:
    """A getter of a tuple of these items. `itemgetter` gives a tuple for two names or more only."""
    if len(names) > 1:
        return itemgetter(*names)
    return (lambda values: (values[names[0]],)) if names else lambda values: ()


def sample_id(given_id: str, number: int) -> str:
    """Id of sample `number` (from 1) of a row with the id `given_id` in the manifest."""
    return f"{given_id}-s{number}"


def sample_seed(prompt: str, seed: int, number: int) -> int:
    """Seed of sample `number` (from 1) of a row, from its prompt and its own seed, which sample 0 has.

    The same samples of other weights, precisions, LoRA strengths or sizes thus begin with the same noise.
    """
    return _seed_of(f"{seed}:{number}:{prompt}")


def item_sample_seed(item_id: str, number: int) -> int:
    """The same in scheme 1, from the item_id of sample 0, and thus from weights and precision too."""
    return _seed_of(f"{item_id}:{number}")


def _seed_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") & MAX_SEED


def _bound(cache: dict[Any, Any]) -> None:
    if len(cache) >= _CACHED:
        cache.clear()
