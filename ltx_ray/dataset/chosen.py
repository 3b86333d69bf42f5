"""Which rows of the previews a person has chosen: conditions on their columns, as the command line takes them."""

from __future__ import annotations

import io
import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ltx_ray.dataset.writer import INDEX_SCHEMA
from ltx_ray.storage import Store

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
    for name in store.list("previews"):
        if name.startswith("part-") and name.endswith(".parquet"):
            yield from pq.read_table(io.BytesIO(store.read_bytes(f"previews/{name}"))).to_pylist()


def chosen_ids(store: Store, ids: frozenset[str] | None, conditions: Iterable[Condition]) -> frozenset[str]:
    """Ids of the previews that are among `ids` (None: all) and meet every condition.

    Raises ValueError when `ids` names one that has no preview.
    """
    conditions = list(conditions)
    there = set()
    chosen = set()
    for row in preview_rows(store):
        there.add(row["id"])
        if (ids is None or row["id"] in ids) and all(meets(row) for meets in conditions):
            chosen.add(row["id"])
    if unknown := sorted((ids or frozenset()) - there):
        shown = ", ".join(unknown[:10])
        raise ValueError(f"--ids: {len(unknown)} ids have no preview in {store.uri}, such as {shown}")
    return frozenset(chosen)
