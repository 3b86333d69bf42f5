"""Stored latents are known item by item, whether their names were listed or each item is looked up."""

from __future__ import annotations

import hashlib

import pytest

from ltx_ray.dataset import stored_latents
from ltx_ray.dataset.existing import list_existing
from ltx_ray.dataset.layout import latents_path
from ltx_ray.dataset.stored_latents import StoredLatents
from ltx_ray.storage.object_client import ObjectClient
from ltx_ray.storage.store import Store

ITEMS = [hashlib.sha256(str(n).encode()).hexdigest()[:32] for n in range(200)]


@pytest.fixture(params=["local", "s3", "s3 with too many to list"])
def latents(request, tmp_path):
    """Of the even ones of `ITEMS`."""
    store = Store(str(tmp_path / "out") if request.param == "local" else f"{request.getfixturevalue('bucket')}/out")
    for item_id in ITEMS[::2]:
        store.write_bytes(latents_path(item_id), b"x")
    store.write_bytes(f"latents/zz/{ITEMS[1]}.safetensors", b"x")
    store.write_bytes(f"latents/{ITEMS[3][:2]}/.{ITEMS[3]}.safetensors.0123abcd", b"x")
    return StoredLatents(store, 99 if "many" in request.param else 100)


def test_each_item_is_known(latents):
    assert latents.any
    assert [latents.has(item_id) for item_id in ITEMS] == [n % 2 == 0 for n in range(len(ITEMS))]


def test_entries_pass_in_order_and_are_known(latents):
    """Every third entry asks for nothing, and every fifth for the item of the first."""
    entries = [(n, ITEMS[0] if n % 5 == 0 else ITEMS[n]) for n in range(len(ITEMS))]
    passed = []
    for n, item_id in latents.prefetched(iter(entries), lambda entry: entry[1] if entry[0] % 3 else None):
        passed.append((n, item_id))
        assert latents.has(item_id) == (ITEMS.index(item_id) % 2 == 0)
        assert len(latents._asked) <= stored_latents._AHEAD + 1
    assert passed == entries and not latents._asked


def test_without_latents_no_item_is_looked_up(tmp_path, bucket, monkeypatch):
    for output in (str(tmp_path), f"{bucket}/out"):
        latents = StoredLatents(Store(output))
        for kind, name in ((Store, "exists"), (ObjectClient, "head")):
            monkeypatch.setattr(kind, name, lambda *path: pytest.fail("looked up"))
        assert not latents.any and not latents.has(ITEMS[0])
        assert list(latents.prefetched(iter(ITEMS), lambda item_id: item_id)) == ITEMS
    assert not StoredLatents(None).any and not StoredLatents(None).has(ITEMS[0])


def test_a_start_asks_nothing_of_latents(bucket, monkeypatch):
    store = Store(f"{bucket}/out")
    store.write_bytes(latents_path(ITEMS[0]), b"x")
    asked, names = [], Store.names
    monkeypatch.setattr(Store, "names", lambda self, folder: asked.append(folder) or names(self, folder))
    existing = list_existing(store)
    assert "index" in asked and "latents" not in asked
    assert existing.has_latents(ITEMS[0]) and not existing.has_latents(ITEMS[1])
    assert "latents" in asked


def test_what_is_looked_up_ahead_is_not_asked_again(bucket, monkeypatch):
    store = Store(f"{bucket}/out")
    for item_id in ITEMS[:10]:
        store.write_bytes(latents_path(item_id), b"x")
    latents, asked = StoredLatents(store, 1), []
    head = ObjectClient.head
    monkeypatch.setattr(ObjectClient, "head", lambda self, path: asked.append(path) or head(self, path))
    for item_id in latents.prefetched(iter(ITEMS), lambda item_id: item_id):
        assert latents.has(item_id) is latents.has(item_id)
    assert sorted(asked) == sorted(map(latents_path, ITEMS))
