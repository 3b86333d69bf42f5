"""dataset.json: its root, counts, recipes and note of licences follow what is in the parts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from ltx_ray.dataset import description
from ltx_ray.dataset.description import describe_dataset
from ltx_ray.dataset.existing import list_existing
from ltx_ray.dataset.fold import fold_output
from ltx_ray.dataset.identity import KeptIdentity, dataset_id
from ltx_ray.manifest.raw import RawRow
from ltx_ray.storage.store import Store
from tests.support.datasets import dataset_writer, finish
from tests.support.results import CRASH, ITEM, OTHER, RENDERED
from tests.support.samples import request

DOCS = Path(__file__).resolve().parents[3] / "docs"


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "out"))


def written(store: Store) -> dict:
    return json.loads(store.read_bytes("dataset.json"))


def add(store: Store, item: str, digest: str) -> None:
    writer = dataset_writer(store)
    writer.write_index(item, request(id=item[:4]), replace(RENDERED, recipe_digest=digest))
    finish(writer)


def test_counts_and_recipes_are_those_of_the_parts(store):
    add(store, ITEM, "1" * 16)
    writer = dataset_writer(store)
    writer.write_preview(OTHER, request(id="p"), RawRow("m.jsonl", 1, {}), RENDERED)
    writer.write_failed(OTHER, request(id="f"), RawRow("m.jsonl", 2, {}), CRASH)
    writer.write_index(OTHER, request(id="o"), replace(RENDERED, recipe_digest="2" * 16))
    finish(writer)
    describe_dataset(store, list_existing(store))
    found = written(store)
    assert found["rows"] == {"index": 2, "previews": 1, "failed": 1}
    assert found["recipe_digests"] == ["1" * 16, "2" * 16]
    assert found["root"] == store.name
    assert (found["id"], found["scheme"], found["schema_version"]) == (dataset_id(store), 2, 2)


def test_a_fold_describes_what_a_killed_run_left(store):
    writer = dataset_writer(store)
    writer.write_index(ITEM, request(id="a"), replace(RENDERED, clip=replace(RENDERED.clip, path=None)))
    writer.log.commit()
    fold_output(store, lambda message: None)
    assert (written(store)["rows"]["index"], written(store)["recipe_digests"]) == (1, [RENDERED.recipe_digest])


def test_parts_are_read_once(store, monkeypatch):
    add(store, ITEM, "1" * 16)
    describe_dataset(store, list_existing(store))
    add(store, OTHER, "2" * 16)
    read: list[str] = []
    real = description._recipe_digests
    monkeypatch.setattr(description, "_recipe_digests", lambda store, name: read.append(name) or real(store, name))
    describe_dataset(store, list_existing(store))
    assert [name[14:22] for name in read] == ["00000001"]
    assert written(store)["recipe_digests"] == ["1" * 16, "2" * 16]
    describe_dataset(store, list_existing(store), anew=True)
    assert len(read) == 3


def test_a_note_that_somebody_wrote_stays(store):
    add(store, ITEM, "1" * 16)
    describe_dataset(store, list_existing(store))
    assert "licence" in written(store)["license"]
    store.write_bytes("dataset.json", json.dumps({**written(store), "license": "CC-BY-4.0"}).encode())
    identity = KeptIdentity(store, lambda message: None)
    identity.begin(2)
    identity.check_noise("cpu")
    describe_dataset(store, list_existing(store))
    assert (written(store)["license"], written(store)["noise_family"]) == ("CC-BY-4.0", "cpu")


def test_damaged_fields_are_made_anew(store):
    add(store, ITEM, "1" * 16)
    store.write_bytes("dataset.json", json.dumps({**written(store), "recipe_digests": 3, "license": []}).encode())
    describe_dataset(store, list_existing(store))
    assert written(store)["recipe_digests"] == ["1" * 16] and isinstance(written(store)["license"], str)


def test_every_field_has_a_line(store):
    add(store, ITEM, "1" * 16)
    describe_dataset(store, list_existing(store))
    table = (DOCS / "dataset.md").read_text().split("## What the dataset says of itself")[1].split("\n## ")[0]
    heads = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(heads))) == set(written(store))
