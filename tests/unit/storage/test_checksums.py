"""Checksums of whole files that a store keeps, and those that are computed while a file arrives."""

from __future__ import annotations

import base64
import hashlib
import sys
import zlib
from types import ModuleType

import pytest

from ltx_ray.storage.checksums import CRC32, CRC64NVME, SHA256, comparable
from ltx_ray.storage.object_access import whole_checksums

BLOCKS = (b"1234", b"", b"56789")
WHOLE = b"".join(BLOCKS)


def encoded(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def computed(kept: dict[str, str]) -> tuple[str, str] | None:
    found = comparable(kept)
    if found is None:
        return None
    name, checksum = found
    for block in BLOCKS:
        checksum.update(block)
    return name, checksum.hexdigest()


@pytest.fixture
def awscrt(monkeypatch):
    """A stand-in for the package, whose CRC has 32 bits."""
    package, module = ModuleType("awscrt"), ModuleType("awscrt.checksums")
    package.checksums, module.crc64nvme = module, zlib.crc32
    monkeypatch.setitem(sys.modules, "awscrt", package)
    monkeypatch.setitem(sys.modules, "awscrt.checksums", module)


@pytest.fixture
def no_awscrt(monkeypatch):
    monkeypatch.setitem(sys.modules, "awscrt.checksums", None)


def test_what_arrives_in_blocks_has_the_checksum_of_the_whole(no_awscrt):
    assert computed({SHA256: "", CRC32: ""}) == (SHA256, hashlib.sha256(WHOLE).hexdigest())
    assert computed({CRC32: ""}) == (CRC32, "cbf43926"), "the check value of this CRC"
    assert computed({}) is None


def test_without_awscrt_the_crc_of_64_bits_is_not_compared(no_awscrt):
    assert computed({CRC64NVME: ""}) is None
    assert computed({CRC64NVME: "", CRC32: ""}) == (CRC32, "cbf43926")


def test_with_awscrt_it_is(awscrt):
    assert computed({CRC64NVME: "", CRC32: ""}) == (CRC64NVME, "00000000cbf43926")


def test_the_crc_of_awscrt_is_that_of_s3():
    pytest.importorskip("awscrt")
    assert computed({CRC64NVME: ""}) == (CRC64NVME, "ae8b14860a799888"), "the check value of CRC-64/NVME"


def test_what_s3_keeps_of_a_whole_object_and_not_of_its_parts():
    sha256, crc32 = hashlib.sha256(WHOLE).digest(), zlib.crc32(WHOLE).to_bytes(4)
    assert whole_checksums({"ChecksumSHA256": encoded(sha256)}) == {SHA256: sha256.hex()}
    in_parts = {
        "ChecksumType": "FULL_OBJECT",
        "ChecksumCRC32": encoded(crc32),
        "ChecksumCRC64NVME": encoded(b"8bytes!!"),
    }
    assert whole_checksums(in_parts) == {CRC32: "cbf43926", CRC64NVME: b"8bytes!!".hex()}
    assert whole_checksums({**in_parts, "ChecksumType": "COMPOSITE"}) == {}
    assert whole_checksums({"ChecksumSHA256": f"{encoded(sha256)}-3", "ETag": '"x"'}) == {}
