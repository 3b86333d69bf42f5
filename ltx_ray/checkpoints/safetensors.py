"""Headers of safetensors files: names, places, dtypes and shapes of the tensors. No torch.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ltx_ray.checkpoints.model_paths import open_binary
from ltx_ray.checkpoints.model_paths import size as size_of
from ltx_ray.storage.file_kinds import HEAD_BYTES, named_kind

MAX_HEADER_BYTES = 100 * 2**20
#: Bytes of an element, by the format's name of the dtype.
ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file: path, key, dtype in the format's spelling, shape, and bytes [start, end).

    `scale` is the one-element tensor by which the values of a quantized tensor are to be multiplied.
    """

    path: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    scale: TensorInfo | None = None

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def scalar(self) -> float:
        """The value of a one-element tensor. Raises ValueError for another size, or a dtype that is not supported."""
        if self.nbytes != ITEM_BYTES.get(self.dtype) or self.dtype not in _SCALARS:
            raise ValueError(f"{self.path}: {self.key} is {self.dtype} {self.shape}; legal: one number")
        with open_binary(self.path) as file:
            file.seek(self.start)
            data = file.read(self.nbytes)
        # A bfloat16 is the upper half of a float32.
        data = b"\0\0" + data if self.dtype == "BF16" else data
        return float(struct.unpack(_SCALARS[self.dtype], data)[0])


_SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b"}


@dataclass(frozen=True)
class SafetensorsHeader:
    """The parsed header of a safetensors file. `size` is that of the whole file, in bytes."""

    path: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    size: int

    @cached_property
    def config(self) -> dict[str, Any]:
        """The JSON object under the metadata key `config`; empty without one. Raises ValueError for any other value."""
        try:
            config = json.loads(self.metadata.get("config", "{}"))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.path}: metadata field 'config' is not JSON ({error})") from None
        if not isinstance(config, dict):
            raise ValueError(f"{self.path}: metadata field 'config' is not a JSON object")
        return config


def read_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """Read and check the header of the safetensors file at `path`.

    Raises ValueError naming the file when it is missing, is not a safetensors file, is shorter than its header says (a
    truncated download), or has tensors whose bytes do not fit their shapes.
    """
    path = os.fspath(path)
    try:
        size = size_of(path)
        with open_binary(path) as file:
            head = file.read(HEAD_BYTES)
            # A header begins with its brace. Its length, which comes first, may look like another kind of file.
            if head[8:9] != b"{" and (kind := named_kind(head)):
                raise ValueError(f"{path}: not a safetensors file but {kind}")
            if len(head) < 8:
                raise ValueError(f"{path}: not a safetensors file ({size} bytes)")
            (length,) = struct.unpack("<Q", head[:8])
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"{path}: not a safetensors file, or cut off inside its header")
            file.seek(8)
            table = json.loads(file.read(length))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ValueError(f"{path}: not a safetensors file (its header is not JSON)") from None
    data = 8 + length
    tensors = {}
    try:
        metadata = dict(table.pop("__metadata__", None) or {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise TypeError
        for name, entry in table.items():
            start, end = map(int, entry["data_offsets"])
            shape = tuple(map(int, entry["shape"]))
            if not isinstance(entry["dtype"], str) or any(n < 0 for n in shape):
                raise ValueError(name)
            tensors[name] = TensorInfo(path, name, entry["dtype"], shape, data + start, data + end)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: not a safetensors file (its header is not a table of tensors)") from None
    end = max((t.end for t in tensors.values()), default=data)
    if end > size:
        raise ValueError(f"{path}: truncated, {size} bytes where its header promises {end}; fetch it again")
    for info in tensors.values():
        items = 1
        for length in info.shape:
            items *= length
        if info.start < data or info.nbytes != items * ITEM_BYTES.get(info.dtype, info.nbytes):
            raise ValueError(
                f"{path}: corrupt, {info.key} is {info.dtype} {info.shape} but has {info.nbytes} bytes; fetch it again"
            )
    return SafetensorsHeader(path, metadata, tensors, size)


def listed(what: str, names: Collection[str]) -> list[str]:
    """A message's list of `names`, cut after ten: ["12 missing (a, b, ...)"]; [] when there are none."""
    if not names:
        return []
    first = ", ".join(sorted(names)[:10])
    return [f"{len(names)} {what} ({first}{', ...' if len(names) > 10 else ''})"]
