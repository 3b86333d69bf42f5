"""Values of tensors in safetensors files, looked at without torch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ltx_ray.checkpoints.model_paths import open_binary
from ltx_ray.checkpoints.safetensors import TensorInfo

#: Bits of a value that are all set when it is infinite or no number, and never otherwise, by the format's dtype.
_NOT_FINITE: dict[str, np.unsignedinteger] = {
    "F64": np.uint64(0x7FF0_0000_0000_0000), "F32": np.uint32(0x7F80_0000), "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80), "F8_E5M2": np.uint8(0x7C), "F8_E4M3": np.uint8(0x7F),
}  # fmt: skip
#: Bytes that are looked at at once.
_CHUNK_BYTES = 8 * 2**20


def first_not_finite(tensors: Iterable[TensorInfo]) -> TensorInfo | None:
    """The first of `tensors`, as they lie in their files, that holds NaN or infinity. It is read in chunks.

    Integers are finite. Raises ValueError naming the file when it cannot be read.
    """
    for info in sorted(tensors, key=lambda info: (info.path, info.start)):
        mask = _NOT_FINITE.get(info.dtype)
        if mask is not None and not _is_finite(info, mask):
            return info
    return None


def _is_finite(info: TensorInfo, mask: np.unsignedinteger) -> bool:
    try:
        with open_binary(info.path) as file:
            file.seek(info.start)
            for start in range(info.start, info.end, _CHUNK_BYTES):
                data = file.read(min(_CHUNK_BYTES, info.end - start))
                if ((np.frombuffer(data, mask.dtype) & mask) == mask).any():
                    return False
    except OSError as error:
        raise ValueError(f"{info.path}: cannot be read ({error.strerror or error})") from None
    return True
