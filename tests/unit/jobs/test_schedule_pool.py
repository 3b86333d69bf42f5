"""The pool of a recipe is read as render reads it."""

from __future__ import annotations

import datetime
import gzip
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ltx_ray.manifest.reader import read_manifest
from ltx_ray.manifest.rules import LegalRow, RowRules, judge

JOBS = Path(__file__).resolve().parents[3] / "jobs"


def load(name: str):
    sys.path.insert(0, str(JOBS))
    spec = importlib.util.spec_from_file_location(name, JOBS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


schedule = load("schedule")
pool = sys.modules["schedule_pool"]
DATE = "2026-11-23"
ROWS = [{"id": f"r{n}", "prompt": f"a fox {n}, café", "height": 64, "width": 64, "num_frames": 9} for n in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def dated(source: Path) -> bytes:
    """The manifest of a date that draws all rows of `source`."""
    recipe = schedule.parse_recipe(f"name: n\noutput: /o\nmanifest: {source}\ndefaults: {{seed: 3}}")
    return schedule.plan(recipe, DATE, "/m", "render").manifest


def same_requests(source: Path, tmp_path: Path) -> list[LegalRow]:
    """The requests of a dated manifest, which are those of its source."""
    copy = tmp_path / "dated" / "m.jsonl"
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(dated(source))
    rules = RowRules(defaults={"seed": 3}, image_roots=(str(tmp_path),))
    found, expected = ([judge(raw, rules) for raw in read_manifest(str(uri))] for uri in (copy, source))
    assert [type(row) for row in found] == [type(row) for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(theirs, LegalRow):
            assert {**vars(ours.request), "id": 0, "extra": 0} == {**vars(theirs.request), "id": 0, "extra": 0}
            extra = json.loads(ours.request.extra or "{}")
            assert extra.pop("source_id", theirs.request.id) == theirs.request.id
            wanted = json.loads(theirs.request.extra or "{}")
            assert extra == {name: value for name, value in wanted.items() if value is not None}
    return expected


def columns(**more) -> pa.Table:
    return pa.Table.from_pylist(ROWS).append_column("x", more["x"]) if "x" in more else pa.Table.from_pylist(ROWS)


TEXTS = {
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "m.ndjson": LINES.encode(),
    "m.JSONL": LINES.replace("\n", "\r\n").encode(),
    "m.jsonl.gz": gzip.compress(LINES.encode()),
    "array.json": json.dumps(ROWS, indent=1).encode(),
    "utf16.jsonl": LINES.encode("utf-16"),
    "nan.jsonl": LINES.replace('"height": 64', '"seed": NaN').encode(),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts(tmp_path, name):
    (tmp_path / name).write_bytes(TEXTS[name])
    assert len(same_requests(tmp_path / name, tmp_path)) == 3


TYPES = {
    "nan": pa.array([1.0, float("nan"), 3.0]),
    "timestamp": pa.array([datetime.datetime(2026, 1, n + 1) for n in range(3)]),
    "nanoseconds": pa.array([1234567891, 1000, None], pa.timestamp("ns")),
    "bytes": pa.array([b"x", None, bytes(200_000)]),
    "picture": pa.array([{"bytes": bytes(100_000), "path": "a.png"}] * 3),
    "dictionary": pa.array(["a", "b", "a"]).dictionary_encode(),
    "long": pa.array(["a" * 100_000, "b", "c"]),
}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("ending", ["parquet", "pq"])
def test_types(tmp_path, name, ending):
    source = tmp_path / f"m.{ending}"
    pq.write_table(columns(x=TYPES[name]), source)
    assert len(same_requests(source, tmp_path)) == 3


def test_folders(tmp_path):
    folder = tmp_path / "pool"
    (folder / "height=64" / "out").mkdir(parents=True)
    short = [{"prompt": "a fox", "seed": None}]
    pq.write_table(pa.Table.from_pylist(short), folder / "height=64" / "a.parquet")
    pq.write_table(pa.table({"prompt": ["b"], "seed": [2**40], "pipeline": ["base"]}), folder / "b.parquet")
    (folder / "c.jsonl").write_text(LINES)
    (folder / "_SUCCESS").write_text("")
    (folder / "height=64" / "out" / "run.json").write_text('{"run_id": "x"}')
    (folder / "height=64" / "out" / "events.jsonl").write_text("{}\n")
    expected = same_requests(folder, tmp_path)
    assert [row.request.height for row in expected] == [1024, 64, 64, 64, 64]


def test_what_a_folder_leaves_out_is_said(tmp_path, capsys):
    folder = tmp_path / "pool"
    folder.mkdir()
    (folder / "m.jsonl").write_text(LINES)
    (folder / "m.csv").write_text("x")
    dated(folder)
    assert "skipped m.csv" in capsys.readouterr().err


def test_text_that_is_not_utf8_stays_with_its_row(tmp_path):
    ends = np.array([0, 3, 8, 11], np.int32)
    bad = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(ends.tobytes()), pa.py_buffer(b"oakch\xeaneelm")])
    table = columns().set_column(1, "prompt", bad)
    pq.write_table(table, tmp_path / "m.parquet")
    rows = same_requests(tmp_path / "m.parquet", tmp_path)
    assert [isinstance(row, LegalRow) for row in rows] == [True, False, True]


def test_a_number_that_is_infinite_stays_with_its_row(tmp_path):
    (tmp_path / "m.jsonl").write_text(LINES.replace('"height": 64', '"frame_rate": Infinity', 1))
    rows = same_requests(tmp_path / "m.jsonl", tmp_path)
    assert [isinstance(row, LegalRow) for row in rows] == [False, True, True]


def test_the_images_of_a_row_count_from_its_own_file(tmp_path):
    (tmp_path / "pool" / "sub").mkdir(parents=True)
    images = [{"path": "img/a b.png"}, {"path": "/abs/b.png"}, {"path": "s3://b/c.png"}]
    lines = [json.dumps({"prompt": "p", "images": value}) + "\n" for value in (images, [{"path": 5}, "x"], "x", [])]
    (tmp_path / "pool" / "sub" / "m.jsonl").write_text("".join(lines))
    row, *others = map(json.loads, dated(tmp_path / "pool").splitlines())
    assert [image["path"] for image in row["images"]] == [
        f"{tmp_path}/pool/sub/img/a b.png", "/abs/b.png", "s3://b/c.png"
    ]  # fmt: skip
    assert [other["images"] for other in others] == [[{"path": 5}, "x"], "x", []]


def test_a_pool_that_cannot_be_read_names_itself(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "m.parquet")
    (tmp_path / "m.csv").write_text("x")
    for name, why in (
        ("m.parquet", "has no column 'prompt'"),
        ("m.csv", "not a manifest"),
        ("none", "no such manifest"),
    ):
        with pytest.raises(ValueError, match=f"manifest: '{tmp_path}/{name}', must be readable.*{why}"):
            pool.SourceManifest(str(tmp_path / name))


def test_a_store_that_fails_while_rows_are_taken_ends_with_1(tmp_path, monkeypatch, capsys):
    (tmp_path / "m.jsonl").write_text(LINES)
    (tmp_path / "r.yaml").write_text("name: n\noutput: /o\nmanifest: m.jsonl\n")

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pool.SourceManifest, "take", fail)
    assert schedule.main([str(tmp_path / "r.yaml"), "--date", DATE, "--dry-run"]) == 1
    assert "Input/output error" in capsys.readouterr().err
