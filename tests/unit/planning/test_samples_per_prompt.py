"""Samples of a row: their ids, their seeds, and how a selection chooses among them."""

from __future__ import annotations

import hashlib
import json

import pytest

from ltx_ray.cli import app
from ltx_ray.cli.app import main
from ltx_ray.config import Selection
from ltx_ray.dataset.existing import ExistingRows, list_existing
from ltx_ray.dataset.writer import Failure
from ltx_ray.manifest.columns import MAX_SEED
from ltx_ray.manifest.rules import RowRules
from ltx_ray.planning.plan import FAILED, ILLEGAL, REPEATED, TODO, ItemBuilder, Plan, PlannedRow
from ltx_ray.storage.store import Store
from tests.support.datasets import dataset_writer, finish
from tests.support.pictures import encoded, gradient
from tests.support.results import RENDERED
from tests.support.samples import SMALL, write_jsonl


@pytest.fixture
def plan(tmp_path, builder):
    """A function that plans a manifest with the given rows and three samples of each."""

    def make(*rows: dict, **options) -> Plan:
        uri = write_jsonl(tmp_path / "m.jsonl", [{"prompt": "a", **SMALL, **row} for row in rows])
        return Plan(
            **{
                "manifest": uri,
                "rules": RowRules(),
                "builder": builder,
                "existing": ExistingRows(),
                "samples": 3,
                **options,
            }
        )

    return make


def statuses_and_ids(plan: Plan) -> list[tuple[str, str | None]]:
    return [(planned.status, planned.id) for planned in plan.open()]


def check_samples(samples: list[PlannedRow], builder: ItemBuilder) -> None:
    """Check that the first sample is the row itself, and that the others' seeds follow from it alone."""
    for number, planned in enumerate(samples):
        row = samples[0].request
        text = f"{samples[0].item_id}:{number}" if builder.scheme == 1 else f"{row.seed}:{number}:{row.prompt}"
        digest = hashlib.sha256(text.encode()).digest()
        if number:
            assert planned.request.seed == int.from_bytes(digest[:8], "big") & MAX_SEED
        assert builder.item(planned.request).item_id == planned.item_id
        assert (planned.item.request.id, planned.raw) == (planned.id, samples[0].raw)
    assert len({planned.item_id for planned in samples}) == len(samples)


def test_each_row_is_planned_with_its_samples(plan, builder):
    [single] = plan({"seed": 5, "note": 1}, samples=1).open()
    a_plan = plan({"seed": 5, "note": 1}, {"prompt": "b", "id": "b"})
    rows = list(a_plan.open())
    assert (rows[0].item_id, rows[0].request) == (single.item_id, single.request)
    assert [p.id for p in rows[:3]] == [p.item_id[:16] for p in rows[:3]]
    assert [p.id for p in rows[3:]] == ["b", "b-s1", "b-s2"]
    assert {p.request.extra for p in rows[:3]} == {'{"note": 1}'}
    check_samples(rows[:3], builder)
    check_samples(rows[3:], builder)
    assert a_plan.counts == {"rows": 6, TODO: 6, "clips": 6}
    one = plan({}, samples=1)
    assert len(list(one.open())) == 1
    assert a_plan.work.total.tflop == pytest.approx(6 * one.work.total.tflop)


def test_rows_with_images_have_samples_too(plan, builder, tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(gradient()))
    samples = list(plan({"id": "a", "images": [{"path": "x.png"}]}, rules=RowRules()).open())
    assert [p.id for p in samples] == ["a", "a-s1", "a-s2"] and len(samples[2].item.image_digests) == 1
    check_samples(samples, builder)


def test_fewer_samples_are_the_first_of_more(plan):
    item_ids = {n: [p.item_id for p in plan({"id": "a"}, samples=n).open()] for n in (1, 2, 5)}
    assert item_ids[1] == item_ids[5][:1] and item_ids[2] == item_ids[5][:2]


def test_samples_of_a_repeated_row_are_repeated(plan):
    assert [status for status, _ in statuses_and_ids(plan({"id": "a"}, {"id": "a"}))] == [TODO] * 3 + [REPEATED] * 3


def test_an_id_that_names_a_sample_of_another_row_makes_that_sample_illegal(plan):
    rows = list(plan({"id": "a-s1", "prompt": "b"}, {"id": "a"}).open())
    assert [p.status for p in rows] == [TODO] * 3 + [TODO, ILLEGAL, TODO]
    assert "'a-s1', legal: an id of its own" in rows[4].messages()[0]


def test_an_id_too_long_for_the_suffix_of_its_samples_is_illegal(plan):
    fitting, too_long = "x" * 125, "x" * 126
    assert [status for status, _ in statuses_and_ids(plan({"id": fitting}))] == [TODO] * 3
    [row] = plan({"id": too_long}).open()
    assert row.status == ILLEGAL
    assert ":1:id (xxx" in row.messages()[0]
    assert row.messages()[0].endswith("legal: at most 125 characters, because --samples-per-prompt appends -s2")
    assert [status for status, _ in statuses_and_ids(plan({"id": "x" * 128}, samples=1))] == [TODO]
    assert [status for status, _ in statuses_and_ids(plan({"id": fitting}, samples=11))] == [ILLEGAL]


def test_an_illegal_row_has_no_samples(plan):
    assert statuses_and_ids(plan({"id": "a", "height": 63}, {"id": "b"})) == [
        (ILLEGAL, "a"), (TODO, "b"), (TODO, "b-s1"), (TODO, "b-s2")
    ]  # fmt: skip


def test_a_retry_of_an_illegal_row_renders_all_of_its_samples(plan, tmp_path):
    """Its picture was not there; now it is. A failed sample of a legal row stays one sample."""
    picture = tmp_path / "late.png"
    first = plan({"id": "late", "images": [{"path": str(picture)}]}, {"id": "wrong", "seed": -1}, {"id": "good"})
    writer = dataset_writer(Store(str(tmp_path / "out")))
    for row in first.open():
        if row.status == ILLEGAL:
            writer.write_illegal(row.raw, row.messages())
        else:
            writer.write_failed(row.item_id, row.request, row.raw, Failure("stage1", 1, "row", "why"))
    finish(writer)
    picture.write_bytes(encoded(gradient()))
    for _ in range(2):  # The row that stays illegal keeps its number.
        again = list(plan(manifest=str(tmp_path / "out" / "failed"), samples=1, retry_failed=True).open())
        assert sorted((row.status, row.id) for row in again) == [
            (ILLEGAL, "wrong"), *((TODO, f"{name}{end}") for name in ("good", "late") for end in ("", "-s1", "-s2")),
        ]  # fmt: skip
        [illegal] = [row for row in again if row.status == ILLEGAL]
        writer = dataset_writer(Store(str(tmp_path / "out")))
        writer.write_illegal(illegal.raw, illegal.messages())
        finish(writer)


def test_limits_and_shards_take_rows_with_all_their_samples(plan):
    rows = [{"id": name} for name in "abc"]
    both = ["a", "a-s1", "a-s2", "b", "b-s1", "b-s2"]
    assert [i for _, i in statuses_and_ids(plan(*rows, selection=Selection(limit=2)))] == both
    assert [i for _, i in statuses_and_ids(plan(*rows, selection=Selection(shard=(1, 2))))] == ["b", "b-s1", "b-s2"]


def test_ids_select_a_row_with_its_samples_or_one_sample(plan):
    rows = [{"id": name} for name in "abc"]
    selection = Selection(ids=frozenset({"a", "c-s2"}))
    assert [i for _, i in statuses_and_ids(plan(*rows, selection=selection))] == ["a", "a-s1", "a-s2", "c-s2"]
    assert [i for _, i in statuses_and_ids(plan(*rows, selection=Selection(limit=1, ids=frozenset({"b-s1"}))))] == [
        "b-s1"
    ]


def test_each_sample_has_a_status_of_its_own(plan, tmp_path):
    rows = list(plan({"id": "a"}, {"prompt": "b"}).open())
    writer = dataset_writer(Store(str(tmp_path / "out")))
    writer.write_index(rows[1].item_id, rows[1].request, RENDERED)
    writer.write_failed(rows[5].item_id, rows[5].request, rows[5].raw, Failure("stage1", 1, "row", "nan"))
    finish(writer)
    existing = list_existing(writer.log.store)
    again = list(plan({"id": "a"}, {"prompt": "b"}, existing=existing).open())
    assert [p.status for p in again] == [TODO, "done", TODO, TODO, TODO, FAILED]
    [failed] = plan(manifest=str(tmp_path / "out" / "failed"), existing=existing).open()
    assert (failed.item_id, failed.id, failed.status) == (rows[5].item_id, rows[5].id, FAILED)
    with pytest.raises(ValueError, match="--samples-per-prompt: 3, legal: 1 for a retry"):
        plan({"id": "a"}, retry_failed=True).open()


def test_the_option_of_render_and_plan(tmp_path, capfd, monkeypatch):
    manifest = write_jsonl(tmp_path / "m.jsonl", [{"prompt": "a", **SMALL}])
    seen = []
    monkeypatch.setattr(app, "render", lambda options: seen.append(options.samples_per_prompt) or 0)

    def call(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(list(args))
        return caught.value.code, *capfd.readouterr()

    base = (manifest, "--model", "toy", "--output", str(tmp_path / "out"))
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({"samples-per-prompt": 4}))
    call("render", *base)
    call("render", *base, "--samples-per-prompt", "2")
    call("render", *base, "--config", str(config))
    assert seen == [1, 2, 4]
    code, out, _ = call("plan", *base, "--samples-per-prompt", "3")
    assert code == 0 and "3 rows: 3 to render" in out
    code, _, err = call("render", *base, "--samples-per-prompt", "0")
    assert code == 2 and "--samples-per-prompt: 0, legal: a number from 1" in err
