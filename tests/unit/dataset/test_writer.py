"""The dataset's tables: their schemas, names that tell which rows exist, and failed/ as a manifest."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from ltx_ray.dataset.failures import FailureScope
from ltx_ray.dataset.layout import ADDED_COLUMNS, FAILED_SCHEMA, INDEX_SCHEMA, NUMBERED_PART, one_row_part, row_key
from ltx_ray.dataset.writer import DatasetWriter
from ltx_ray.manifest.reader import RawRow, read_manifest
from ltx_ray.manifest.rules import IllegalRow, LegalRow, RowRules, judge
from ltx_ray.records import Clip, ImageCondition, LoraUse, RenderRequest, plain
from ltx_ray.storage.store import Store
from tests.support.damaged_dataset import as_one_row_parts
from tests.support.datasets import dataset_writer, finish, rows_in
from tests.support.results import CRASH, ITEM, NAN, OTHER, RENDERED
from tests.support.samples import request, write_jsonl


@pytest.fixture
def writer(tmp_path) -> DatasetWriter:
    return dataset_writer(Store(str(tmp_path / "out")))


def table(writer: DatasetWriter, folder: str) -> pa.Table:
    """What a plain reader of the folder sees once everything is folded."""
    finish(writer)
    return pq.read_table(writer.log.store.path(folder))


def rows(writer: DatasetWriter, folder: str) -> list[dict]:
    finish(writer)
    return rows_in(writer.log.store, folder)


def one_row(writer: DatasetWriter, folder: str) -> dict:
    [row] = rows(writer, folder)
    return row


def full_request() -> RenderRequest:
    """A request with a value in every column that may be empty."""
    base = request(
        id="cat-1", seed=2**63 - 1, video_stg_blocks=[28, 29], negative_prompt="", note={"x": 1}, prompt="雪 🐱"
    )
    return dataclasses.replace(base, loras=(LoraUse("style", 0.5),))


# --- index ---------------------------------------------------------------------------------------


def test_the_index_has_its_documented_columns():
    manifest = """id prompt negative_prompt seed height width num_frames frame_rate num_inference_steps
        video_cfg_scale video_stg_scale video_rescale_scale video_modality_scale video_stg_blocks video_skip_step
        audio_cfg_scale audio_stg_scale audio_rescale_scale audio_modality_scale audio_stg_blocks audio_skip_step
        distilled_lora_strength_stage_1 distilled_lora_strength_stage_2 loras images pipeline extra"""
    added = """item_id clip clip_sha256 latents_sha256 audio_stage flags attempts stage1_replica stage2_replica switches
        text_seconds stage1_seconds stage2_seconds decode_seconds gpu_seconds device numerics recipe recipe_digest
        noise_ledger versions finished_at loudness_lufs clipped_samples motion sharpness mean_luma cuts sound_seconds
        still_share black_share"""
    assert set(INDEX_SCHEMA.names) == set(manifest.split()) | set(added.split())
    assert set(INDEX_SCHEMA.names) - set(added.split()) == {f.name for f in dataclasses.fields(RenderRequest)}
    assert INDEX_SCHEMA.names[-len(ADDED_COLUMNS) :] == added.split()[-len(ADDED_COLUMNS) :]
    types = {name: INDEX_SCHEMA.field(name).type for name in INDEX_SCHEMA.names}
    assert types["seed"] == pa.int64() and types["extra"] == pa.string()
    assert types["video_stg_blocks"] == types["audio_stg_blocks"] == pa.list_(pa.int32())
    assert types["attempts"] == types["switches"] == pa.int32()
    assert types["flags"] == pa.list_(pa.string())
    assert pa.types.is_list(types["images"]) and pa.types.is_struct(types["images"].value_type)


@pytest.mark.parametrize("make", [request, full_request])
def test_every_part_has_the_whole_schema(writer, make):
    writer.write_index(ITEM, make(), RENDERED)
    found = table(writer, "index")
    assert found.schema.equals(INDEX_SCHEMA)
    assert found.num_rows == 1


def test_parts_of_empty_and_of_full_rows_read_as_one_table(writer):
    writer.write_index(ITEM, request(), dataclasses.replace(RENDERED, clip=Clip("x", "y", "z", (), "stage_1")))
    finish(writer)
    writer.write_index(OTHER, full_request(), RENDERED)
    found = table(writer, "index")
    assert found.num_rows == 2 == len(writer.log.store.list_names("index"))
    assert found.schema.remove_metadata().equals(INDEX_SCHEMA)


def as_before(writer: DatasetWriter, path: str) -> None:
    """Take from a part the columns that earlier versions did not write."""
    store = writer.log.store
    found = pq.read_table(io.BytesIO(store.read_bytes(path))).drop_columns(list(ADDED_COLUMNS))
    buffer = io.BytesIO()
    pq.write_table(found, buffer)
    store.write_bytes(path, buffer.getvalue())


@pytest.mark.parametrize("older", [ITEM, OTHER])
def test_parts_of_an_earlier_version_and_new_ones_read_as_one_table(writer, older):
    """In either order of their names, as docs/dataset.md says."""
    for item in (ITEM, OTHER):
        writer.write_index(item, request(id=item[:1]), RENDERED)
    finish(writer)
    as_one_row_parts(writer.log.store)
    as_before(writer, f"index/{one_row_part(older, row_key(older[:1]))}")
    files = [str(path) for path in sorted(Path(writer.log.store.path("index")).iterdir())]
    schema = pa.unify_schemas([pq.read_schema(file) for file in files])
    table = pads.dataset(files, schema=schema).to_table()
    assert set(schema.names) == set(INDEX_SCHEMA.names)
    assert {row["item_id"]: row["motion"] for row in table.to_pylist()} == {ITEM: 0.25, OTHER: 0.25} | {older: None}


def test_a_copy_of_an_earlier_versions_row_has_all_columns(writer):
    writer.write_index(ITEM, request(id="a"), RENDERED)
    finish(writer)
    as_one_row_parts(writer.log.store)
    as_before(writer, f"index/{one_row_part(ITEM, row_key('a'))}")
    writer = dataset_writer(writer.log.store, "next")
    writer.copy_index_row(ITEM, row_key("a"), request(id="b"))
    finish(writer)
    [new] = [name for name in writer.log.store.list_names("index") if NUMBERED_PART.fullmatch(name)]
    copied = pq.read_table(writer.log.store.path(f"index/{new}"))
    assert copied.schema.equals(INDEX_SCHEMA)
    [row] = copied.to_pylist()
    assert row["id"] == "b" and row["clip_sha256"] == "c" * 64 and {row[name] for name in ADDED_COLUMNS} == {None}


def test_an_index_row_says_what_was_rendered(writer):
    full = full_request()
    writer.write_index(ITEM, full, RENDERED)
    row = one_row(writer, "index")
    for name, value in full.row().items():
        assert row[name] == value, name
    assert row["item_id"] == ITEM and row["clip"] == f"clips/aa/{ITEM}.mp4"
    assert (row["clip_sha256"], row["latents_sha256"]) == ("c" * 64, "d" * 64)
    assert row["flags"] == ["silent", "prompt_truncated"]
    assert {name: row[name] for name in ADDED_COLUMNS} == {**plain(RENDERED.clip.picture), **plain(RENDERED.clip.sound)}
    assert None not in {row[name] for name in ADDED_COLUMNS}
    assert (row["attempts"], row["switches"], row["stage1_replica"], row["stage2_replica"]) == (2, 1, "stage1-0", None)
    assert (row["text_seconds"], row["stage1_seconds"], row["decode_seconds"]) == (1.0, 2.5, 0.0)
    assert row["finished_at"].tzinfo is not None


def test_writing_twice_changes_nothing(writer):
    for _ in range(2):
        writer.write_index(ITEM, request(id="a"), RENDERED)
        writer.log.commit()
    assert len(rows(writer, "index")) == 1
    writer.write_index(ITEM, request(id="a"), RENDERED)
    assert len(rows(writer, "index")) == 1 == len(writer.log.store.list_names("index"))


def test_rows_of_one_item_are_told_apart_by_their_ids(writer):
    for name in ("a", "b"):
        writer.write_index(ITEM, request(id=name), RENDERED)
    assert [row["id"] for row in rows(writer, "index")] == sorted("ab", key=row_key)
    assert len(row_key("a")) == 8 and row_key(None) == row_key("")


@pytest.mark.parametrize("folded", [False, True])
def test_another_row_of_an_item_gets_a_copy_of_its_index_row(writer, folded):
    writer.write_index(ITEM, request(id="a", note="first"), RENDERED)
    writer.log.commit()
    if folded:
        writer.log.fold()
    writer.copy_index_row(ITEM, row_key("a"), request(id="b", note="second"))
    one, two = sorted(rows(writer, "index"), key=lambda row: row["id"])
    assert {k for k in one if one[k] != two[k]} == {"id", "extra"}
    assert (two["id"], two["extra"]) == ("b", '{"note": "second"}')


@pytest.mark.parametrize("table", ["index", "previews"])
def test_a_copy_has_its_own_rows_images_and_loras(writer, table):
    """Images and LoRAs enter an item by their content, so that rows of one item may name them otherwise."""
    one, two = (
        dataclasses.replace(
            request(id=name), loras=(LoraUse(name, 0.5),), images=(ImageCondition(f"/{name}/img.png", 0, 1.0, 33),)
        )
        for name in ("a", "b")
    )
    raw = RawRow("m.jsonl", 1, {"prompt": "x"})
    if table == "index":
        writer.write_index(ITEM, one, RENDERED)
        writer.log.commit()
        writer.copy_index_row(ITEM, row_key("a"), two)
    else:
        writer.write_preview(ITEM, one, raw, RENDERED)
        writer.write_failed(ITEM, two, raw, CRASH)
        finish(writer)
        writer.copy_preview_row(ITEM, row_key("a"), two, raw)
        assert rows(writer, "failed") == [], "a row with a preview has not failed"
    [row] = [row for row in rows(writer, table) if row["id"] == "b"]
    assert row["loras"] == [{"name": "b", "strength": 0.5}]
    assert [image["path"] for image in row["images"]] == ["/b/img.png"]
    assert row["latents_sha256"] == RENDERED.clip.latents_sha256


# --- failures ------------------------------------------------------------------------------------


def test_a_failed_row_says_why(writer):
    full = full_request()
    writer.write_failed(ITEM, full, RawRow("m.jsonl", 7, {"prompt": "x"}), CRASH)
    found = table(writer, "failed")
    assert found.schema.equals(FAILED_SCHEMA)
    [row] = found.to_pylist()
    assert (row["item_id"], row["source"], row["stage"], row["attempts"]) == (ITEM, "m.jsonl:7", "stage2", 3)
    assert (row["error_class"], row["message"]) == ("infrastructure", "the gang died")
    assert row["traceback"] == "Traceback ..."
    assert row["prompt"] == full.prompt and row["loras"] == [{"name": "style", "strength": 0.5}]


def test_a_row_that_succeeds_is_no_longer_failed(writer):
    raw = RawRow("m.jsonl", 1, {"prompt": "x"})
    for failure in (CRASH, NAN):
        writer.write_failed(ITEM, request(id="a"), raw, failure)
        assert one_row(writer, "failed")["message"] == failure.message, "the newest failure only"
    writer.write_failed(ITEM, request(id="b"), raw, CRASH)
    finish(writer)
    writer.write_index(ITEM, request(id="a"), RENDERED)
    assert one_row(writer, "failed")["id"] == "b"
    writer.copy_index_row(ITEM, row_key("a"), request(id="b"))
    assert rows(writer, "failed") == [] and writer.log.store.list_names("failed") == []


def test_a_row_that_failed_as_another_item_is_no_longer_failed(writer):
    raw, same, other = RawRow("m.jsonl", 1, {}), request(id="a"), RawRow("m.jsonl", 2, {})
    writer.write_failed(OTHER, same, raw, CRASH)
    writer.write_failed("c" * 32, same, other, CRASH)
    finish(writer)
    writer.write_index(ITEM, same, RENDERED)
    writer.forget_older_failures(ITEM, same, raw.source)
    assert one_row(writer, "failed")["item_id"] == "c" * 32, "which is of another row of the manifest"


# --- failed/ as a manifest -----------------------------------------------------------------------

LINES = [
    {"prompt": "legal, all defaults"},
    {"prompt": "legal", "id": "cat", "seed": 3, "frame_rate": 25, "note": {"deep": [1, None]}, "snow": "雪"},
    {"prompt": "illegal", "id": "dog", "height": 1080, "note": 1},
    {"prompt": "illegal", "seed": "ten"},
    {"prompt": "a \ud800 half"},
    {"prompt": "id", "id": "\ud800"},
    {"id": "no-prompt"},
    {"prompt": "nan", "video_cfg_scale": float("nan"), "seed": 10**30},
    "this is no JSON",
    "[1, 2]",
]


def fail_all(writer: DatasetWriter, manifest: str, rules: RowRules) -> list:
    """Record every row of the manifest as failed, and return the verdicts."""
    rows = [judge(raw, rules) for raw in read_manifest(manifest)]
    for n, row in enumerate(rows):
        if isinstance(row, IllegalRow):
            writer.write_illegal(row.raw, row.messages())
        else:
            writer.write_failed(f"{n:032x}", row.request, row.raw, CRASH)
    finish(writer)
    return rows


def test_failed_rows_are_a_manifest_with_the_same_verdicts(writer, tmp_path):
    rules = RowRules(num_layers=48)
    manifest = write_jsonl(tmp_path / "m.jsonl", LINES)
    before = fail_all(writer, manifest, rules)
    assert sum(isinstance(r, IllegalRow) for r in before) == 8
    again = [judge(raw, rules) for raw in read_manifest(writer.log.store.path("failed"))]

    def verdicts(rows: list) -> dict:
        return {r.raw.source: r.messages() if isinstance(r, IllegalRow) else r.request for r in rows}

    assert verdicts(again) == verdicts(before)


@pytest.mark.parametrize("values", [{"pipeline": "base"}, {"pipeline": "base", "video_stg_blocks": [1]}, {}])
def test_a_row_of_a_small_model_is_read_back_as_it_was_planned(writer, values):
    """The default of base names block 28, which a model of 2 layers lacks; a row may not ask for it."""
    rules = RowRules(num_layers=2)
    planned = judge(RawRow("m.jsonl", 1, {"prompt": "a cat", "id": "a", **values}), rules)
    assert isinstance(planned, LegalRow)
    writer.write_preview(ITEM, planned.request, planned.raw, RENDERED)
    writer.write_failed(ITEM, planned.request, planned.raw, CRASH)
    finish(writer)
    for folder in ("failed", "previews"):
        [again] = [judge(raw, rules) for raw in read_manifest(writer.log.store.path(folder))]
        assert isinstance(again, LegalRow), again.messages()
        assert again.request == planned.request
    asked = judge(RawRow("m.jsonl", 1, {"prompt": "a cat", "pipeline": "base", "video_stg_blocks": [28]}), rules)
    assert isinstance(asked, IllegalRow)


def test_failing_again_in_a_retry_adds_no_row(writer, tmp_path):
    rules = RowRules()
    fail_all(writer, write_jsonl(tmp_path / "m.jsonl", LINES), rules)
    before = sorted(row["source"] for row in rows(writer, "failed"))
    fail_all(dataset_writer(writer.log.store, "next"), writer.log.store.path("failed"), rules)
    assert sorted(row["source"] for row in rows_in(writer.log.store, "failed")) == before


def test_a_failed_parquet_row_is_read_back_unchanged(writer, tmp_path):
    import datetime

    day = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    values = {"prompt": "x", "day": day, "raw": b"\xff\x00", "seed": 5, "map": [("k", 1)], "gap": float("nan")}
    types = {"map": pa.map_(pa.string(), pa.int64())}
    table = pa.table({k: pa.array([v], types.get(k)) for k, v in values.items()})
    pq.write_table(table, tmp_path / "m.parquet")
    [before] = fail_all(writer, str(tmp_path / "m.parquet"), RowRules())
    [again] = [judge(raw, RowRules()) for raw in read_manifest(writer.log.store.path("failed"))]
    assert again.request == before.request
    assert json.loads(again.request.extra)["day"] == str(day)
    assert again.raw.source == f"{tmp_path}/m.parquet:1"


def test_the_original_row_is_stored_even_when_its_values_fit_no_column(writer):
    raw = RawRow("m.jsonl", 2, {"prompt": 5, "images": [{"path": 3}], "seed": 10**40, "height": 63})
    writer.write_illegal(raw, ["why"])
    row = one_row(writer, "failed")
    assert (row["prompt"], row["images"], row["seed"], row["height"]) == (None, None, None, 63)
    assert json.loads(row["manifest_row"]) == dict(raw.values)
    assert (row["stage"], row["attempts"], row["error_class"], row["message"]) == ("plan", 0, "row", "why")


def judged_again(writer: DatasetWriter, manifest: str, *illegal: tuple[str, int]) -> set[tuple[str, str]]:
    """What is left in failed/ after a complete run over the manifest, with these illegal rows."""
    scope = FailureScope(writer.log.store, manifest)
    for source, number in illegal:
        scope.found(writer.write_illegal(RawRow(source, number, {"prompt": ""}), ["why"]))
    writer.complete(scope)
    return {(row["source"], row["stage"]) for row in rows(writer, "failed")}


def test_illegal_rows_that_are_gone_from_their_manifest_are_forgotten(writer):
    sources = ["d/m.jsonl", "d/m.jsonl2", "d/m.json", "d/other.jsonl"]
    for source in sources:
        writer.write_illegal(RawRow(source, 1, {"prompt": ""}), ["why"])
    writer.write_illegal(RawRow("d/m.jsonl", 2, {"prompt": ""}), ["why"])
    assert len(rows(writer, "failed")) == 5
    left = judged_again(writer, "d/m.jsonl", ("d/m.jsonl", 1))
    assert left == {(f"{source}:1", "plan") for source in sources}


def test_illegal_rows_that_are_gone_from_their_folder_are_forgotten(writer):
    for source in ("d/mm/x.jsonl", "d/mm2/x.jsonl", "d/mm/y.jsonl"):
        writer.write_illegal(RawRow(source, 1, {"prompt": ""}), ["why"])
    finish(writer)
    left = judged_again(writer, "d/mm/", ("d/mm/x.jsonl", 1))
    assert left == {("d/mm/x.jsonl:1", "plan"), ("d/mm2/x.jsonl:1", "plan")}


def test_a_retry_forgets_the_illegal_rows_of_every_manifest(writer):
    for source in ("a.jsonl", "b.jsonl"):
        writer.write_illegal(RawRow(source, 1, {"prompt": ""}), ["why"])
    writer.write_failed(ITEM, request(id="x"), RawRow("a.jsonl", 2, {}), CRASH)
    finish(writer)
    left = judged_again(writer, str(Path(writer.log.store.uri) / "failed"), ("a.jsonl", 1))
    assert left == {("a.jsonl:1", "plan"), ("a.jsonl:2", "stage2")}
