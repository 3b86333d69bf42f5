"""Existing rows of a dataset: listed from file names alone, and updated while a run goes on."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

import pytest

from ltx_ray.dataset.existing import ExistingRows, list_existing
from ltx_ray.dataset.layout import row_key
from ltx_ray.dataset.writer import DatasetWriter
from ltx_ray.manifest.reader import RawRow
from ltx_ray.storage.store import Store
from tests.support.results import CRASH, ITEM, NAN, OTHER, RENDERED
from tests.support.samples import request

A, B, C, D = (row_key(name) for name in "abcd")


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "out"))


def item(n: int) -> str:
    return hashlib.sha256(str(n).encode()).hexdigest()[:32]


def test_the_listing_says_which_rows_exist_and_which_failed(store):
    writer = DatasetWriter(store)
    writer.write_index(ITEM, request(id="a"), RENDERED)
    writer.write_index(ITEM, request(id="b"), RENDERED)
    writer.write_failed(OTHER, request(id="c"), RawRow("m.jsonl", 1, {}), CRASH)
    writer.write_failed(OTHER, request(id="d"), RawRow("m.jsonl", 2, {}), NAN)
    name = writer.write_illegal(RawRow("m.jsonl", 3, {"prompt": ""}), ["m.jsonl:3:prompt: ..."])
    store.write_bytes(f"latents/aa/{ITEM}.safetensors", b"")
    store.write_bytes(f"previews/part-{OTHER}-{C}.parquet", b"")
    existing = list_existing(store)
    assert existing.has_row(ITEM, A) and existing.has_row(ITEM, B) and not existing.has_row(ITEM, C)
    assert existing.key_of(ITEM) in {A, B} and existing.key_of(OTHER) is None
    assert existing.has_latents(ITEM) and not existing.has_latents(OTHER)
    assert existing.has_preview(OTHER, C) and not existing.has_preview(OTHER, A) and not existing.has_preview(ITEM, A)
    assert (existing.preview_of(OTHER), existing.preview_of(ITEM)) == (C, None)
    assert (existing.failure(OTHER, C), existing.failure(OTHER, D), existing.failure(ITEM, A)) == ("infra", "row", None)
    illegal, key = name.removesuffix(".parquet").split("-")[2:]
    assert existing.failure(illegal, key) == "illegal"
    assert (existing.failed_parts(C), existing.failed_parts(A)) == ([(OTHER, "infra")], [])
    assert (existing.row_count, existing.failed_count, existing.latents_count) == (2, 3, 1)
    assert existing.failed_kinds == {"row": 1, "infra": 1, "illegal": 1}


def test_a_new_dataset_is_empty(store):
    existing = list_existing(store)
    assert not (existing.row_count or existing.failed_count or existing.latents_count or existing.failed_kinds)
    assert not existing.has_row(ITEM, A) and existing.key_of(ITEM) is None and existing.failed_parts(A) == []


def test_foreign_names_are_ignored(store):
    strays = [
        "index/_SUCCESS", "index/readme.txt", f"index/.part-{ITEM}-{A}.parquet.1234", f"index/part-{ITEM}.parquet",
        f"index/part-{ITEM.upper()}-{A}.parquet", f"index/part-{ITEM}-{A}0.parquet", f"index/part-{ITEM}-{A}.parquet\n",
        f"failed/part-other-{ITEM}-{A}.parquet", "failed/_x", f"latents/aa/.{ITEM}.safetensors.12", "latents/x",
    ]  # fmt: skip
    for stray in strays:
        store.write_bytes(stray, b"")
    existing = list_existing(store)
    assert not (existing.row_count or existing.failed_count or existing.latents_count)


def test_the_listing_of_an_object_store(s3, bucket):
    store = Store(f"{bucket}/out")
    assert list_existing(store).row_count == 0
    for name in (f"index/part-{ITEM}-{A}.parquet", f"latents/aa/{OTHER}.safetensors", f"latents/bb/{ITEM}.safetensors"):
        store.write_bytes(name, b"x")
    existing = list_existing(store)
    assert existing.has_row(ITEM, A) and (existing.row_count, existing.latents_count) == (1, 2)


def test_rows_can_be_added_and_dropped():
    existing = ExistingRows()
    existing.add_row(ITEM, A)
    existing.add_row(ITEM, A)
    existing.add_row(ITEM, B)
    assert (existing.row_count, existing.has_row(ITEM, A)) == (2, True)
    existing.drop_row(ITEM, A)
    existing.drop_row(ITEM, A)
    existing.drop_row(OTHER, A)
    assert (existing.row_count, existing.has_row(ITEM, A), existing.key_of(ITEM)) == (1, False, B)
    existing.drop_row(ITEM, B)
    assert (existing.row_count, existing.key_of(ITEM)) == (0, None)
    existing.add_row(ITEM, A)
    assert (existing.row_count, existing.has_row(ITEM, A), existing.key_of(ITEM)) == (1, True, A)


def test_items_with_the_same_first_64_bits_are_different():
    """The first 64 bits are searched for; the other bits are compared too."""
    existing, other = ExistingRows(), ITEM[:16] + "0" * 16
    existing.add_row(ITEM, A)
    assert not existing.has_row(other, A) and existing.key_of(other) is None
    existing.add_row(other, B)
    assert (existing.key_of(ITEM), existing.key_of(other)) == (A, B)


def test_tens_of_thousands_of_rows_are_found(store):
    folder = Path(store.path("index"))
    folder.mkdir(parents=True)
    for n in range(3000):
        (folder / f"part-{item(n)}-{n:08x}.parquet").touch()
    existing = list_existing(store)
    for n in range(3000, 30_000):  # enough for several sorted runs of the table
        existing.add_row(item(n), f"{n:08x}")
    assert existing.row_count == 30_000
    assert all(
        existing.has_row(item(n), f"{n:08x}") and existing.key_of(item(n)) == f"{n:08x}" for n in range(0, 30_000, 7)
    )
    assert not any(existing.has_row(item(n), "00000000") for n in range(1, 30_000, 7))


def test_looking_up_many_items_misses_no_row():
    existing = ExistingRows()
    for n in range(10_000):
        existing.add_row(item(n), A)
    heads = [bytes.fromhex(item(n))[:8] for n in range(20_000)]
    known = existing.look_up(heads)
    assert all(known.may_have_rows(head) for head in heads[:10_000])
    assert not any(known.may_have_rows(head) for head in heads[10_000:])
    existing.add_row(item(15_000), A)
    assert known.may_have_rows(heads[15_000]) and not known.may_have_rows(heads[15_001])
    for _ in range(10_000):  # until the newest records become a sorted run
        existing.add_row(secrets.token_hex(16), A)
    assert known.may_have_rows(heads[15_000])
