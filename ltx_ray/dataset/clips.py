"""Clips in the output: published only where there is none, and told whole from cut ones. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

from ltx_ray.records import Clip
from ltx_ray.storage.store import Store


@dataclass(frozen=True)
class ClipMetadata:
    """What an mp4 says of itself. The latents' digest is None in clips of earlier versions."""

    item_id: str
    latents_sha256: str | None


def publish_clip(
    store: Store, clip: Clip, item_id: str, data: bytes, read_metadata: Callable[[bytes], ClipMetadata | None]
) -> Clip:
    """Create the clip, or take the one of the item that is there; returns what the row is to say of it.

    The bytes of an mp4 may differ each time that it is encoded. Another row may have the sha256 of the one that is
    there, so that it stays, unless it is damaged or does not say what it is. `read_metadata` returns None for bytes
    that are no mp4.
    """
    assert clip.path is not None
    while not store.create(clip.path, data):
        try:
            there, version = store.read_versioned(clip.path)
        except FileNotFoundError:
            continue
        found = read_metadata(there) if is_whole(there) else None
        if found is not None and found.item_id == item_id and found.latents_sha256 is not None:
            differ = ("latents_differ",) if found.latents_sha256 != clip.latents_sha256 else ()
            return dataclasses.replace(
                clip, sha256=hashlib.sha256(there).hexdigest(), latents_sha256=found.latents_sha256,
                flags=(*clip.flags, *differ),
            )  # fmt: skip
        if store.update(clip.path, data, version):
            break
    return clip


def is_whole(data: bytes) -> bool:
    """Whether the top-level boxes of `data` are those of an mp4 and end where it ends."""
    return _are_whole_boxes(len(data), lambda count, offset: data[offset : offset + count])


def is_whole_mp4(path: str) -> bool | None:
    """The same of a local file; None without a file."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return _are_whole_boxes(os.fstat(handle).st_size, lambda count, offset: os.pread(handle, count, offset))
    finally:
        os.close(handle)


def _are_whole_boxes(end: int, read: Callable[[int, int], bytes]) -> bool:
    """`read(count, offset)` gives bytes of what has `end` bytes.

    A box is its size (4 bytes), its type (4 bytes) and, for size 1, its size in 8 bytes (ISO/IEC 14496-12, 4.2).
    """
    offset = 0
    kinds: list[bytes] = []
    while offset < end:
        head = read(16, offset)
        size, kind = int.from_bytes(head[:4]), head[4:8]
        if size == 1:
            size = int.from_bytes(head[8:16])
        elif size == 0:  # the box ends with the file
            size = end - offset
        if size < 8 or not (kinds or kind == b"ftyp"):
            return False
        kinds.append(kind)
        offset += size
    return offset == end and b"moov" in kinds and b"mdat" in kinds
