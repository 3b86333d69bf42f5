"""Values that come as text, from the command line, a config file or a recipe, as their columns' types have them.

A number is what int() or float() of Python take it for: 0750 is 750, 1_000 is 1000, 1e3 is 1000.0; 12:30, 0x10 and 0o17
are no numbers. A number without a fraction fits a column of whole numbers, however it is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from ltx_ray.manifest.columns import Column, Mistyped


def number(text: str) -> int | float:
    """The number that `text` is, an int where it is written as one. Raises Mistyped."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise Mistyped


def json_value(kind: pa.DataType, given: Any) -> Any:
    """`given` (texts, in lists and mappings where `kind` has them) as a JSON value of type `kind`.

    None stays None: a field that is not given. Raises Mistyped.
    """
    if given is None:
        return None
    if pa.types.is_list(kind):
        if not isinstance(given, list) or None in given:
            raise Mistyped
        return [json_value(kind.value_type, part) for part in given]
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        if not isinstance(given, Mapping) or set(given) - set(fields):
            raise Mistyped
        return {name: json_value(fields[name], value) for name, value in given.items()}
    if not isinstance(given, str):
        raise Mistyped
    return given if pa.types.is_string(kind) else number(given)


def legal_value(column: Column, given: Any) -> Any:
    """`given` as a JSON value of `column`. Raises Mistyped, also for a value that the column's check refuses."""
    value = json_value(column.type, given)
    if not column.check(column.parse(value)):
        raise Mistyped
    return value
