"""Clips are published only where there is none, and told whole from cut ones by their boxes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from ltx_ray.dataset.clips import ClipMetadata, is_whole, is_whole_mp4, publish_clip
from ltx_ray.dataset.layout import clip_path
from ltx_ray.engine import fake, mp4
from ltx_ray.engine.mp4 import write_mp4
from ltx_ray.records import Clip
from ltx_ray.storage.store import Store
from tests.support.damaged_dataset import ITEMS, boxes

LATENTS = "d" * 64


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def store(request, tmp_path) -> Store:
    return Store(str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("bucket"))


def box(kind: bytes, content: bytes = b"", long: bool = False) -> bytes:
    if long:
        return struct.pack(">I4sQ", 1, kind, 16 + len(content)) + content
    return struct.pack(">I4s", 8 + len(content), kind) + content


def encoded(latents: str = LATENTS, item: str = ITEMS[0], more: bytes = b"") -> bytes:
    """A clip of the item; `more` stands for what an encoder does otherwise each time."""
    return fake.mp4_boxes(item, latents) + box(b"free", more)


def publish(store: Store, data: bytes, latents: str = LATENTS) -> Clip:
    clip = Clip(clip_path(ITEMS[0]), hashlib.sha256(data).hexdigest(), latents, ("black",), "stage_1")
    return publish_clip(store, clip, ITEMS[0], data, fake.read_metadata)


def test_a_clip_that_is_there_is_taken_with_its_own_sha256(store):
    first = publish(store, encoded(more=b"1"))
    again = publish(store, encoded(more=b"2"))
    assert again == first and store.read_bytes(clip_path(ITEMS[0])) == encoded(more=b"1")


def test_a_clip_of_other_latents_is_taken_and_flagged(store):
    publish(store, encoded())
    other = publish(store, encoded("e" * 64), "e" * 64)
    assert (other.latents_sha256, other.flags) == (LATENTS, ("black", "latents_differ"))
    assert other.sha256 == hashlib.sha256(encoded()).hexdigest()


@pytest.mark.parametrize(
    "there",
    [b"", encoded()[:-1], encoded(item=ITEMS[1]), fake.mp4_boxes(ITEMS[0], "no digest")],
    ids=["empty", "cut off", "of another item", "of an earlier version"],
)
def test_a_clip_that_is_no_whole_one_of_the_item_is_replaced(store, there):
    store.write_bytes(clip_path(ITEMS[0]), there)
    clip = publish(store, encoded())
    assert clip.latents_sha256 == LATENTS and clip.flags == ("black",)
    assert store.read_bytes(clip_path(ITEMS[0])) == encoded()


def test_a_clip_that_another_worker_replaces_meanwhile_is_taken(store, monkeypatch):
    store.write_bytes(clip_path(ITEMS[0]), b"cut off")
    real = store.update

    def update(path, data, version):
        store.write_bytes(path, encoded(more=b"theirs"))
        return real(path, data, version)

    monkeypatch.setattr(store, "update", update)
    assert publish(store, encoded(more=b"mine")).sha256 == hashlib.sha256(encoded(more=b"theirs")).hexdigest()


def test_the_metadata_of_an_mp4_says_what_it_is(tmp_path):
    path, frames = tmp_path / "x.mp4", [np.full((9, 96, 64), 128, np.uint8)]
    said = {"item_id": ITEMS[0], "latents_sha256": LATENTS, "ltx_ray": "1.0"}
    settings = {"width": 64, "height": 64, "frame_rate": Fraction(24), "audio": None, "sample_rate": 48000}
    write_mp4(str(path), frames, metadata=said, **settings)
    assert mp4.read_metadata(path.read_bytes()) == ClipMetadata(ITEMS[0], LATENTS)
    write_mp4(str(path), frames, metadata={"item_id": ITEMS[0]}, **settings)
    assert mp4.read_metadata(path.read_bytes()) == ClipMetadata(ITEMS[0], None)
    write_mp4(str(path), frames, metadata={}, **settings)
    assert mp4.read_metadata(path.read_bytes()) is None and mp4.read_metadata(b"x" * 99) is None
    assert dataclasses.asdict(fake.read_metadata(encoded())) == {"item_id": ITEMS[0], "latents_sha256": LATENTS}


# --- boxes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, whole",
    [
        (box(b"ftyp", b"isom") + box(b"moov") + box(b"mdat", b"x" * 100), True),
        (box(b"ftyp") + box(b"free", b"123") + box(b"mdat", b"x" * 100, long=True) + box(b"moov", b"1"), True),
        (box(b"ftyp") + box(b"moov") + struct.pack(">I4s", 0, b"mdat") + b"to the end", True),
        (box(b"ftyp") + box(b"moov") + struct.pack(">I4sQ", 1, b"mdat", 50) + b"too short", False),
        (box(b"ftyp") + box(b"moov"), False),
        (box(b"ftyp") + box(b"mdat", b"1"), False),
        (box(b"moov") + box(b"mdat", b"1"), False),
        (box(b"ftyp") + box(b"moov") + box(b"mdat", b"1") + b"\0\0\0", False),
        (box(b"ftyp") + box(b"moov") + box(b"mdat", b"1") + struct.pack(">I4s", 7, b"free"), False),
        (b"", False),
        (b"\0" * 200, False),
    ],
)
def test_an_mp4_is_whole_when_its_top_level_boxes_are(tmp_path, data, whole):
    (tmp_path / "x.mp4").write_bytes(data)
    assert is_whole_mp4(str(tmp_path / "x.mp4")) is is_whole(data) is whole
    assert is_whole_mp4(str(tmp_path / "none.mp4")) is None


def test_a_muxed_clip_is_whole_only_at_its_full_length(tmp_path):
    path = str(tmp_path / "x.mp4")
    frames = [np.full((9, 96, 64), 128, np.uint8)]
    sound = np.zeros((2, 20000), np.float32)
    write_mp4(path, frames, width=64, height=64, frame_rate=Fraction(24), audio=sound, sample_rate=48000, metadata={})
    data = Path(path).read_bytes()
    assert is_whole_mp4(path) is True
    for cut in (len(data) - 1, len(data) // 2, 40, 8, 4):
        os.truncate(path, cut)
        assert is_whole_mp4(path) is False, cut


def test_the_boxes_of_the_fake_engine_are_whole(tmp_path):
    (tmp_path / "x.mp4").write_bytes(boxes(ITEMS[0]))
    assert is_whole_mp4(str(tmp_path / "x.mp4")) is True
