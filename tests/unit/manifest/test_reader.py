"""Reading manifests: Parquet and JSONL are streamed, and a bad file is refused before its first row."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ltx_ray.manifest.columns import COLUMNS, arrow_type_fits
from ltx_ray.manifest.reader import manifest_folder, open_manifest, read_manifest
from ltx_ray.manifest.rules import LegalRow, RowRules, judge
from tests.support.samples import write_jsonl


def write_parquet(path: Path, **columns) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def prompts(uri: str) -> list[str | None]:
    return [raw.values.get("prompt") for raw in read_manifest(uri)]


def requests(uri: str):
    rows = [judge(raw, RowRules()) for raw in read_manifest(uri)]
    assert all(isinstance(row, LegalRow) for row in rows)
    return [row.request for row in rows]


def test_parquet_files_say_how_many_rows_they_have(tmp_path):
    parts, mixed = tmp_path / "parts", tmp_path / "mixed"
    for folder in (parts, mixed):
        folder.mkdir()
        write_parquet(folder / "a.parquet", prompt=[f"{n}" for n in range(7)])
    write_parquet(parts / "b.parquet", prompt=["x", "y"])
    write_jsonl(mixed / "b.jsonl", [{"prompt": "x"}])
    assert open_manifest(str(parts)).row_count == 9
    assert open_manifest(str(parts / "a.parquet")).row_count == 7
    assert open_manifest(str(mixed)).row_count is None, "lines would have to be counted"
    keyed = tmp_path / "keyed" / "height=64"
    keyed.mkdir(parents=True)
    write_parquet(keyed / "a.parquet", prompt=["x", "y"])
    assert open_manifest(str(keyed.parent)).row_count == 2


# --- reading -------------------------------------------------------------------------------------


def test_jsonl_rows_carry_their_line_number(tmp_path):
    uri = write_jsonl(tmp_path / "m.jsonl", [{"prompt": "one"}, "", "   ", {"prompt": "two"}])
    rows = list(read_manifest(uri))
    assert [(r.source, r.values) for r in rows] == [(f"{uri}:1", {"prompt": "one"}), (f"{uri}:4", {"prompt": "two"})]


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "json"])
def test_jsonl_of_any_extension_may_have_a_byte_order_mark_and_crlf(tmp_path, ending):
    path = tmp_path / f"m.{ending}"
    path.write_bytes('\ufeff{"prompt": "é"}\r\n{"prompt": "雪"}'.encode())
    assert prompts(str(path)) == ["é", "雪"]


def test_parquet_rows_are_numbered_from_1(tmp_path):
    uri = write_parquet(tmp_path / "m.parquet", prompt=["one", "two"], seed=[1, None])
    rows = list(read_manifest(uri))
    assert [(r.source, r.values) for r in rows] == [
        (f"{uri}:1", {"prompt": "one", "seed": 1}),
        (f"{uri}:2", {"prompt": "two", "seed": None}),
    ]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    write_parquet(tmp_path / "b.parquet", prompt=["b1", "b2"])
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a1"}])
    (tmp_path / "c").mkdir()
    write_jsonl(tmp_path / "c" / "d.ndjson", [{"prompt": "d1"}])
    for name in ("_temporary.jsonl", ".hidden.jsonl", "notes.txt"):
        (tmp_path / name).write_text("not a row")
    (tmp_path / "_delta_log").mkdir()
    (tmp_path / "_delta_log" / "x.parquet").write_text("not a row")
    assert prompts(str(tmp_path)) == ["a1", "b1", "b2", "d1"]
    assert {r.file for r in read_manifest(str(tmp_path) + "/")} == {
        f"{tmp_path}/a.jsonl", f"{tmp_path}/b.parquet", f"{tmp_path}/c/d.ndjson"
    }  # fmt: skip


def test_a_file_uri_is_a_local_file(tmp_path):
    uri = write_jsonl(tmp_path / "m.jsonl", [{"prompt": "one"}])
    assert prompts(f"file://{uri}") == ["one"]
    assert manifest_folder(f"file://{uri}") == str(tmp_path)
    assert manifest_folder(uri) == str(tmp_path)
    assert manifest_folder(str(tmp_path)) == str(tmp_path)


def test_a_folder_may_have_more_files_than_a_process_may_open(tmp_path):
    for n in range(60):
        write_parquet(tmp_path / f"{n:02}.parquet", prompt=[str(n)])
        write_jsonl(tmp_path / f"{n:02}.jsonl", [{"prompt": str(n)}])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 40, hard))
    try:
        assert len(prompts(str(tmp_path))) == 120
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_rows_are_streamed(tmp_path):
    """Asking for the first row does not reach the broken last line."""
    rows = [{"prompt": str(n)} for n in range(3000)]
    uri = write_jsonl(tmp_path / "m.jsonl", [*rows, "broken"])
    stream = read_manifest(uri)
    assert next(stream).values == {"prompt": "0"}
    assert [r.unreadable is None for r in stream][-2:] == [True, False]


# --- files that are refused before the first row -------------------------------------------------


def refused(uri: str) -> str:
    """Message of the ValueError that opening `uri` raises, before any row is read."""
    with pytest.raises(ValueError) as caught:
        read_manifest(uri)
    assert uri.rstrip("/") in str(caught.value)
    return str(caught.value)


def test_a_missing_manifest(tmp_path):
    assert "no such manifest" in refused(str(tmp_path / "none.jsonl"))


def test_an_empty_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert "holds no .parquet or .jsonl file" in refused(str(tmp_path))


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "m.csv").write_text("prompt\na cat\n")
    assert ".jsonl" in refused(str(tmp_path / "m.csv"))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_an_unreadable_parquet_file(tmp_path, content):
    (tmp_path / "m.parquet").write_bytes(content)
    assert "cannot be read as Parquet" in refused(str(tmp_path / "m.parquet"))


def test_a_truncated_parquet_file(tmp_path):
    uri = write_parquet(tmp_path / "m.parquet", prompt=["x"] * 1000)
    Path(uri).write_bytes(Path(uri).read_bytes()[:-20])
    assert "cannot be read as Parquet" in refused(uri)


@pytest.mark.parametrize("content", ["hello\nworld\n", "[1, 2]\n", "[{\n", '"prompt"\n'])
def test_a_file_without_one_json_object(tmp_path, content):
    (tmp_path / "m.jsonl").write_text(content)
    assert "cannot be read as JSON lines" in refused(str(tmp_path / "m.jsonl"))


def test_one_bad_file_in_a_folder_refuses_the_folder(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a1"}])
    (tmp_path / "b.parquet").write_text("x")
    with pytest.raises(ValueError, match=r"b\.parquet: cannot be read"):
        read_manifest(str(tmp_path))


def test_no_prompt_column(tmp_path):
    assert "has no column 'prompt' (it has seed, text)" in refused(
        write_jsonl(tmp_path / "m.jsonl", [{"text": "a cat", "seed": 1}])
    )
    assert "has no column 'prompt' (it has text)" in refused(write_parquet(tmp_path / "m.parquet", text=["a cat"]))


WRONG_PARQUET = {
    "id": pa.array([1]),
    "prompt": pa.array([7]),
    "negative_prompt": pa.array([b"x"]),
    "seed": pa.array(["ten"]),
    "height": pa.array([True]),
    "frame_rate": pa.array(["24"]),
    "video_cfg_scale": pa.array(["3"]),
    "video_stg_blocks": pa.array([28]),
    "audio_stg_blocks": pa.array([["28"]]),
    "loras": pa.array(["style"]),
    "images": pa.array([["a.png"]]),
    "pipeline": pa.array([1]),
}


@pytest.mark.parametrize("column", WRONG_PARQUET)
def test_a_parquet_column_of_the_wrong_type(tmp_path, column):
    message = refused(write_parquet(tmp_path / "m.parquet", **{"prompt": ["x"], column: WRONG_PARQUET[column]}))
    assert f"column '{column}' has type " in message
    assert f"; legal: {COLUMNS[column].type} (" in message


@pytest.mark.parametrize(
    "column, value",
    [
        ("loras", [{"name": "style", "weight": 1.0}]),
        ("loras", [{"name": 7}]),
        ("images", [{"path": "a.png", "frame_idx": "0"}]),
        ("images", [{"path": "a.png", "frame": 0}]),
    ],
)
def test_a_parquet_column_of_structs_with_wrong_fields(tmp_path, column, value):
    message = refused(write_parquet(tmp_path / "m.parquet", prompt=["x"], **{column: pa.array([value])}))
    assert f"column '{column}' has type" in message


@pytest.mark.parametrize("column, value", [("seed", "ten"), ("height", True), ("video_stg_blocks", "28"), ("id", 5)])
def test_a_jsonl_column_that_is_wrong_in_every_row(tmp_path, column, value):
    uri = write_jsonl(tmp_path / "m.jsonl", [{"prompt": "a", column: value}, {"prompt": "b", column: None}])
    assert f"column '{column}' has type" in refused(uri)


def test_a_jsonl_value_that_is_wrong_in_one_row_stays_with_the_row(tmp_path):
    uri = write_jsonl(tmp_path / "m.jsonl", [{"prompt": "a", "seed": "ten"}, {"prompt": "b", "seed": 10}])
    bad, good = (judge(raw, RowRules()) for raw in read_manifest(uri))
    assert bad.messages() == [f"{uri}:1:seed: 'ten', legal: a whole number from 0 to 2^63-1"]
    assert isinstance(good, LegalRow)


# --- convertible types ----------------------------------------------------------------------------


def test_parquet_written_by_pandas_is_read(tmp_path):
    """pandas writes whole numbers with gaps as floats with NaN, and may dictionary-encode strings."""
    uri = write_parquet(
        tmp_path / "m.parquet",
        prompt=pa.array(["a", "b"]).dictionary_encode(),
        seed=np.array([7.0, np.nan]),
        num_frames=np.array([np.nan, 9.0]),
        frame_rate=np.array([np.nan, 25.0]),
        note=np.array([np.nan, 1.0]),
    )
    first, second = requests(uri)
    assert (first.seed, first.num_frames, first.frame_rate) == (7, 121, 24.0)
    assert (second.seed, second.num_frames, second.frame_rate) == (10, 9, 25.0)
    assert type(first.seed) is int and type(second.num_frames) is int
    assert (first.extra, second.extra) == ('{"note": null}', '{"note": 1.0}')


def test_columns_of_nulls_and_small_or_large_types(tmp_path):
    uri = write_parquet(
        tmp_path / "m.parquet",
        prompt=pa.array(["a"], pa.large_string()),
        id=pa.nulls(1),
        seed=pa.array([200], pa.uint8()),
        frame_rate=pa.array([25], pa.int16()),
        video_cfg_scale=pa.array([2.5], pa.float32()),
        video_stg_blocks=pa.array([[1, 2]], pa.large_list(pa.int64())),
        audio_stg_blocks=pa.array([[]], pa.list_(pa.null())),
        loras=pa.array([[]], pa.list_(pa.null())),
        images=pa.nulls(1),
    )
    [request] = requests(uri)
    assert (request.seed, request.frame_rate, request.video_cfg_scale) == (200, 25.0, 2.5)
    assert (request.video_stg_blocks, request.audio_stg_blocks, request.loras) == ((1, 2), (), ())


def test_every_index_column_type_fits_its_own_column():
    for column in COLUMNS.values():
        assert arrow_type_fits(column, column.type), column.name


def test_a_users_own_column_may_be_called_manifest_row(tmp_path):
    uri = write_parquet(tmp_path / "m.parquet", prompt=["a"], manifest_row=[3])
    [request] = requests(uri)
    assert json.loads(request.extra) == {"manifest_row": 3}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_columns_that_may_be_misspelt_are_named(tmp_path, ending):
    row = {"prompt": "a cat", "Height": 64, "num-frames": 9, "Note": "x", "note": "y", "seed": 3}
    path = tmp_path / "folder=x" / f"m.{ending}"
    path.parent.mkdir()
    if ending == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        pq.write_table(pa.table({name: [value] for name, value in row.items()}), path)
    for place in (path, tmp_path):
        said: list[str] = []
        open_manifest(str(place)).say_skipped(said.append)
        assert said == [
            f"{place}: column 'Height' is not 'height': it goes to extra, and changes no clip",
            f"{place}: column 'num-frames' is not 'num_frames': it goes to extra, and changes no clip",
        ]
