"""The manifest's columns: type, legal values, and how a value from any source becomes Python's.

One table serves the manifest reader, the command line's row defaults and the schema of the dataset's index.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from ltx_ray.records import ImageCondition, LoraUse
from ltx_ray.shapes import FRAME_RATES_LEGAL, legal_frame_rate

LONGEST_ID = 128
#: Characters of a value that a message repeats.
_SHOWN = 120
ID_PATTERN = re.compile(rf"[A-Za-z0-9._-]{{1,{LONGEST_ID}}}")
MAX_SEED = 2**63 - 1
#: The smallest and the largest normal number of float32.
_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
#: Legal guidance scales and strengths of the distilled LoRA.
_FLOAT32_LEGAL = "a finite number that float32 holds (0, or from 1.2e-38 to 3.4e+38 in size)"


def near_misses(names: Iterable[str]) -> frozenset[str]:
    """Those of the names that are no column of a request and would be one in another writing, such as `Height`."""
    return frozenset(name for name in names if name not in COLUMNS and written(name) in COLUMNS)


def written(name: str) -> str:
    """A name as columns of requests are written."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


class Mistyped(Exception):
    """The value does not have its column's type."""


class InexactInteger(Mistyped):
    """The value is a float so large that it may have been another integer."""


@dataclass(frozen=True)
class Column:
    """A manifest column.

    `parse` turns a JSON-like value into Python's or raises Mistyped. `check` says whether a parsed value is legal,
    apart from the other columns. `legal` says in words what is. `flag` is the reference's option on its command line.
    """

    name: str
    type: pa.DataType
    parse: Callable[[Any], Any]
    legal: str
    check: Callable[[Any], bool] = lambda value: True
    flag: str | None = None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Mistyped
    return value


def _integer(value: Any) -> int:
    if type(value) is int:
        return value  # Nearly all are, and every row of a plan has some.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Mistyped
    if isinstance(value, float):
        # pandas stores an integer column with gaps as floats
        if not value.is_integer():
            raise Mistyped
        if abs(value) >= 2**53:
            raise InexactInteger
        return int(value)
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Mistyped
    try:
        return float(value) + 0.0  # turns -0.0, which would give another item_id, into 0.0
    except OverflowError:
        return math.inf


def _integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise Mistyped
    return tuple(_integer(v) for v in value)


def _structs(value: Any, allowed: set[str]) -> list[Mapping[str, Any]]:
    if not isinstance(value, list | tuple) or not all(isinstance(v, Mapping) for v in value):
        raise Mistyped
    if any(set(v) - allowed for v in value):
        raise Mistyped
    return list(value)


def _loras(value: Any) -> tuple[LoraUse, ...]:
    return tuple(
        LoraUse(_text(v.get("name")), 1.0 if v.get("strength") is None else _number(v["strength"]))
        for v in _structs(value, {"name", "strength"})
    )


def _images(value: Any) -> tuple[ImageCondition, ...]:
    return tuple(
        ImageCondition(
            path=_text(v.get("path")),
            frame_idx=0 if v.get("frame_idx") is None else _integer(v["frame_idx"]),
            strength=1.0 if v.get("strength") is None else _number(v["strength"]),
            crf=None if v.get("crf") is None else _integer(v["crf"]),
        )
        for v in _structs(value, {"path", "frame_idx", "strength", "crf"})
    )


def _encodable(value: str) -> bool:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
    return "\x00" not in value


def float32_holds(value: float) -> bool:
    """Whether float32, in which scales and strengths are computed with, holds `value` at its full precision."""
    return value == 0 or _SMALLEST <= abs(value) <= _LARGEST


def _legal_image(image: ImageCondition) -> bool:
    return (
        bool(image.path)
        and _encodable(image.path)
        and 0 <= image.frame_idx < 2**31
        and 0 <= image.strength <= 1
        and float32_holds(image.strength)
        and (image.crf is None or 0 <= image.crf <= 51)
    )


LORA_TYPE = pa.list_(pa.struct([("name", pa.string()), ("strength", pa.float64())]))
IMAGE_TYPE = pa.list_(
    pa.struct([("path", pa.string()), ("frame_idx", pa.int32()), ("strength", pa.float64()), ("crf", pa.int32())])
)
_BLOCKS = pa.list_(pa.int32())


def _guidance(prefix: str, modality_flag: str) -> list[Column]:
    def scale(name: str, flag: str) -> Column:
        return Column(f"{prefix}_{name}", pa.float64(), _number, _FLOAT32_LEGAL, float32_holds, flag)

    return [
        scale("cfg_scale", f"{prefix}-cfg-guidance-scale"),
        scale("stg_scale", f"{prefix}-stg-guidance-scale"),
        scale("rescale_scale", f"{prefix}-rescale-scale"),
        scale("modality_scale", modality_flag),
        Column(
            f"{prefix}_stg_blocks", _BLOCKS, _integers, "a list of transformer block numbers, from 0",
            lambda v: all(0 <= b < 2**31 for b in v), f"{prefix}-stg-blocks",
        ),
        Column(
            f"{prefix}_skip_step", pa.int32(), _integer, "a whole number from 0 to 1000",
            lambda v: 0 <= v <= 1000, f"{prefix}-skip-step",
        ),
    ]  # fmt: skip


def _strength(stage: int) -> Column:
    name = f"distilled_lora_strength_stage_{stage}"
    return Column(name, pa.float64(), _number, _FLOAT32_LEGAL, float32_holds, name.replace("_", "-"))


_COLUMNS = [
    Column("id", pa.string(), _text, "1 to 128 of the characters A-Z a-z 0-9 . _ -",
           lambda v: ID_PATTERN.fullmatch(v) is not None),
    Column("prompt", pa.string(), _text, "text that is not blank", lambda v: bool(v.strip()) and _encodable(v)),
    Column("negative_prompt", pa.string(), _text, "text (empty for none)", _encodable, "negative-prompt"),
    Column("seed", pa.int64(), _integer, "a whole number from 0 to 2^63-1", lambda v: 0 <= v <= MAX_SEED, "seed"),
    Column("height", pa.int32(), _integer, "a positive multiple of 64", lambda v: 0 < v < 2**31, "height"),
    Column("width", pa.int32(), _integer, "a positive multiple of 64", lambda v: 0 < v < 2**31, "width"),
    Column("num_frames", pa.int32(), _integer, "8*k + 1", lambda v: 0 < v < 2**31, "num-frames"),
    Column("frame_rate", pa.float64(), _number, FRAME_RATES_LEGAL,
           legal_frame_rate, "frame-rate"),
    Column("num_inference_steps", pa.int32(), _integer, "a whole number from 2 to 1000 (one step makes 0/0)",
           lambda v: 2 <= v <= 1000, "num-inference-steps"),
    *_guidance("video", "a2v-guidance-scale"),
    *_guidance("audio", "v2a-guidance-scale"),
    _strength(1),
    _strength(2),
    Column("loras", LORA_TYPE, _loras, "a list of {name, strength}, names declared with --lora",
           lambda v: all(_encodable(use.name) and float32_holds(use.strength) for use in v)
           and len({use.name for use in v}) == len(v)),
    Column("images", IMAGE_TYPE, _images, "a list of {path, frame_idx, strength, crf}; strength 0 to 1, crf 0 to 51",
           lambda v: all(map(_legal_image, v))),
    Column("pipeline", pa.string(), _text, "hq, base or distilled", _encodable),
]  # fmt: skip

#: Manifest columns by name, in the order in which they are shown and stored.
COLUMNS: Mapping[str, Column] = MappingProxyType({column.name: column for column in _COLUMNS})


def arrow_type_fits(column: Column, type_: pa.DataType) -> bool:
    """Whether a Parquet column of Arrow type `type_` can hold values of `column`."""
    return _fits(column.type, type_)


def _fits(expected: pa.DataType, type_: pa.DataType) -> bool:
    if pa.types.is_null(type_):
        return True
    if pa.types.is_dictionary(type_):
        return _fits(expected, type_.value_type)
    if pa.types.is_string(expected):
        return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)
    if pa.types.is_list(expected):
        return _is_list(type_) and _fits(expected.value_type, type_.value_type)
    if pa.types.is_struct(expected):
        names = [field.name for field in type_] if pa.types.is_struct(type_) else []
        fields = {field.name: field.type for field in expected}
        return (
            pa.types.is_struct(type_)
            and len(names) == len(set(names))
            and all(field.name in fields and _fits(fields[field.name], field.type) for field in type_)
        )
    return pa.types.is_integer(type_) or pa.types.is_floating(type_)


def _is_list(type_: pa.DataType) -> bool:
    return (
        pa.types.is_list(type_)
        or pa.types.is_large_list(type_)
        or pa.types.is_fixed_size_list(type_)
        or pa.types.is_list_view(type_)
        or pa.types.is_large_list_view(type_)
    )


def shown(value: Any) -> str:
    """`value` as a message repeats it: its repr, cut to 120 characters."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
