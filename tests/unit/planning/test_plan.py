"""The plan: the status of each row, which rows are selected, and what rendering costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ltx_ray.config import LoraSpec, ModelFiles, Numerics, Selection
from ltx_ray.dataset.existing import ExistingRows, list_existing
from ltx_ray.dataset.writer import DatasetWriter, Failure
from ltx_ray.manifest.reader import RawRow
from ltx_ray.manifest.rules import RowRules
from ltx_ray.planning.cost import clip_tflop, pass_tflop
from ltx_ray.planning.estimate import ClipEstimate, cost_line
from ltx_ray.planning.plan import COPY, DONE, FAILED, ILLEGAL, REPEATED, TODO, ItemBuilder, Plan, PlannedRow
from ltx_ray.records import LoraUse
from ltx_ray.shapes import ClipShape
from ltx_ray.storage.store import Store
from tests.support.checkpoint_files import RELEASED
from tests.support.datasets import dataset_writer, finish
from tests.support.results import RENDERED
from tests.support.samples import SMALL, request, write_jsonl


@pytest.fixture
def plan(tmp_path, builder):
    """A function that plans a manifest with the given rows."""

    def make(rows: list, **options) -> Plan:
        options = {"existing": ExistingRows(), "rules": RowRules(), "builder": builder, **options}
        return Plan(manifest=write_jsonl(tmp_path / "m.jsonl", rows), **options)

    return make


def statuses(plan: Plan) -> list[str]:
    return [planned.status for planned in plan.open()]


def row(n: int, **values) -> dict:
    return {"prompt": f"clip {n}", **SMALL, **values}


def dataset_with(tmp_path: Path, *planned: PlannedRow) -> DatasetWriter:
    """The writer of a dataset that has these rows."""
    writer = dataset_writer(Store(str(tmp_path / "out")))
    for p in planned:
        writer.write_index(p.item.item_id, p.request, RENDERED)
    writer.log.commit()
    return writer


# --- how many rows there will be ------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"samples": 3}, {"selection": Selection(limit=4)}, {"selection": Selection(limit=99)},
     {"selection": Selection(shard=(1, 3))}, {"selection": Selection(shard=(2, 3), limit=2), "samples": 2}],
    ids=str,
)  # fmt: skip
def test_a_plan_of_parquet_files_knows_how_many_rows_it_has(tmp_path, builder, options):
    pq.write_table(pa.Table.from_pylist([row(n) for n in range(10)]), tmp_path / "m.parquet")
    a_plan = Plan(manifest=str(tmp_path / "m.parquet"), rules=RowRules(), builder=builder, **options)
    assert a_plan.expected_rows is None, "it was not opened"
    raws = a_plan.read()
    a_plan = a_plan.against(ExistingRows())
    expected = a_plan.expected_rows
    assert expected == len(list(a_plan.rows(raws))) > 0


def test_a_plan_of_json_or_of_chosen_ids_does_not_know_it(plan, tmp_path, builder):
    a_plan = plan([row(1), row(2)])
    list(a_plan.open())
    assert a_plan.expected_rows is None
    pq.write_table(pa.Table.from_pylist([row(1, id="a")]), tmp_path / "m.parquet")
    chosen = Selection(ids=frozenset({"a"}))
    a_plan = Plan(manifest=str(tmp_path / "m.parquet"), rules=RowRules(), builder=builder, selection=chosen)
    list(a_plan.open())
    assert a_plan.expected_rows is None


# --- status of a row -----------------------------------------------------------------------------


def test_rows_of_a_new_dataset_are_to_be_rendered(plan):
    a_plan = plan([row(1), row(2, id="b")])
    first, second = a_plan.open()
    assert (first.status, second.status) == (TODO, TODO)
    assert first.request.id == first.item.item_id[:16]
    assert second.request.id == second.item.request.id == "b"
    assert first.item.recipe_digest == second.item.recipe_digest
    assert a_plan.counts == {"rows": 2, TODO: 2, "clips": 2}


def test_a_row_in_the_index_is_done(plan, tmp_path):
    first, second = plan([row(1), row(2)]).open()
    writer = dataset_with(tmp_path, first)
    assert statuses(plan([row(1), row(2)], existing=list_existing(writer.log.store))) == [DONE, TODO]
    writer.write_index(second.item.item_id, second.request, RENDERED)
    finish(writer)
    a_plan = plan([row(2), row(1)], existing=list_existing(writer.log.store))
    assert statuses(a_plan) == [DONE, DONE]
    assert cost_line(a_plan.counts, a_plan.work.total) == "nothing to render"


def test_a_rendered_clip_under_another_id_is_copied(plan, tmp_path):
    [first] = plan([row(1, id="a")]).open()
    existing = list_existing(dataset_with(tmp_path, first).log.store)
    assert statuses(plan([row(1, id="b"), row(1, id="a"), row(1)], existing=existing)) == [COPY, DONE, COPY]


def test_a_changed_recipe_makes_a_row_render_again(plan, tmp_path, toy):
    [first] = plan([row(1)]).open()
    existing = list_existing(dataset_with(tmp_path, first).log.store)
    other = ItemBuilder(ModelFiles(**toy), Numerics(dtype="float32"))
    assert statuses(plan([row(1)], existing=existing, builder=other)) == [TODO]
    layout = ItemBuilder(ModelFiles(**toy), Numerics(tp=2, attention="other", device="cuda", compile="on"))
    assert statuses(plan([row(1)], existing=existing, builder=layout)) == [DONE]


def test_failures_of_the_row_wait_for_a_retry_and_those_of_infrastructure_do_not(plan, tmp_path):
    first, second = plan([row(1), row(2)]).open()
    writer = dataset_writer(Store(str(tmp_path / "out")))
    raw = RawRow("m.jsonl", 1, {})
    writer.write_failed(first.item.item_id, first.request, raw, Failure("stage1", 1, "row", "nan"))
    writer.write_failed(second.item.item_id, second.request, raw, Failure("stage1", 3, "infrastructure", "died"))
    finish(writer)
    existing = list_existing(writer.log.store)
    assert statuses(plan([row(1), row(2)], existing=existing)) == [FAILED, TODO]
    assert statuses(plan([row(1), row(2)], existing=existing, retry_failed=True)) == [TODO, TODO]


def test_an_illegal_row_does_not_affect_the_others(plan):
    bad, good = plan([row(1, height=63, id="x"), row(2)]).open()
    assert (bad.status, good.status) == (ILLEGAL, TODO)
    assert ":1:height (x): 63, legal: " in bad.messages()[0]


def test_an_id_used_before_by_another_row_is_illegal(plan):
    first, second, third = plan([row(1, id="a"), row(2, id="a"), row(3)]).open()
    assert [first.status, second.status, third.status] == [TODO, ILLEGAL, TODO]
    [message] = second.messages()
    assert ":2:id (a): 'a', legal: an id of its own" in message


def test_an_id_that_is_the_default_of_another_row_is_taken(plan):
    [first] = plan([row(1)]).open()
    assert statuses(plan([row(1), row(2, id=first.request.id)])) == [TODO, ILLEGAL]
    assert statuses(plan([row(1), row(1, id=first.request.id)])) == [TODO, REPEATED]


def test_a_row_given_again_is_repeated(plan):
    a_plan = plan([row(1), row(1), row(2, id="b"), row(2, id="b", frame_rate=24.0), row(2, id="b", note="x")])
    assert statuses(a_plan) == [TODO, REPEATED, TODO, REPEATED, REPEATED]


def test_rows_that_share_a_clip_cost_it_once(plan):
    one = plan([row(1)])
    assert statuses(one) == [TODO]
    shared = plan([row(1, id="a"), row(1, id="b"), row(1, id="c")])
    assert statuses(shared) == [TODO] * 3
    assert shared.work.total == one.work.total and one.work.total.tflop > 0
    assert " in 1 clip," in cost_line(shared.counts, shared.work.total)


def test_with_latents_only_a_row_with_a_preview_is_done(plan, tmp_path):
    [first] = plan([row(1, id="a")]).open()
    store = Store(str(tmp_path / "out"))
    store.write_bytes(f"previews/part-{first.item_id}-{first.key}.parquet", b"")
    existing = list_existing(store)
    both = [row(1, id="a"), row(1, id="b")]
    assert statuses(plan(both, existing=existing, latents_only=True)) == [DONE, TODO]
    assert statuses(plan(both, existing=existing)) == [TODO, TODO]
    existing.index.add_pending([bytes.fromhex(first.item_id + first.key)], "segment")
    assert statuses(plan(both, existing=existing, latents_only=True)) == [DONE, COPY]


# --- selection ------------------------------------------------------------------------------------


def selected_prompts(plan: Plan) -> list[str]:
    return [p.raw.values["prompt"] for p in plan.open()]


def test_limit(plan):
    rows = [row(1), row(2, height=1), row(3), row(4)]
    assert selected_prompts(plan(rows, selection=Selection(limit=3))) == ["clip 1", "clip 2", "clip 3"]
    assert selected_prompts(plan(rows, selection=Selection(limit=9))) == [f"clip {n}" for n in (1, 2, 3, 4)]


def test_ids(plan):
    rows = [row(1, id="a"), row(2, id="b", height=1), row(3), row(4, id="d", height=1)]
    third = list(plan(rows).open())[2].request.id
    assert selected_prompts(plan(rows, selection=Selection(ids=frozenset({"a", "d", third})))) == [
        "clip 1",
        "clip 3",
        "clip 4",
    ]
    assert selected_prompts(plan(rows, selection=Selection(ids=frozenset({"none"})))) == []


def test_shards_are_disjoint_and_cover_everything(plan):
    rows = [row(n) for n in range(11)]
    shards = [selected_prompts(plan(rows, selection=Selection(shard=(i, 3)))) for i in range(3)]
    assert sorted(prompt for shard in shards for prompt in shard) == sorted(r["prompt"] for r in rows)
    assert max(map(len, shards)) - min(map(len, shards)) == 1
    assert selected_prompts(plan(rows, selection=Selection(limit=2, shard=(1, 3)))) == ["clip 1", "clip 4"]


def test_only_a_plan_without_selection_is_complete(plan):
    assert plan([row(1)]).complete
    for selection in (Selection(limit=1), Selection(ids=frozenset()), Selection(shard=(0, 1))):
        assert not plan([row(1)], selection=selection).complete


def test_a_bad_manifest_is_refused_before_the_first_row(plan):
    with pytest.raises(ValueError, match="has no column 'prompt'"):
        plan([{"text": "x"}]).open()


# --- recipes -------------------------------------------------------------------------------------


def test_the_recipe_identifies_weights_by_digest(builder, toy):
    recipe = builder.recipe(request())
    assert (recipe.pipeline, recipe.dtype, recipe.noise_device) == ("hq", "bfloat16", "model")
    assert recipe.distilled_lora_strengths == (0.25, 0.5)
    weights = {recipe.checkpoint, recipe.gemma, recipe.upsampler, recipe.distilled_lora}
    assert len(weights) == 4 and all(len(d) == 32 for d in weights)
    assert not any(str(toy[name]) in repr(recipe) for name in toy)


def test_a_rows_loras_are_in_its_recipe_with_their_strengths(toy):
    files = ModelFiles(**toy, loras=(LoraSpec("style", toy["distilled_lora"], 0.7),))
    builder = ItemBuilder(files, Numerics())
    without_loras = builder.item(request())
    used = dataclasses.replace(request(), loras=(LoraUse("style", 0.3),))
    assert builder.recipe(used).loras == ((builder.recipe(used).distilled_lora, 0.3),)
    assert without_loras.recipe.loras == ()
    assert builder.item(used).item_id != without_loras.item_id


# --- cost ----------------------------------------------------------------------------------------

HQ = ClipShape(121, 1088, 1920, 24.0)


def test_passes_of_the_22b_model_cost_what_was_measured():
    assert pass_tflop(RELEASED, HQ.half()) == pytest.approx(275, rel=0.005)
    assert pass_tflop(RELEASED, HQ.half(), isolated=True) == pytest.approx(248, rel=0.005)
    assert pass_tflop(RELEASED, HQ) == pytest.approx(1714, rel=0.005)


def test_an_hq_clip_costs_93_passes_at_half_size_and_7_at_full_size():
    expected = 62 * 275 + 31 * 248 + 7 * 1714
    assert clip_tflop(RELEASED, request()) == pytest.approx(expected, rel=0.005)
    without_uncond = clip_tflop(RELEASED, request(video_cfg_scale=1, audio_cfg_scale=1))
    assert clip_tflop(RELEASED, request()) - without_uncond == pytest.approx(31 * 275, rel=0.005)
    twice = clip_tflop(RELEASED, request(num_inference_steps=30))
    assert twice - clip_tflop(RELEASED, request()) == pytest.approx(30 * (2 * 275 + 248), rel=0.005)


def test_the_cost_in_words():
    on = "of an H100 at 618 TFLOP/s"
    assert cost_line({"clips": 3}, ClipEstimate(36_736 * 3)) == f"about 110,208 TFLOP in 3 clips, 0.05 hours {on}"
    assert cost_line({"clips": 1}, ClipEstimate(0.0123)) == f"about 0.0123 TFLOP in 1 clip, 5.5e-09 hours {on}"
    assert cost_line({}, ClipEstimate()) == "nothing to render"
