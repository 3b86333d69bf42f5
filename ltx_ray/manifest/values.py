"""Arrow's values as Python's: whatever a column holds becomes a value that `json` can write, and that is not large.

Columns that a request has keep their values. In any other column, bytes and long texts become their size and digest,
and what Python has no type for becomes text.
"""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyarrow as pa

#: Characters or bytes of a value of an unknown column above which its size and digest take its place.
LARGEST_VALUE = 64 * 1024
#: The integers up to which a column of floats holds every one, by the bits of its type.
_EXACT_INTEGERS = {16: 2**11, 32: 2**24}
#: Bytes that are short enough to be a key or a digest rather than a picture. They become hexadecimal digits.
_SHORT_BYTES = 64

Cells = Callable[[pa.Array], list[Any]]


def cells_of(type_: pa.DataType, known: bool, integers: bool = False) -> Cells:
    """A function from an Arrow column of `type_` to the column's values.

    `known`: whether a request has the column. `integers`: whether its values stand for integers there.
    """
    if pa.types.is_integer(type_):
        return _listed
    if pa.types.is_floating(type_):
        return partial(_narrow_integers, bits=type_.bit_width) if integers and type_.bit_width < 64 else _floats
    if is_text(type_):
        return _texts if known else _short_texts
    if pa.types.is_dictionary(type_):
        return partial(_from_dictionary, cells=cells_of(type_.value_type, known, integers))
    if getattr(type_, "unit", None) == "ns" and not known:
        return partial(_nanoseconds, micros=_in_micros(type_))
    if not known and _needs_care(type_):
        return _careful
    return partial(_nested, known=known)


def digest_of(data: Any) -> dict[str, Any]:
    """What stands for `data` (bytes, or a buffer of them) where there is no place for it."""
    view = memoryview(data)
    return {"bytes": view.nbytes, "sha256": hashlib.sha256(view).hexdigest()}


def short(text: str) -> str | dict[str, Any]:
    """`text`, or its size and digest when it is long."""
    return text if len(text) <= LARGEST_VALUE else digest_of(text.encode("utf-8", "surrogatepass"))


def without_floats(value: Any, unwanted: Callable[[float], bool]) -> Any:
    """`value` with None in place of the floats in it that are `unwanted`."""
    if isinstance(value, Mapping):
        return {k: without_floats(v, unwanted) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_floats(v, unwanted) for v in value]
    return None if isinstance(value, float) and unwanted(value) else value


# --- whole columns -----------------------------------------------------------------------------------------------


def _listed(column: pa.Array) -> list[Any]:
    return column.to_pylist()


def _floats(column: pa.Array) -> list[Any]:
    # pandas writes gaps in a column of numbers as NaN
    return [None if value is None or math.isnan(value) else value for value in column.to_pylist()]


def _narrow_integers(column: pa.Array, bits: int) -> list[Any]:
    """Integers as floats of few bits. One that may have been another integer becomes text, which is no integer."""
    exact = _EXACT_INTEGERS[bits]
    return [
        value if value is None or abs(value) < exact else f"{value:.0f} as a float of {bits} bits"
        for value in _floats(column)
    ]


def _texts(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_text(scalar) for scalar in column]


def _short_texts(column: pa.Array) -> list[Any]:
    values = _texts(column)
    if column.nbytes <= LARGEST_VALUE:
        return values
    return [value if value is None else short(value) for value in values]


def _from_dictionary(column: pa.DictionaryArray, cells: Cells) -> list[Any]:
    """A column whose rows share values: each value is converted once."""
    values = cells(column.dictionary)
    return [None if index is None else values[index] for index in column.indices.to_pylist()]


def _nested(column: pa.Array, known: bool) -> list[Any]:
    """A column of any other type. Its classes of errors are Arrow's, Python's and the time zone database's."""
    try:
        values = column.to_pylist()
    except Exception:
        return _careful(column)
    return [without_floats(value, math.isnan) for value in values] if known else values


def _nanoseconds(column: pa.Array, micros: pa.DataType) -> list[Any]:
    """A column of times. Most writers have a finer unit than their values need."""
    try:
        return _nested(column.cast(micros), known=False)
    except pa.ArrowInvalid:
        return _careful(column)


def _in_micros(type_: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(type_):
        return pa.timestamp("us", type_.tz)
    return pa.time64("us") if pa.types.is_time(type_) else pa.duration("us")


def _careful(column: pa.Array) -> list[Any]:
    return [_value(scalar) for scalar in column]


# --- single values -----------------------------------------------------------------------------------------------


def is_text(type_: pa.DataType) -> bool:
    return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)


def is_bytes(type_: pa.DataType) -> bool:
    return (
        pa.types.is_binary(type_)
        or pa.types.is_large_binary(type_)
        or pa.types.is_fixed_size_binary(type_)
        or pa.types.is_binary_view(type_)
    )


def _is_plain_extension(type_: pa.DataType) -> bool:
    """Whether Arrow has a Python type for the values of an extension type, and not for those of its storage alone."""
    return type_.extension_name in ("arrow.uuid", "arrow.json", "arrow.bool8")


def _needs_care(type_: pa.DataType) -> bool:
    """Whether values of `type_` may be bytes, or times finer than Python's, for which pyarrow wants pandas."""
    if isinstance(type_, pa.BaseExtensionType):
        return not _is_plain_extension(type_)
    if pa.types.is_dictionary(type_) or pa.types.is_run_end_encoded(type_):
        return _needs_care(type_.value_type)
    if is_bytes(type_):
        return True
    if pa.types.is_timestamp(type_) or pa.types.is_time(type_) or pa.types.is_duration(type_):
        return type_.unit == "ns"
    return any(_needs_care(type_.field(n).type) for n in range(type_.num_fields))


def _text(scalar: pa.Scalar) -> str | None:
    """A text. Bytes that are not UTF-8 become lone surrogates, which no column takes and JSON escapes."""
    return scalar.as_buffer().to_pybytes().decode("utf-8", "surrogateescape") if scalar.is_valid else None


def _value(scalar: pa.Scalar) -> Any:
    """A value of any type, as one that `json.dumps(..., default=str)` writes. None when there is no way to write it."""
    if not scalar.is_valid:
        return None
    type_ = scalar.type
    if not _needs_care(type_) and not is_text(type_):
        try:
            return scalar.as_py()
        except Exception:  # whose classes are Arrow's, Python's and the time zone database's
            pass
    if isinstance(type_, pa.BaseExtensionType) or pa.types.is_dictionary(type_) or pa.types.is_run_end_encoded(type_):
        return _value(scalar.value)
    if is_text(type_):
        return short(_text(scalar) or "")
    if is_bytes(type_):
        buffer = scalar.as_buffer()
        return buffer.to_pybytes().hex() if buffer.size <= _SHORT_BYTES else digest_of(buffer)
    if pa.types.is_struct(type_):
        return {type_.field(n).name: _value(scalar[n]) for n in range(type_.num_fields)}
    if pa.types.is_map(type_):
        return [[_value(pair[0]), _value(pair[1])] for pair in scalar.values]
    if type_.num_fields:
        return [_value(item) for item in scalar.values]
    return _time(scalar)


def _time(scalar: pa.Scalar) -> Any:
    """A point or a length in time, or another value that Python has no type for, as text."""
    type_ = scalar.type
    try:
        if getattr(type_, "unit", None) == "ns":
            return _finest_time(scalar)
        if pa.types.is_timestamp(type_) and type_.tz:
            # the zone is unknown here
            return str(pa.scalar(scalar.value, pa.timestamp(type_.unit, "UTC")).as_py())
    except Exception:
        pass
    try:
        text = scalar.cast(pa.string()).as_py()
        return str(scalar.value) if text.startswith("<") else text
    except Exception:
        return None


def _finest_time(scalar: pa.Scalar) -> str:
    """A time of nanoseconds, written as Python writes it down to the microsecond, and with three more digits if any."""
    micros, rest = divmod(scalar.value, 1000)
    type_ = _in_micros(scalar.type)
    try:
        time = pa.scalar(micros, type_).as_py()
    except pa.ArrowInvalid:  # the zone is unknown here
        time = pa.scalar(micros, pa.timestamp("us", "UTC")).as_py()
    if not rest:
        return str(time)
    if isinstance(time, datetime.timedelta):
        return f"{time}{'' if time.microseconds else '.000000'}{rest:03}"
    if isinstance(time, datetime.time):
        return f"{time.isoformat('microseconds')}{rest:03}"
    text = time.isoformat(" ", "microseconds")
    end = len("2026-01-31 12:00:00.000000")  # where the zone begins
    return f"{text[:end]}{rest:03}{text[end:]}"
