"""Which rows of the previews a person has chosen: conditions on their columns, as the command line takes them."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

from ltx_ray.dataset.layout import INDEX_SCHEMA
from ltx_ray.dataset.writer import read_part
from ltx_ray.storage.store import Store

_CONDITION = re.compile(r"\s*(\w+)\s*(!=|<=|>=|!~|=|<|>|~)\s*(.*?)\s*", re.DOTALL)
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_LEGAL = "COLUMN OP VALUE, OP one of = != < <= > >= ~ (contains) !~"

Condition = Callable[[dict[str, Any]], bool]


def parse_condition(text: str) -> Condition:
    """`COLUMN OP VALUE` over a row of the index. Raises ValueError for one that no row could meet.

    `~` looks for the value in a text or a list, `!~` for its absence; a null meets `!=` and `!~` alone.
    """
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise ValueError(f"--where: {text!r}, legal: {_LEGAL}")
    name, op, given = match.groups()
    if name not in INDEX_SCHEMA.names:
        raise ValueError(f"--where: {text!r}: no column {name!r}; legal: {', '.join(INDEX_SCHEMA.names)}")
    kind = INDEX_SCHEMA.field(name).type
    if op in ("~", "!~"):
        if not (pa.types.is_string(kind) or pa.types.is_list(kind)):
            raise ValueError(f"--where: {text!r}: column {name!r} holds {kind}; legal: ~ on texts and lists")
        return lambda row: _contains(row[name], given) == (op == "~")
    value: Any = given
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        try:
            value = float(given)
        except ValueError:
            raise ValueError(f"--where: {text!r}: column {name!r} holds numbers; legal: a number") from None
    elif not pa.types.is_string(kind):
        raise ValueError(f"--where: {text!r}: column {name!r} holds {kind}; legal: columns of numbers and texts")
    compare = _COMPARE[op]
    return lambda row: compare(row[name], value) if row[name] is not None else op == "!="


def _contains(held: Any, given: str) -> bool:
    if isinstance(held, list):
        return any(given == (x if isinstance(x, str) else json.dumps(x)) for x in held)
    return held is not None and given in held


def preview_rows(store: Store) -> Iterator[dict[str, Any]]:
    """Rows of `previews/`, one a clip that stopped after stage 1."""
    for name in store.list_names("previews"):
        if name.startswith("part-") and name.endswith(".parquet"):
            yield from read_part(store, f"previews/{name}").to_pylist()


def chosen_items(store: Store, ids: frozenset[str] | None, conditions: Iterable[Condition]) -> dict[str, str]:
    """By id, the item of each preview that is among `ids` (None: all) and meets every condition.

    A row that was tried again after it had been edited has several previews: the newest counts. Raises ValueError
    when `ids` names one that has no preview.
    """
    conditions = list(conditions)
    newest: dict[str, tuple[Any, str, bool]] = {}
    for row in preview_rows(store):
        meets = (ids is None or row["id"] in ids) and all(met(row) for met in conditions)
        found = row["finished_at"], row["item_id"], meets
        newest[row["id"]] = max(newest.get(row["id"], found), found)
    if unknown := sorted((ids or frozenset()) - newest.keys()):
        shown = ", ".join(unknown[:10])
        raise ValueError(f"--ids: {len(unknown)} ids have no preview in {store.uri}, such as {shown}")
    return {row_id: item for row_id, (_, item, meets) in newest.items() if meets}
