"""Checksums of whole files that stores keep, computed while a file arrives."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping
from typing import Protocol

#: The names of checksums, the best first. Of a file that was uploaded in parts, S3 keeps the second or the third.
SHA256, CRC64NVME, CRC32 = "SHA-256", "CRC64NVME", "CRC32"


class Checksum(Protocol):
    """A checksum of the bytes so far, as those of hashlib are."""

    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


class _Crc:
    """A CRC of `digits` hex digits. `step`: of some bytes, going on from the CRC of those before."""

    def __init__(self, step: Callable[[bytes, int], int], digits: int):
        self._step, self._digits, self._value = step, digits, 0

    def update(self, data: bytes) -> None:
        self._value = self._step(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:0{self._digits}x}"


def comparable(kept: Mapping[str, str]) -> tuple[str, Checksum] | None:
    """The best of the checksums that are `kept` (by name) which can be computed here, with an empty one to compute.

    CRC64NVME needs the package awscrt: in Python it would take longer than the file takes to arrive.
    """
    for name in (SHA256, CRC64NVME, CRC32):
        if name in kept and (empty := _empty(name)) is not None:
            return name, empty
    return None


def _empty(name: str) -> Checksum | None:
    if name == SHA256:
        return hashlib.sha256()
    if name == CRC32:
        return _Crc(zlib.crc32, 8)
    try:
        from awscrt.checksums import crc64nvme
    except ImportError:  # It is not installed, or too old.
        return None
    return _Crc(crc64nvme, 16)
