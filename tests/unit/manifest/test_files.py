"""Folders: which files are manifests, which are named as left out, and what folders' names say."""

from __future__ import annotations

import gzip
import json
import os
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ltx_ray.manifest.reader import Manifest, open_manifest, read_manifest
from ltx_ray.manifest.rules import IllegalRow, LegalRow, RowRules, judge
from tests.support.samples import write_jsonl

PART = "part-{}0123456789abcdef0123456789abcdef-01234567.parquet"


def table(path: Path, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def lines(path: Path, *prompts: str, **values) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, [{"prompt": prompt, **values} for prompt in prompts])
    return path


def prompts(manifest: Manifest) -> list[str]:
    return [raw.values["prompt"] for raw in manifest.rows()]


def notes(manifest: Manifest, folder: Path | str) -> dict[str, str]:
    """What was skipped, by the reason."""
    begin, said = f"{folder}: skipped ", []
    manifest.say_skipped(said.append)
    assert all(note.startswith(begin) and note.endswith(")") for note in said)
    pairs = (note[len(begin) : -1].split(" (", 1) for note in said)
    return {why: names for names, why in pairs}


# --- which files -------------------------------------------------------------------------------------------------


def test_every_ending_is_read(tmp_path):
    for name in ("a.jsonl", "b.json", "c.JSONL", "d.ndjson", "e.Json"):
        lines(tmp_path / name, name)
    for name in ("f.jsonl.gz", "g.json.gz", "h.NDJSON.GZ"):
        (tmp_path / name).write_bytes(gzip.compress(json.dumps({"prompt": name}).encode()))
    for name in ("i.pq", "j.PARQUET", "k.snappy.parquet"):
        table(tmp_path / name, prompt=[name])
    manifest = open_manifest(str(tmp_path))
    assert prompts(manifest) == [path.name for path in sorted(tmp_path.iterdir())] and notes(manifest, tmp_path) == {}
    for path in tmp_path.iterdir():
        assert prompts(open_manifest(str(path))) == [path.name]


def test_what_is_left_out_is_named_with_the_reason(tmp_path):
    lines(tmp_path / "m.jsonl", "kept")
    for name in ("_SUCCESS", ".m.jsonl.crc", "_temporary/0/a.jsonl", ".git/b.jsonl", "notes.txt", "m.jsonl~",
                 "m.jsonl.bak", "#m.jsonl#", "m.csv", "x.parquet.gz", "pictures/a.png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    os.symlink("nowhere", tmp_path / "dangling.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    manifest = open_manifest(str(tmp_path))
    assert prompts(manifest) == ["kept"]
    found = notes(manifest, tmp_path)
    assert found["names that begin with '.' or '_' are not read"] == ".git/, .m.jsonl.crc, _SUCCESS and 1 more"
    assert found["neither a file nor a folder"] == "dangling.jsonl, pipe.jsonl"
    [why] = [why for why in found if why.startswith("only names that end in .jsonl")]
    assert found[why].endswith("and 4 more")


def test_a_json_file_of_another_kind_is_left_out(tmp_path):
    lines(tmp_path / "m.jsonl", "kept")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"features": {}, "splits": []}, indent=2))
    (tmp_path / "settings.json").write_text("// no JSON\n{}")
    manifest = open_manifest(str(tmp_path))
    assert prompts(manifest) == ["kept"]
    assert sorted(notes(manifest, tmp_path).values()) == ["dataset_info.json", "settings.json"]
    (tmp_path / "m.jsonl").unlink()
    with pytest.raises(ValueError, match=r"holds no \.parquet or \.jsonl file; skipped dataset_info\.json \(has no co"):
        open_manifest(str(tmp_path))
    for name in ("dataset_info.json", "settings.json"):
        with pytest.raises(ValueError, match=name):
            open_manifest(str(tmp_path / name))


def test_an_empty_folder_names_what_it_holds(tmp_path):
    (tmp_path / "m.csv").write_text("prompt\n")
    with pytest.raises(
        ValueError, match=r"holds no \.parquet or \.jsonl file; skipped m\.csv \(only names that end in"
    ):
        open_manifest(str(tmp_path))


def test_links_to_folders_are_followed_once(tmp_path):
    lines(tmp_path / "data" / "a" / "m.jsonl", "kept")
    os.symlink("..", tmp_path / "data" / "a" / "loop")
    os.symlink("a", tmp_path / "data" / "b")
    lines(tmp_path / "other" / "n.jsonl", "linked")
    os.symlink(tmp_path / "other", tmp_path / "data" / "c")
    manifest = open_manifest(str(tmp_path / "data"))
    assert sorted(prompts(manifest)) == ["kept", "linked"]
    assert len(notes(manifest, tmp_path / "data")["a link to a folder that is read already"].split(", ")) == 2


def test_names_that_are_not_utf8(tmp_path):
    lines(tmp_path / "m.jsonl", "kept")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))).write_text("x")
    manifest = open_manifest(str(tmp_path))
    assert prompts(manifest) == ["kept"]
    assert notes(manifest, tmp_path) == {"names that are not UTF-8": r"caf\udce9.jsonl"}


def test_a_folder_may_have_a_files_name(tmp_path):
    lines(tmp_path / "m.jsonl" / "part-0.json", "kept")
    (tmp_path / "m.jsonl" / "_SUCCESS").write_text("")
    assert prompts(open_manifest(str(tmp_path / "m.jsonl"))) == ["kept"]


# --- outputs -----------------------------------------------------------------------------------------------------


def output(folder: Path, record: bool = True) -> Path:
    """An output as a run leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "clips" / "01").mkdir(parents=True)
    (folder / "clips" / "01" / "x.mp4").write_bytes(b"x")
    (folder / "runs" / "20260101").mkdir(parents=True)
    for place in (folder, folder / "runs" / "20260101"):
        if record:
            (place / "run.json").write_text(json.dumps({"run_id": "20260101T000000-abcdef", "prompt": "x"}))
        (place / "events.jsonl").write_text('{"event": "run_started"}\n')
    table(folder / "index" / PART.format(""), prompt=["rendered"])
    table(folder / "failed" / PART.format("row-"), prompt=["failed"])
    (folder / "report.html").write_text("x")
    return folder


@pytest.mark.parametrize("record", [True, False])
def test_outputs_below_a_manifests_folder_are_not_read(tmp_path, record):
    lines(tmp_path / "m.jsonl", "kept")
    for name in ("out", "older/out", "a/b/c"):
        output(tmp_path / name, record)
    manifest = open_manifest(str(tmp_path))
    assert prompts(manifest) == ["kept"]
    assert set(notes(manifest, tmp_path)) == {"written by a run"}


def test_a_folder_that_is_its_own_output(tmp_path):
    lines(output(tmp_path / "data") / "m.jsonl", "kept")
    manifest = open_manifest(str(tmp_path / "data"))
    assert prompts(manifest) == ["kept"]
    assert "and 4 more" in notes(manifest, tmp_path / "data")["written by a run"]
    (tmp_path / "data" / "m.jsonl").unlink()
    with pytest.raises(ValueError, match=r"holds no .* \(written by a run\)"):
        open_manifest(str(tmp_path / "data"))


def test_tables_of_an_output_are_manifests_when_they_are_named(tmp_path):
    folder = output(tmp_path / "out")
    assert prompts(open_manifest(str(folder / "failed"))) == ["failed"]
    assert prompts(open_manifest(str(folder / "index"))) == ["rendered"]


def test_names_alone_make_no_output(tmp_path):
    """People have folders called index and failed, and files called run.json."""
    lines(tmp_path / "index" / "m.jsonl", "a")
    table(tmp_path / "failed" / "part-0.parquet", prompt=["b"])
    lines(tmp_path / "run.json", "c")
    lines(tmp_path / "events.jsonl", "d")
    assert sorted(prompts(open_manifest(str(tmp_path)))) == ["a", "b", "c", "d"]


# --- files that differ -------------------------------------------------------------------------------------------


def test_files_with_other_columns_and_types_are_one_table(tmp_path):
    table(tmp_path / "a.parquet", prompt=["a"], seed=pa.array([None], pa.null()), x=pa.array([1], pa.int32()))
    table(tmp_path / "b.parquet", prompt=["b"], seed=pa.array([5], pa.int32()), x=["text"])
    table(tmp_path / "c.parquet", prompt=["c"], seed=pa.array([2**40], pa.int64()), pipeline=["base"])
    table(
        tmp_path / "d.parquet",
        prompt=["d"],
        seed=pa.array(
            [
                7.0,
            ]
        ),
        negative_prompt=["logo"],
    )
    requests = [judge(raw, RowRules()).request for raw in read_manifest(str(tmp_path))]
    assert [r.seed for r in requests] == [10, 5, 2**40, 7]
    assert [r.pipeline for r in requests] == ["hq", "hq", "base", "hq"] and requests[3].negative_prompt == "logo"
    assert [r.extra for r in requests] == ['{"x": 1}', '{"x": "text"}', None, None]


def test_a_file_with_another_type_in_a_known_column_is_refused_by_name(tmp_path):
    table(tmp_path / "a.parquet", prompt=["a"], seed=[1])
    table(tmp_path / "b.parquet", prompt=["b"], seed=["one"])
    with pytest.raises(ValueError, match=r"b\.parquet: column 'seed' has type string; legal: int64"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize("name", ["prompt", "x"])
def test_two_columns_of_one_name_are_refused_by_name(tmp_path, name):
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["prompt", name, name])
    pq.write_table(twice, tmp_path / "m.parquet")
    count = 3 if name == "prompt" else 2
    with pytest.raises(ValueError, match=rf"m\.parquet: has {count} columns '{name}'; legal: one column of each name"):
        read_manifest(str(tmp_path / "m.parquet"))


# --- values in folders' names --------------------------------------------------------------------------------------


def judged(uri: Path) -> list[LegalRow | IllegalRow]:
    return [judge(raw, RowRules()) for raw in read_manifest(str(uri))]


def test_folders_names_give_values_to_their_rows(tmp_path):
    whole = pa.table({"prompt": ["a", "b", "c"], "height": [64, 128, 192], "pipeline": ["hq", "base", "hq"]})
    pq.write_to_dataset(whole, tmp_path, partition_cols=["height", "pipeline"])
    found = {row.request.prompt: (row.request.height, row.request.pipeline) for row in judged(tmp_path)}
    assert found == {"a": (64, "hq"), "b": (128, "base"), "c": (192, "hq")}


def test_a_part_of_such_a_table_means_what_the_whole_does(tmp_path):
    file = lines(tmp_path / "day=1" / "height=64" / "m.jsonl", "a")
    for place in (tmp_path, tmp_path / "day=1", tmp_path / "day=1" / "height=64", file):
        [row] = judged(place)
        assert row.request.height == 64 and row.request.extra == '{"day": 1}'
    file = lines(tmp_path / "height=64" / "plain" / "m.jsonl", "a")
    assert judged(file)[0].request.height == 1088


def test_values_of_folders_have_types(tmp_path):
    for name in ("n=1/k=007/frame_rate=23.976", "n=2/k=8/frame_rate=25", "n=__HIVE_DEFAULT_PARTITION__/k=a%2Fb %C3%A9"):
        lines(tmp_path / name / "m.jsonl", name)
    found = {row.request.prompt[:3]: row.request for row in judged(tmp_path)}
    assert json.loads(found["n=1"].extra) == {"n": 1, "k": "007"}
    assert json.loads(found["n=2"].extra) == {"n": 2, "k": "8"}
    assert json.loads(found["n=_"].extra) == {"n": None, "k": "a/b é"}
    assert (found["n=1"].frame_rate, found["n=2"].frame_rate, found["n=_"].frame_rate) == (23.976, 25.0, 24.0)
    assert judged(lines(tmp_path / "seed=__HIVE_DEFAULT_PARTITION__" / "m.jsonl", "a"))[0].request.seed == 10
    assert judged(lines(tmp_path / "prompt=a fox%3F" / "m.jsonl", "b", prompt=None))[0].request.prompt == "a fox?"


def test_a_folder_may_give_the_prompt(tmp_path):
    table(tmp_path / "prompt=a fox" / "m.parquet", seed=[1, 2])
    assert [row.request.prompt for row in judged(tmp_path)] == ["a fox"] * 2


def test_rows_are_counted_whose_folder_gives_all_that_a_request_has(tmp_path):
    """`plan` reads the columns of requests alone."""
    table(tmp_path / "prompt=a fox" / "a.parquet", take=[1, 2, 3])
    manifest = open_manifest(str(tmp_path))
    for extra in (True, False):
        assert [raw.values["prompt"] for raw in manifest.rows(extra)] == ["a fox"] * 3


def test_a_value_of_another_type_is_refused_by_name(tmp_path):
    lines(tmp_path / "height=tall" / "m.jsonl", "a")
    with pytest.raises(
        ValueError, match=r"m\.jsonl: its folder 'height=tall' gives column 'height' no value of its type"
    ):
        read_manifest(str(tmp_path))
    lines(tmp_path / "ok" / "height=65" / "n.jsonl", "a")
    [row] = judged(tmp_path / "ok")
    assert ":1:height" in row.messages()[0]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_row_that_says_something_else_than_its_folder_is_illegal(tmp_path, form):
    values = {"prompt": ["a", "b", "c"], "height": [64.0, 128.0, None], "day": ["2026-01-02", "2026-01-02", None]}
    place = tmp_path / "day=2026-01-02" / "height=64" / f"m.{form}"
    table(place, **values)
    if form == "jsonl":
        write_jsonl(place, [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)])
    same, other, gap = judged(tmp_path)
    assert (same.request.height, gap.request.height) == (64, 64) and '"2026-01-02"' in gap.request.extra
    [message] = other.messages()
    assert message.startswith(f"{place}:2:row: ") and "height is 128.0 in the row and 64 in its folder" in message
    assert message.endswith("legal: one value, in the row or in its folder's name")


def test_a_key_with_nothing_between_two_slashes_is_named_and_stops_no_other(bucket):
    for key in ("d/a.jsonl", "d//b.jsonl"):  # pyarrow would not write such a key
        url = f"{os.environ['AWS_ENDPOINT_URL']}/{bucket.removeprefix('s3://')}/{key}"
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(url, b'{"prompt": "a"}', headers, method="PUT"))
    manifest = open_manifest(f"{bucket}/d")
    assert prompts(manifest) == ["a"]
    assert notes(manifest, f"{bucket}/d") == {"keys with nothing between two slashes": "/"}
