"""What a dataset has already: read from names alone, kept true while a run goes on."""

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


def test_the_listing_says_what_is_done_and_what_failed(store):
    writer = DatasetWriter(store)
    writer.write_index(ITEM, request(id="a"), RENDERED)
    writer.write_index(ITEM, request(id="b"), RENDERED)
    writer.write_failed(OTHER, request(id="c"), RawRow("m.jsonl", 1, {}), CRASH)
    writer.write_failed(OTHER, request(id="d"), RawRow("m.jsonl", 2, {}), NAN)
    name = writer.write_illegal(RawRow("m.jsonl", 3, {"prompt": ""}), ["m.jsonl:3:prompt: ..."])
    store.write_bytes(f"latents/aa/{ITEM}.safetensors", b"")
    store.write_bytes(f"previews/part-{OTHER}-{C}.parquet", b"")
    done = list_existing(store)
    assert done.has_row(ITEM, A) and done.has_row(ITEM, B) and not done.has_row(ITEM, C)
    assert done.key_of(ITEM) in {A, B} and done.key_of(OTHER) is None
    assert done.has_latents(ITEM) and not done.has_latents(OTHER)
    assert done.has_preview(OTHER, C) and not done.has_preview(OTHER, A) and not done.has_preview(ITEM, A)
    assert (done.preview_of(OTHER), done.preview_of(ITEM)) == (C, None)
    assert (done.failure(OTHER, C), done.failure(OTHER, D), done.failure(ITEM, A)) == ("infra", "row", None)
    illegal, key = name.removesuffix(".parquet").split("-")[2:]
    assert done.failure(illegal, key) == "illegal"
    assert (done.failed_parts(C), done.failed_parts(A)) == ([(OTHER, "infra")], [])
    assert (done.row_count, done.failed_count, done.latents_count) == (2, 3, 1)
    assert done.failed_kinds == {"row": 1, "infra": 1, "illegal": 1}


def test_a_new_dataset_is_empty(store):
    done = list_existing(store)
    assert not (done.row_count or done.failed_count or done.latents_count or done.failed_kinds)
    assert not done.has_row(ITEM, A) and done.key_of(ITEM) is None and done.failed_parts(A) == []


def test_names_that_are_not_ours_are_passed_over(store):
    strays = [
        "index/_SUCCESS", "index/readme.txt", f"index/.part-{ITEM}-{A}.parquet.1234", f"index/part-{ITEM}.parquet",
        f"index/part-{ITEM.upper()}-{A}.parquet", f"index/part-{ITEM}-{A}0.parquet", f"index/part-{ITEM}-{A}.parquet\n",
        f"failed/part-other-{ITEM}-{A}.parquet", "failed/_x", f"latents/aa/.{ITEM}.safetensors.12", "latents/x",
    ]  # fmt: skip
    for stray in strays:
        store.write_bytes(stray, b"")
    done = list_existing(store)
    assert not (done.row_count or done.failed_count or done.latents_count)


def test_the_listing_of_an_object_store(s3, bucket):
    store = Store(f"{bucket}/out")
    assert list_existing(store).row_count == 0
    for name in (f"index/part-{ITEM}-{A}.parquet", f"latents/aa/{OTHER}.safetensors", f"latents/bb/{ITEM}.safetensors"):
        store.write_bytes(name, b"x")
    done = list_existing(store)
    assert done.has_row(ITEM, A) and (done.row_count, done.latents_count) == (1, 2)


def test_rows_come_and_go_while_a_run_goes_on():
    done = ExistingRows()
    done.add_row(ITEM, A)
    done.add_row(ITEM, A)
    done.add_row(ITEM, B)
    assert (done.row_count, done.has_row(ITEM, A)) == (2, True)
    done.drop_row(ITEM, A)
    done.drop_row(ITEM, A)
    done.drop_row(OTHER, A)
    assert (done.row_count, done.has_row(ITEM, A), done.key_of(ITEM)) == (1, False, B)
    done.drop_row(ITEM, B)
    assert (done.row_count, done.key_of(ITEM)) == (0, None)
    done.add_row(ITEM, A)
    assert (done.row_count, done.has_row(ITEM, A), done.key_of(ITEM)) == (1, True, A)


def test_items_that_start_alike_are_told_apart():
    """The head is 64 bits; the rest counts too."""
    done, twin = ExistingRows(), ITEM[:16] + "0" * 16
    done.add_row(ITEM, A)
    assert not done.has_row(twin, A) and done.key_of(twin) is None
    done.add_row(twin, B)
    assert (done.key_of(ITEM), done.key_of(twin)) == (A, B)


def test_thousands_of_rows_in_the_order_of_no_name(store):
    folder = Path(store.path("index"))
    folder.mkdir(parents=True)
    for n in range(3000):
        (folder / f"part-{item(n)}-{n:08x}.parquet").touch()
    done = list_existing(store)
    for n in range(3000, 30_000):  # more than one run's worth
        done.add_row(item(n), f"{n:08x}")
    assert done.row_count == 30_000
    assert all(done.has_row(item(n), f"{n:08x}") and done.key_of(item(n)) == f"{n:08x}" for n in range(0, 30_000, 7))
    assert not any(done.has_row(item(n), "00000000") for n in range(1, 30_000, 7))


def test_a_look_up_of_many_never_misses_a_row():
    done = ExistingRows()
    for n in range(10_000):
        done.add_row(item(n), A)
    heads = [bytes.fromhex(item(n))[:8] for n in range(20_000)]
    known = done.look_up(heads)
    assert all(known.may_have_rows(head) for head in heads[:10_000])
    assert not any(known.may_have_rows(head) for head in heads[10_000:])
    done.add_row(item(15_000), A)
    assert known.may_have_rows(heads[15_000]) and not known.may_have_rows(heads[15_001])
    for _ in range(10_000):  # until what was new is in a run
        done.add_row(secrets.token_hex(16), A)
    assert known.may_have_rows(heads[15_000])
