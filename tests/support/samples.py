"""Small inputs that unit tests share: manifests, requests, recipes and weight files."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ltx_ray.manifest.reader import RawRow
from ltx_ray.manifest.rules import IllegalRow, LegalRow, RowRules, judge
from ltx_ray.records import Recipe, RenderRequest

#: Columns of the smallest clip in the fewest steps.
SMALL = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "I8": 1}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any] | str]) -> str:
    """A manifest of `rows`; strings go in as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def judged(values: Mapping[str, Any], rules: RowRules | None = None) -> LegalRow | IllegalRow:
    """The judgement on a row of the file m.jsonl, line 1."""
    return judge(RawRow("m.jsonl", 1, values), rules or RowRules())


def request(**values: Any) -> RenderRequest:
    """A legal request; `values` are those of its manifest row."""
    row = judged({"prompt": "a cat", **values})
    assert isinstance(row, LegalRow), row.messages()
    return row.request


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "pipeline": "hq",
        "dtype": "bfloat16",
        "precision": "bf16",
        "noise_device": "model",
        "checkpoint": "c" * 32,
        "gemma": "d" * 32,
        "upsampler": "e" * 32,
        "distilled_lora": "f" * 32,
        "distilled_lora_strengths": (0.25, 0.5),
        "loras": (("a" * 32, 1.0),),
    }
    return Recipe(**{**values, **changes})


def write_safetensors(
    path: Path, tensors: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None, dtype: str = "F32"
) -> str:
    """A safetensors file with tensors of these shapes, filled with a pattern."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + math.prod(shape) * _BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    data = bytes(range(251)) * (end // 251 + 1)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[:end])
    return str(path)
