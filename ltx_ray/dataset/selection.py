"""Which previews a person has chosen: filters on their columns, in the command line's syntax."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa

from ltx_ray.dataset.layout import INDEX_SCHEMA, PREVIEWS
from ltx_ray.dataset.parts import read_rows
from ltx_ray.manifest.columns import Mistyped
from ltx_ray.manifest.text_values import number
from ltx_ray.storage.store import Store

_FILTER = re.compile(r"\s*(\w+)\s*(!=|<=|>=|!~|=|<|>|~)\s*(.*?)\s*", re.DOTALL)
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_LEGAL = "COLUMN OP VALUE, OP one of = != < <= > >= ~ (contains) !~"

RowFilter = Callable[[dict[str, Any]], bool]


def parse_filter(text: str) -> RowFilter:
    """Parse `COLUMN OP VALUE`, a filter on rows of the index. Raises ValueError when it does not fit the column.

    `~` means that a text or a list contains the value, `!~` that it does not: a LoRA by its name, an image by its path.
    A null passes `!=` and `!~` only.
    """
    match = _FILTER.fullmatch(text)
    if match is None:
        raise ValueError(f"--where: {text!r}, legal: {_LEGAL}")
    name, op, given = match.groups()
    if name not in INDEX_SCHEMA.names:
        raise ValueError(f"--where: {text!r}: no column {name!r}; legal: {', '.join(INDEX_SCHEMA.names)}")
    kind = INDEX_SCHEMA.field(name).type
    if op in ("~", "!~"):
        if not (pa.types.is_string(kind) or pa.types.is_list(kind)):
            raise ValueError(f"--where: {text!r}: column {name!r} holds {kind}; legal: ~ on texts and lists")
        return lambda row: _contains(row.get(name), given) == (op == "~")
    value: Any = given
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        try:
            # An integer stays one: floats do not hold seeds above 2^53.
            value = number(given)
        except Mistyped:
            raise ValueError(f"--where: {text!r}: column {name!r} holds numbers; legal: a number") from None
    elif not pa.types.is_string(kind):
        raise ValueError(f"--where: {text!r}: column {name!r} holds {kind}; legal: columns of numbers and texts")
    compare = _COMPARE[op]

    def passes(row: dict[str, Any]) -> bool:
        # A preview of an earlier version lacks columns.
        held = row.get(name)
        return op == "!=" if held is None else compare(held, value)

    return passes


def _contains(held: Any, given: str) -> bool:
    if isinstance(held, list):
        # A LoRA and an image are structs that each have one text.
        texts = [value for x in held if isinstance(x, dict) for value in x.values() if isinstance(value, str)]
        return given in texts or any(given == (x if isinstance(x, str) else json.dumps(x)) for x in held)
    return held is not None and given in held


def chosen_items(store: Store, ids: frozenset[str] | None, filters: Iterable[RowFilter]) -> dict[str, str]:
    """item_ids, by row id, of the previews that are among `ids` (None: all) and pass every filter.

    A row that was edited and rendered again has several previews; the newest counts. Raises ValueError when a row of
    `ids` has no preview.
    """
    filters = list(filters)
    newest: dict[str, tuple[Any, str, bool]] = {}
    for row in read_rows(store, PREVIEWS):
        passes = (ids is None or row["id"] in ids) and all(passed(row) for passed in filters)
        found = row["finished_at"], row["item_id"], passes
        newest[row["id"]] = max(newest.get(row["id"], found), found)
    if unknown := sorted((ids or frozenset()) - newest.keys()):
        shown = ", ".join(unknown[:10])
        raise ValueError(f"--ids: {len(unknown)} ids have no preview in {store.name}, such as {shown}")
    return {row_id: item_id for row_id, (_, item_id, passes) in newest.items() if passes}
