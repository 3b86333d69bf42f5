"""Rows of a manifest: defaults, what is legal in each column, and how an illegal row is reported."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltx_ray.dataset.layout import INDEX_SCHEMA
from ltx_ray.manifest.columns import COLUMNS
from ltx_ray.manifest.raw import stored_row
from ltx_ray.manifest.reader import RawRow, read_manifest
from ltx_ray.manifest.rules import IllegalRow, LegalRow, RowRules, check_defaults, judge, resolved_values
from ltx_ray.presets import DEFAULT_NEGATIVE_PROMPT, served_pipelines
from ltx_ray.records import LoraUse, canonical_json
from tests.support.samples import judged, request, write_jsonl

ROOT_RULES = RowRules(image_roots=("/data/images",))


def only_message(values: dict, rules: RowRules | None = None) -> str:
    [message] = judged({"prompt": "a cat", **values}, rules).messages()
    return message


# --- defaults ------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_hq_pipeline():
    r = request()
    assert (r.width, r.height, r.num_frames, r.frame_rate, r.seed) == (1920, 1088, 121, 24.0, 10)
    assert r.num_inference_steps == 15
    assert (r.video_cfg_scale, r.video_stg_scale, r.video_rescale_scale, r.video_modality_scale) == (3.0, 0, 0.45, 3.0)
    assert (r.audio_cfg_scale, r.audio_stg_scale, r.audio_rescale_scale, r.audio_modality_scale) == (7.0, 0, 1.0, 3.0)
    assert (r.distilled_lora_strength_stage_1, r.distilled_lora_strength_stage_2) == (0.25, 0.5)
    assert r.negative_prompt == DEFAULT_NEGATIVE_PROMPT
    assert (r.loras, r.images, r.pipeline, r.id, r.extra) == ((), (), "hq", None, None)


def test_null_means_the_default():
    assert request(**dict.fromkeys(set(COLUMNS) - {"prompt"})) == request()


def test_an_empty_negative_prompt_is_empty():
    assert request(negative_prompt="").negative_prompt == ""


def test_the_operators_defaults_override_the_pipelines_and_yield_to_the_rows():
    rules = RowRules(defaults=check_defaults({"seed": 3, "height": 64, "frame_rate": 25}))
    row = judged({"prompt": "a", "seed": 4, "height": None}, rules)
    assert isinstance(row, LegalRow)
    assert (row.request.seed, row.request.height, row.request.frame_rate) == (4, 64, 25.0)


def test_a_float_that_may_have_been_another_seed_says_so():
    [message] = judged({"prompt": "a", "seed": 1e18}, RowRules()).messages()
    assert message.endswith("seed: 1e+18, legal: an integer, or a float below 2^53 in size: larger are inexact")


def test_the_operators_defaults_are_checked_under_their_flag():
    with pytest.raises(ValueError, match="--num-inference-steps: 1, legal: a whole number from 2"):
        check_defaults({"num_inference_steps": 1})
    with pytest.raises(ValueError, match="--a2v-guidance-scale: nan, legal: a finite number"):
        check_defaults({"video_modality_scale": float("nan")})
    with pytest.raises(ValueError, match="--seed: 'x'"):
        check_defaults({"seed": "x"})


def test_unknown_columns_are_stored_as_json():
    extra = request(b=[1, {"c": None}], a="é").extra
    assert extra == '{"a": "é", "b": [1, {"c": null}]}'


@pytest.mark.parametrize(
    "value, stored",
    [
        (float("nan"), None),
        ([float("inf"), {"x": float("nan")}, 1.0], [None, {"x": None}, 1.0]),
        ("\ud800", "\ud800"),
        ({"\udcff": "é"}, {"\udcff": "é"}),
        (b"\xff", "b'\\xff'"),
    ],
)
def test_extra_is_json_and_utf8_for_any_value(value, stored):
    extra = request(x=value).extra
    extra.encode()
    assert json.loads(extra, parse_constant=pytest.fail) == {"x": stored}


# --- each column ---------------------------------------------------------------------------------

ILLEGAL = [
    ("prompt", ""),
    ("prompt", " \n\t"),
    ("prompt", None),
    ("prompt", "a\x00b"),
    ("prompt", "a \ud800"),
    ("prompt", ["a"]),
    ("negative_prompt", "\udfff"),
    ("negative_prompt", "\x00"),
    ("negative_prompt", 0),
    ("id", ""),
    ("id", "a/b"),
    ("id", "../a"),
    ("id", "a\n"),
    ("id", "a b"),
    ("id", "é"),
    ("id", "x" * 129),
    ("id", 7),
    ("seed", -1),
    ("seed", 2**63),
    ("seed", 1.5),
    ("seed", True),
    ("seed", "10"),
    ("seed", float("inf")),
    ("seed", 2.0**53),
    ("seed", 1e18),
    ("height", 1080),
    ("height", 0),
    ("height", -64),
    ("height", 2**31),
    ("height", 16_384 + 64),
    ("width", 32_768),
    ("width", 100),
    ("width", 63.5),
    ("num_frames", 120),
    ("num_frames", 0),
    ("num_frames", 2**31 + 1),
    ("frame_rate", 0),
    ("frame_rate", -24),
    ("frame_rate", 1e-9),
    ("frame_rate", 1001),
    ("frame_rate", float("nan")),
    ("frame_rate", 10**400),
    ("frame_rate", "24"),
    ("num_inference_steps", 1),
    ("num_inference_steps", 0),
    ("num_inference_steps", 1001),
    ("video_cfg_scale", float("inf")),
    ("video_cfg_scale", 1e300),
    ("audio_rescale_scale", -3.5e38),
    ("video_stg_scale", 1e-300),
    ("audio_stg_scale", -1e-39),
    ("distilled_lora_strength_stage_1", 1e300),
    ("loras", [{"name": "style", "strength": 1e300}]),
    ("loras", [{"name": "style", "strength": 1e-300}]),
    ("audio_modality_scale", [3.0]),
    ("video_stg_blocks", [-1]),
    ("video_stg_blocks", [48]),
    ("audio_stg_blocks", [0, 10**12]),
    ("audio_stg_blocks", [0.5]),
    ("audio_stg_blocks", 3),
    ("video_skip_step", -1),
    ("audio_skip_step", 1001),
    ("distilled_lora_strength_stage_1", float("nan")),
    ("distilled_lora_strength_stage_2", "strong"),
    ("loras", ["style"]),
    ("loras", [{"name": "style", "weight": 1}]),
    ("loras", [{"strength": 1}]),
    ("loras", [{"name": "style", "strength": float("inf")}]),
    ("loras", [{"name": "style"}, {"name": "style"}]),
    ("loras", [{"name": "unknown"}]),
    ("images", "a.png"),
    ("images", [{"frame_idx": 0}]),
    ("images", [{"path": ""}]),
    ("images", [{"path": "a\x00.png"}]),
    ("images", [{"path": "\ud800.png"}]),
    ("images", [{"path": "a.png", "frame_idx": -1}]),
    ("images", [{"path": "a.png", "frame_idx": 2**31}]),
    ("images", [{"path": "a.png", "strength": 1.5}]),
    ("images", [{"path": "a.png", "crf": 52}]),
    ("pipeline", "turbo"),
    ("pipeline", ""),
    ("pipeline", "\ud800"),
    ("pipeline", 1),
]
RULES = RowRules(num_layers=48, loras=(LoraUse("style", 0.7), LoraUse("light", 0.3)), image_roots=(".",))


@pytest.mark.parametrize("column, value", ILLEGAL, ids=repr)
def test_an_illegal_value_is_reported_once_under_its_column(column, value):
    row = judged({"prompt": "a cat", column: value}, RULES)
    assert isinstance(row, IllegalRow)
    assert [p.column for p in row.problems] == [column]
    [message] = row.messages()
    assert message.startswith(f"m.jsonl:1:{column}")
    assert ", legal: " in message
    message.encode()
    assert "\n" not in message


LEGAL = [
    ("prompt", " a cat ", " a cat "),
    ("prompt", "日本語 🐱\n\u202e", "日本語 🐱\n\u202e"),
    ("id", "A-z_0.9", "A-z_0.9"),
    ("id", "x" * 128, "x" * 128),
    ("seed", 0, 0),
    ("seed", 2**63 - 1, 2**63 - 1),
    ("seed", 7.0, 7),
    ("seed", 2.0**53 - 1, 2**53 - 1),
    ("height", 64, 64),
    ("num_frames", 1, 1),
    ("frame_rate", 29.97, 29.97),
    ("frame_rate", 1000, 1000.0),
    ("num_inference_steps", 2, 2),
    ("video_cfg_scale", -1, -1.0),
    ("video_cfg_scale", 3.4028234663852886e38, 3.4028234663852886e38),
    ("video_stg_scale", 2.0**-126, 2.0**-126),
    ("video_stg_blocks", [47, 0], (47, 0)),
    ("video_stg_blocks", [], ()),
    ("audio_skip_step", 0, 0),
    ("distilled_lora_strength_stage_1", 0, 0.0),
    ("loras", [], ()),
    ("loras", [{"name": "style"}], (LoraUse("style", 1.0),)),
    ("loras", [{"name": "light", "strength": 2}, {"name": "style", "strength": None}],
     (LoraUse("style", 1.0), LoraUse("light", 2.0))),
    ("pipeline", "hq", "hq"),
]  # fmt: skip


@pytest.mark.parametrize("column, value, parsed", LEGAL, ids=repr)
def test_a_legal_value_is_parsed(column, value, parsed):
    # Even at 1000 frames a second, the default 121 frames last three audio latents.
    row = judged({"prompt": "a cat", column: value}, RULES)
    assert isinstance(row, LegalRow), row.messages()
    assert getattr(row.request, column) == parsed
    assert type(getattr(row.request, column)) is type(parsed)


def test_a_row_without_loras_takes_the_declared_ones():
    assert judged({"prompt": "a"}, RULES).request.loras == RULES.loras
    assert judged({"prompt": "a", "loras": None}, RULES).request.loras == RULES.loras


def test_an_unknown_lora_names_the_declared_ones():
    assert "(light, style)" in only_message({"loras": [{"name": "x"}]}, RULES)
    assert "give --lora PATH" in only_message({"loras": [{"name": "x"}]})


def test_a_pipeline_that_is_known_but_not_served_says_so():
    message = only_message({"pipeline": "distilled"})
    assert message.endswith("legal: hq or base (not 'distilled', which the loaded checkpoint does not serve)")
    message = only_message({"pipeline": "hq"}, RowRules(pipelines=served_pipelines(distilled=True)))
    assert message.endswith("legal: distilled (not 'hq', which the loaded checkpoint does not serve)")
    assert "which is unknown" in only_message({"pipeline": "turbo"})


# --- messages ------------------------------------------------------------------------------------


def test_a_message_names_file_row_column_id_value_and_what_is_legal():
    row = judge(RawRow("s3://b/m.parquet", 12, {"prompt": "a", "id": "cat-1", "height": 1080}), RowRules())
    [message] = row.messages()
    assert message == (
        "s3://b/m.parquet:12:height (cat-1): 1080, legal: a positive multiple of 64 (next: 1024 or 1088)"
    )


def test_all_problems_of_a_row_are_listed():
    row = judged({"id": "a/b", "height": 1, "width": 1, "num_frames": 2, "seed": -1, "prompt": " "})
    assert {p.column for p in row.problems} == {"id", "height", "width", "num_frames", "seed", "prompt"}


@pytest.mark.parametrize("row_id", ["a\nb", "\x1b[31m", "\ud800", "x" * 500])
def test_an_illegal_id_cannot_break_the_message(row_id):
    [message] = judged({"prompt": "a", "id": row_id}).messages()
    message.encode()
    assert message.isprintable()
    assert len(message) < 500


def test_long_values_are_cut():
    assert len(only_message({"seed": "x" * 10_000})) < 300


def test_a_line_that_is_not_json_is_an_illegal_row():
    row = judge(RawRow("m.jsonl", 3, {}, unreadable="not JSON (x)"), RowRules())
    assert row.messages() == ["m.jsonl:3:row: 'not JSON (x)', legal: one JSON object per line"]


# --- images --------------------------------------------------------------------------------------


def root_refused(path: str, roots: tuple[str, ...], manifest: str) -> bool:
    row = judge(RawRow(manifest, 1, {"prompt": "a", "images": [{"path": path}]}), RowRules(image_roots=roots))
    return isinstance(row, IllegalRow) and any("inside an --image-root" in p.legal for p in row.problems)


@pytest.fixture
def tree(tmp_path):
    """in/ is the root, with a.png and sub/; out/b.png is outside it. Links lead from each to the other."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "sub").mkdir(parents=True)
    outside.mkdir()
    for file in (inside / "a.png", inside / "sub" / "c.png", outside / "b.png", tmp_path / "in2.png"):
        file.write_bytes(b"x")
    os.symlink(outside / "b.png", inside / "link.png")
    os.symlink(outside, inside / "dir")
    os.symlink(inside / "a.png", outside / "back.png")
    os.symlink("loop", inside / "loop")
    return tmp_path


@pytest.mark.parametrize("path", ["a.png", "sub/c.png", "sub/../a.png", "./a.png", "{in}/a.png", "{out}/back.png"])
def test_images_inside_a_root(tree, path):
    path = path.format(**{"in": tree / "in", "out": tree / "out"})
    assert not root_refused(path, (str(tree / "in"),), str(tree / "in" / "m.jsonl"))


@pytest.mark.parametrize(
    "path", ["../out/b.png", "sub/../../out/b.png", "{out}/b.png", "link.png", "dir/b.png", "/etc/passwd",
             "{in}/../in2.png", "{in}2.png", "s3://other/a.png", "file:///etc/passwd", "../in2.png"],
)  # fmt: skip
def test_images_outside_every_root(tree, path):
    path = path.format(**{"in": tree / "in", "out": tree / "out"})
    assert root_refused(path, (str(tree / "in"), str(tree / "in" / "sub")), str(tree / "in" / "m.jsonl"))


def test_relative_image_paths_start_at_the_manifest_not_at_the_root(tree):
    manifest = str(tree / "in" / "m.jsonl")
    assert not root_refused("../out/b.png", (str(tree / "out"),), manifest)
    assert root_refused("b.png", (str(tree / "out"),), manifest)


def test_images_in_an_object_store():
    roots, manifest = ("s3://bucket/set",), "s3://bucket/set/m.jsonl"
    for path in ("s3://bucket/set/a.png", "a.png", "sub/a.png"):
        assert not root_refused(path, roots, manifest)
    for path in ("s3://bucket/setx/a.png", "s3://bucket/set/../a.png", "../a.png", "/etc/passwd", "gs://bucket/set/a"):
        assert root_refused(path, roots, manifest)


def test_a_relative_source_of_an_older_dataset_counts_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = RawRow("m.jsonl", 3, {"prompt": "a", "images": [{"path": "a.png"}]}, from_failed=True)
    row = judge(raw, RowRules())
    assert isinstance(row, LegalRow), row.messages()
    assert row.request.images[0].path == f"{tmp_path}/a.png"


def test_an_illegal_row_is_as_illegal_when_it_is_read_from_failed():
    """A legal row has its defaults written out there, such as a block that a small model does not have."""
    rules = RowRules(num_layers=4)
    written = RawRow("m.jsonl", 1, {"prompt": "a", "pipeline": "base", "video_stg_blocks": [28]})
    for raw in (written, stored_row("m.jsonl", 1, written.stored())):
        assert judge(raw, rules).messages() == ["m.jsonl:1:video_stg_blocks: [28], legal: block numbers from 0 to 3"]
    legal = judge(RawRow("m.jsonl", 1, {"prompt": "a", "pipeline": "base"}), rules)
    again = judge(stored_row("m.jsonl", 1, resolved_values(legal.request)), rules)
    assert again.request == legal.request


def test_without_roots_images_come_from_the_rows_own_folder():
    assert not root_refused("a.png", (), "/data/m.jsonl")
    assert root_refused("../a.png", (), "/data/m.jsonl")
    assert root_refused("/etc/passwd", (), "/data/m.jsonl")


# --- arbitrary values ----------------------------------------------------------------------------

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8)
    | st.sampled_from([0, 64, 121, 24.0, "hq", "base", "style", 10**400, "\ud800", "\x00"])
)  # fmt: skip
KEYS = st.sampled_from(["name", "strength", "path", "frame_idx", "crf", "x"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=6
)
ROWS = st.fixed_dictionaries({}, optional={name: VALUES for name in [*COLUMNS, "note"]})
ROWS_WITH_A_PROMPT = st.builds(lambda row: {**row, "prompt": "a cat"}, st.dictionaries(KEYS | st.just("note"), VALUES))


@settings(max_examples=200)
@given(ROWS | ROWS_WITH_A_PROMPT)
def test_any_row_is_judged(values):
    row = judged(values, RULES)
    if isinstance(row, IllegalRow):
        assert row.problems
        for message in row.messages():
            message.encode()
            assert message.isprintable()
    else:
        canonical_json(row.request).encode()
        pa.Table.from_pylist([{**dict.fromkeys(INDEX_SCHEMA.names), **row.request.row()}], schema=INDEX_SCHEMA)


@pytest.mark.parametrize("depth", [100, 900, 100_000])
def test_deep_nesting_is_judged(tmp_path, depth):
    for column in ("note", "seed"):
        nested = "[" * depth + "]" * depth
        line = f'{{"prompt": "b", "{column}": {nested}}}'
        uri = write_jsonl(tmp_path / "m.jsonl", [{"prompt": "a", "seed": 1}, line])
        rows = [judge(raw, RowRules()) for raw in read_manifest(uri)]
        assert isinstance(rows[0], LegalRow)
        assert isinstance(rows[1], LegalRow) or rows[1].messages()
