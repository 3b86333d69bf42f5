"""`ltx-ray export`: what each form holds, that it goes on after any end, and what it refuses."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ltx_ray.cli.app import main
from ltx_ray.dataset.export import STATE_FILE, ExportJob, sample_name
from ltx_ray.dataset.export_hf import export_hf
from ltx_ray.dataset.export_webdataset import export_webdataset
from ltx_ray.dataset.layout import INDEX_SCHEMA
from ltx_ray.storage.store import Store
from tests.support.damaged_dataset import ITEMS, as_one_row_parts, boxes, build, clip_of
from tests.support.datasets import dataset_writer, finish, rows_in
from tests.support.results import RENDERED
from tests.support.samples import request

#: Rows of the second dataset, in several parts.
MANY = tuple((n % 3, f"r{n}") for n in range(10))


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def place(request, tmp_path) -> str:
    """Where the dataset and its exports are."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket")


@pytest.fixture
def source(place) -> Store:
    return build(Store(f"{place}/out"))


@pytest.fixture
def cmd(capfd):
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["export", *arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return caught.value.code, out, err

    return call


def job(source: Store, target: Store) -> ExportJob:
    return ExportJob(source, target, lambda message: None, lambda done, total: None)


def samples(target: Store) -> list[tuple[bytes, dict]]:
    """(clip, row) of all samples in all shards."""
    found = []
    for name in target.list_names(""):
        if name.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(target.read_bytes(name))) as tar:
                files = {info.name: tar.extractfile(info).read() for info in tar}
            stems = [file.removesuffix(".mp4") for file in files if file.endswith(".mp4")]
            assert set(files) == {f"{stem}.{ending}" for stem in stems for ending in ("mp4", "json")}
            found += [(files[f"{stem}.mp4"], json.loads(files[f"{stem}.json"])) for stem in stems]
    return found


def folder_rows(target: Store) -> list[dict]:
    """The rows of all folders, after a look at their files."""
    found = []
    for folder in target.folders("train"):
        rows = pq.read_table(io.BytesIO(target.read_bytes(f"train/{folder}/metadata.parquet"))).to_pylist()
        names = target.list_names(f"train/{folder}")
        assert sorted([row["file_name"] for row in rows] + ["metadata.parquet"]) == names
        for row in rows:
            assert target.read_bytes(f"train/{folder}/{row['file_name']}") == boxes(row["item_id"])
        found += rows
    return found


def grow(source: Store, rows=MANY) -> None:
    for start in range(0, len(rows), 4):
        build(source, rows[start : start + 4])


def test_a_shard_has_the_clip_and_the_row_of_each_sample(source, place, cmd):
    code, out, _ = cmd(source.uri, f"{place}/shards", "--to", "webdataset")
    assert (code, out) == (0, f"{place}/shards: 4 rows in 1 shards by now\n")
    found = samples(Store(f"{place}/shards"))
    assert all(clip == boxes(row["item_id"]) for clip, row in found)
    rows = {row["id"]: row for row in rows_in(source, "index")}
    for _, row in found:
        assert set(row) == set(INDEX_SCHEMA.names)
        assert (row["seed"], row["extra"]) == (rows[row["id"]]["seed"], rows[row["id"]]["extra"])
    assert sorted(row["id"] for _, row in found) == ["a", "b", "c", "d"]


def test_shards_have_the_size_that_is_asked_for(source, place):
    target = Store(f"{place}/shards")
    record = export_webdataset(job(source, target), shard_bytes=1)
    assert record.exported.files == 4
    sizes = [size for name, size in target.sizes("").items() if name.endswith(".tar")]
    assert len(sizes) == 4
    assert sorted(row["id"] for _, row in samples(target)) == ["a", "b", "c", "d"]


def test_the_same_rows_give_the_same_bytes(source, place):
    for name in ("one", "two"):
        export_webdataset(job(source, Store(f"{place}/{name}")))
    one, two = (
        {name: s.read_bytes(name) for name in s.list_names("")} for s in map(Store, (f"{place}/one", f"{place}/two"))
    )
    assert one == two


def test_the_folder_has_clips_a_table_and_a_card(source, place, cmd):
    target = Store(f"{place}/folder")
    code, out, _ = cmd(source.uri, target.uri, "--to", "hf")
    assert (code, out) == (0, f"{place}/folder: 4 rows in 1 folders by now\n")
    assert sorted(row["id"] for row in folder_rows(target)) == ["a", "b", "c", "d"]
    card = target.read_bytes("README.md").decode()
    assert "license: other" in card and "n<1K" in card and "4 clips" in card


@pytest.mark.parametrize("export, size", [(export_webdataset, {"shard_bytes": 3000}), (export_hf, {"folder_clips": 3})])
def test_it_goes_on_wherever_it_was_interrupted(place, monkeypatch, export, size):
    source = Store(f"{place}/out")
    grow(source)

    class Killed(BaseException):
        pass

    for at in range(12 if source.is_local else 3):
        target = Store(f"{place}/{at}")
        left = at

        def dies(real):
            def call(*arguments):
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return real(*arguments)

            return call

        with monkeypatch.context() as patch:
            for name in ("create", "update", "write_bytes", "publish_file"):
                patch.setattr(target, name, dies(getattr(target, name)))
            try:
                export(job(source, target), **size)
            except Killed:
                pass
        export(job(source, Store(target.uri)), **size)
        rows = [row for _, row in samples(target)] if export is export_webdataset else folder_rows(target)
        assert Counter(row["id"] for row in rows) == Counter(row_id for _, row_id in MANY), at
        assert export(job(source, Store(target.uri)), **size).exported.rows == len(MANY)


@pytest.mark.parametrize("export", [export_webdataset, export_hf])
def test_a_later_export_adds_what_has_come_since(source, place, export):
    target = Store(f"{place}/export")
    export(job(source, target))
    grow(source)
    record = export(job(source, target))
    assert (record.exported.rows, record.exported.files) == (4 + len(MANY), 2)
    assert json.loads(target.read_bytes(STATE_FILE))["rows"] == 4 + len(MANY)
    rows = [row for _, row in samples(target)] if export is export_webdataset else folder_rows(target)
    assert len({sample_name(row) for row in rows}) == 4 + len(MANY)


def test_rows_without_a_whole_clip_are_named_and_left_out(source, place, cmd):
    source.delete(clip_of(1))
    source.write_bytes(clip_of(2), b"damaged")
    writer = dataset_writer(source)
    writer.write_index("ab" * 16, request(id="e"), replace(RENDERED, clip=replace(RENDERED.clip, path=None)))
    finish(writer)
    code, out, err = cmd(source.uri, f"{place}/shards", "--to", "webdataset")
    assert code == 3 and "2 rows in 1 shards by now, 3 left out" in out
    assert f"c is left out: its clip {clip_of(1)} is missing" in err
    assert f"d is left out: its clip {clip_of(2)} was changed" in err
    assert "e has no clip, and is left out" in err
    assert sorted(row["id"] for _, row in samples(Store(f"{place}/shards"))) == ["a", "b"]


def test_rows_in_no_part_are_said_to_be_left_out(source, place, cmd):
    writer = dataset_writer(source)
    writer.write_index(ITEMS[0], request(id="late"), RENDERED)
    writer.log.commit()
    assert "not yet folded are left out" in cmd(source.uri, f"{place}/shards", "--to", "webdataset")[2]


@pytest.mark.parametrize("to", ["webdataset", "hf"])
def test_what_is_refused(source, place, cmd, to):
    def refused(*arguments: str) -> str:
        code, _, err = cmd(*arguments, "--to", to)
        assert code == 2
        return err

    assert "is in the dataset" in refused(source.uri, f"{source.uri}/export")
    assert "is in the dataset" in refused(source.uri, source.uri)
    assert "is in the dataset" in refused(source.uri, place)
    Store(f"{place}/mine").write_bytes("photo.jpg", b"photo")
    assert "is not empty" in refused(source.uri, f"{place}/mine")
    assert Store(f"{place}/mine").list_names("") == ["photo.jpg"]
    other = build(Store(f"{place}/other"))
    assert cmd(other.uri, f"{place}/export", "--to", to)[0] == 0
    assert "holds an export to" in refused(source.uri, f"{place}/export")
    Store(f"{place}/broken").write_bytes(STATE_FILE, b"{")
    assert "is damaged" in refused(source.uri, f"{place}/broken")
    as_one_row_parts(source)
    assert "ltx-ray fold --migrate" in refused(source.uri, f"{place}/new")


def test_of_two_exports_into_one_place_one_ends(source, place):
    target = Store(f"{place}/export")
    first = job(source, target)
    first.on_rows = lambda done, total: export_webdataset(job(source, Store(target.uri))) and None
    with pytest.raises(OSError, match="another export writes there"):
        export_webdataset(first)
    assert len(samples(target)) == 4


def test_a_large_file_reaches_the_store_whole(place, tmp_path):
    store, path = Store(f"{place}/large"), tmp_path / "large.tar"
    data = bytes(range(256)) * 4 * 12_000
    path.write_bytes(data)
    store.publish_file("a/large.tar", path)
    assert store.read_bytes("a/large.tar") == data
    assert not path.exists()


#: deltalake keeps Python's lock while it waits for an object store, which here is in the same process as the test.
_READ = """
import json, sys
from deltalake import DeltaTable
from ltx_ray.storage.store import Store
table = DeltaTable(sys.argv[1], storage_options=Store(sys.argv[1]).object_store_options())
print(json.dumps(table.to_pyarrow_table(columns=["id", "clip", "clip_uri"]).to_pylist()))
"""


def python(code: str, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=600)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_the_table_has_each_part_once_and_the_places_of_clips(source, place):
    pytest.importorskip("deltalake")

    def export(target: str) -> tuple[int, str, str]:
        return python("import sys; from ltx_ray.cli import main; main(sys.argv[1:])",
                      "export", source.uri, target, "--to", "delta")  # fmt: skip

    table = f"{place}/table"
    assert export(table)[:2] == (0, f"{table}: 4 rows appended, version 0 of the table\n")
    grow(source)
    assert export(table)[1] == f"{table}: 10 rows appended, version 3 of the table\n"
    assert export(table)[1] == f"{table}: 0 rows appended, version 3 of the table\n"
    rows = json.loads(python(_READ, table)[1])
    assert Counter(row["id"] for row in rows) == Counter(["a", "b", "c", "d", *(row_id for _, row_id in MANY)])
    assert all(row["clip_uri"] == f"{source.name}/{row['clip']}" for row in rows)
    Store(f"{place}/mine").write_bytes("photo.jpg", b"photo")
    code, _, err = export(f"{place}/mine")
    assert code == 2 and "holds no Delta table" in err


def test_a_table_without_its_package_is_refused(source, place, cmd, monkeypatch):
    monkeypatch.setitem(sys.modules, "deltalake", None)
    monkeypatch.setitem(sys.modules, "deltalake.exceptions", None)
    code, _, err = cmd(source.uri, f"{place}/table", "--to", "delta")
    assert code == 2 and "pip install 'ltx-ray[delta]'" in err
    assert not Path(place, "table", "_delta_log").exists()
