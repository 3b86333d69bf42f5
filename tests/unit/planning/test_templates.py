"""Rows that share a template get the verdicts and item_ids that each would get on its own."""

from __future__ import annotations

import hashlib
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltx_ray.config import LoraSpec, ModelFiles, Numerics
from ltx_ray.dataset.existing import ExistingRows
from ltx_ray.dataset.layout import row_key
from ltx_ray.manifest.columns import COLUMNS, MAX_SEED
from ltx_ray.manifest.reader import RawRow
from ltx_ray.manifest.rules import IllegalRow, RowRules, check_defaults, judge
from ltx_ray.planning.identity import ItemHasher, item_id
from ltx_ray.planning.plan import ILLEGAL, ItemBuilder, Plan
from ltx_ray.records import ImageCondition, LoraUse, Recipe, RenderRequest, canonical_json, plain
from tests.support.samples import recipe, request

TEXTS = st.text(max_size=20) | st.sampled_from(
    ["a cat", "雪 \U0001f600", 'quote " and \\', "\x7f\x1f\n\u2028", "\ud800", "\0"]
)
NUMBERS = st.sampled_from([0, 1, 1.0, True, -0.0, 2.5, 64, 128.0, -1, math.nan, math.inf, 10**400, "64"]) | st.none()
VALUES = {
    "seed": st.integers(-1, MAX_SEED + 1) | NUMBERS,
    "id": st.sampled_from(["a", "b-1", "no blanks", "x" * 128, "x" * 129, "", 5, None]),
    "negative_prompt": TEXTS | st.none(),
    "height": NUMBERS,
    "num_frames": st.sampled_from([9, 9.0, 10, None]),
    "frame_rate": NUMBERS,
    "video_cfg_scale": NUMBERS,
    "audio_stg_blocks": st.sampled_from([None, [], [1], [99], "1"]),
    "loras": st.sampled_from([None, [], [{"name": "style"}], [{"name": "style", "strength": 0.5}], [{"name": "x"}]]),
    "pipeline": st.sampled_from([None, "hq", "base", "distilled"]),
    "note": TEXTS | NUMBERS | st.lists(st.integers(), max_size=2),
}
ROWS = st.lists(st.fixed_dictionaries({"prompt": st.just("a cat") | TEXTS | st.none()}, optional=VALUES), max_size=12)


@pytest.fixture(scope="module")
def builder(toy) -> ItemBuilder:
    return ItemBuilder(ModelFiles(**toy, loras=(LoraSpec("style", toy["distilled_lora"], 0.7),)), Numerics())


def defined_item_id(request: RenderRequest, recipe: Recipe, image_digests: tuple[str, ...] = ()) -> str:
    """item_id by its definition, without the shortcuts of ItemHasher."""
    row = {name: value for name, value in plain(request).items() if name not in ("id", "extra", "loras")}
    row["images"] = [{**image, "path": d} for image, d in zip(row["images"], image_digests, strict=True)]
    named = {name: value for name, value in plain(recipe).items() if name != "scheme" or value != 1}
    return hashlib.sha256(canonical_json({"request": row, "recipe": named}).encode()).hexdigest()[:32]


@given(ROWS, st.sampled_from([{}, {"seed": 3, "height": 64}]), st.booleans(), st.sampled_from([None, 2]))
def test_rows_are_planned_as_each_would_be_on_its_own(builder, rows, defaults, declared, layers):
    loras = (LoraUse("style", 0.7),) if declared else ()
    rules = RowRules(defaults=check_defaults(defaults), loras=loras, num_layers=layers)
    raws = [RawRow("m.jsonl", n, values) for n, values in enumerate(rows, 1)]
    plan = Plan("", rules, builder, ExistingRows())
    # The rows come twice, so that each also matches the template that was made from it.
    for raw, planned in zip(raws * 2, plan.rows(iter(raws * 2)), strict=True):
        expected = judge(raw, rules)
        if isinstance(expected, IllegalRow):
            assert planned == expected
        elif planned.status == ILLEGAL:
            assert "an id of its own" in planned.messages()[0]
        else:
            item = builder.item(expected.request)
            assert planned.item == item and planned.request == item.request and planned.raw == raw
            assert planned.item_id == item.item_id == defined_item_id(item.request, item.recipe)
            assert planned.id == item.request.id and planned.key == row_key(planned.id)


@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"])),
    seed=st.integers(0, MAX_SEED),
    negative=st.text(st.characters(exclude_categories=["Cs"])),
    scale=st.floats(allow_nan=False, allow_infinity=False),
    blocks=st.lists(st.integers(0, 99), max_size=3),
    loras=st.lists(st.tuples(st.text("abc"), st.floats(0, 1)), max_size=2),
    images=st.lists(st.tuples(st.text("0123456789abcdef", min_size=1), st.integers(0, 9)), max_size=2),
)
def test_hashing_in_pieces_gives_the_defined_item_id(prompt, seed, negative, scale, blocks, loras, images):
    one = RenderRequest(
        **{
            **plain(request()),
            "prompt": prompt,
            "seed": seed,
            "negative_prompt": negative,
            "video_cfg_scale": scale,
            "audio_stg_blocks": tuple(blocks),
            "loras": tuple(LoraUse(*use) for use in loras),
            "images": tuple(ImageCondition(f"/{digest}", frame, 1.0, 33) for digest, frame in images),
        }
    )
    used, digests = recipe(loras=tuple(loras)), tuple(digest for digest, _ in images)
    expected = defined_item_id(one, used, digests)
    assert item_id(one, used, digests) == expected
    other = RenderRequest(**{**vars(one), "prompt": "other", "seed": 1})
    assert ItemHasher(other, used, digests).item_id_bytes(prompt, seed).hex() == expected


def test_true_is_not_a_number_even_after_a_row_with_1(builder):
    rows = [{"prompt": "a", "video_skip_step": value} for value in (1, True, 1.0)]
    plan = Plan("", RowRules(), builder, ExistingRows())
    statuses = [p.status for p in plan.rows(RawRow("m.jsonl", n, row) for n, row in enumerate(rows))]
    assert statuses == ["todo", ILLEGAL, "repeated"]


def test_a_row_of_failed_is_judged_apart_from_an_equal_one_that_a_person_wrote(builder):
    """The first has the pipeline's own STG blocks, which a smaller model lacks, and the second asks for them."""
    values = {name: value for name, value in plain(request(pipeline="base")).items() if name not in ("id", "extra")}
    raws = [RawRow("m.jsonl", n, {**values, "seed": n}, from_failed=n % 2 == 0) for n in range(4)]
    plan = Plan("", RowRules(num_layers=4), builder, ExistingRows())
    assert [planned.status for planned in plan.rows(iter(raws))] == ["todo", ILLEGAL] * 2


def test_rows_of_one_template_share_their_recipe(builder):
    raws = [RawRow("m.jsonl", n, {"prompt": f"clip {n}", "id": f"id-{n}", "seed": n, "note": n}) for n in range(9)]
    items = [planned.item for planned in Plan("", RowRules(), builder, ExistingRows()).rows(iter(raws))]
    assert len({id(item.recipe) for item in items}) == 1
    assert [(i.request.prompt, i.request.id, i.request.seed, i.request.extra) for i in items] == [
        (f"clip {n}", f"id-{n}", n, f'{{"note": {n}}}') for n in range(9)
    ]


def test_rows_with_lists_share_templates_and_rows_with_images_have_none(builder):
    rows = [{"loras": [{"name": "style", "strength": n % 2}], "images": [], "video_stg_blocks": [1]} for n in range(6)]
    rules = RowRules(loras=(LoraUse("style", 1.0),))
    plan = Plan("", rules, builder, ExistingRows())
    raws = [RawRow("m.jsonl", n, {"prompt": f"clip {n}", **row}) for n, row in enumerate(rows)]
    assert [p.item for p in plan.rows(iter(raws))] == [builder.item(judge(raw, rules).request) for raw in raws]
    assert len(plan._templates._templates) == 2
    image = RawRow("m.jsonl", 1, {"prompt": "a", "images": [{"path": "a.png"}]})
    assert plan._templates.match(image) is None and len(plan._templates._templates) == 2


def test_a_full_cache_of_templates_changes_no_item_id(builder, monkeypatch):
    monkeypatch.setattr("ltx_ray.planning.templates._CACHED", 3)
    raws = [
        RawRow("m.jsonl", n, {"prompt": "a", "video_cfg_scale": n % 7, **({"height": 64} if n % 2 else {})})
        for n in range(28)
    ]
    plan = Plan("", RowRules(), builder, ExistingRows())
    assert [p.item_id for p in plan.rows(iter(raws))] == [
        builder.item(judge(r, RowRules()).request).item_id for r in raws
    ]
    assert len(plan._templates._templates) <= 3


def test_parquet_batches_and_row_groups_lose_no_row(builder, tmp_path, monkeypatch):
    monkeypatch.setattr("ltx_ray.manifest.reader._PARQUET_ROWS", 7)
    monkeypatch.setattr("ltx_ray.planning.plan._CHUNK_STEP", 3)
    monkeypatch.setattr("ltx_ray.planning.plan._CHUNK_ROWS", 5)
    monkeypatch.setattr("ltx_ray.storage.id_table._NEWEST", 4)
    count, path = 100, str(tmp_path / "m.parquet")
    prompts = [f"clip {n % 80}" for n in range(count)]
    table = pa.table({"prompt": prompts, "seed": pa.array([None if n % 3 else n % 80 for n in range(count)])})
    pq.write_table(table, path, row_group_size=30)
    planned = list(Plan(path, RowRules(), builder, ExistingRows()).open())
    assert [p.raw.source for p in planned] == [f"{path}:{n}" for n in range(1, count + 1)]
    assert [p.request.prompt for p in planned] == prompts
    first = {}
    for p in planned:
        assert (p.status == "repeated") == (p.item_id in first)
        first[p.item_id] = True
    assert COLUMNS["seed"].name in planned[0].raw.values
