"""Several seeds of each row: what they are called, what they are rendered with, and how rows are chosen."""

from __future__ import annotations

import hashlib
import json

import pytest

from ltx_ray.cli import app
from ltx_ray.cli.app import main
from ltx_ray.config import Selection
from ltx_ray.dataset.existing import ExistingRows, list_existing
from ltx_ray.dataset.writer import DatasetWriter, Failure
from ltx_ray.manifest.columns import MAX_SEED
from ltx_ray.manifest.rules import RowRules
from ltx_ray.planning.plan import FAILED, ILLEGAL, REPEATED, TODO, ItemBuilder, Plan, PlannedRow
from ltx_ray.storage.store import Store
from tests.support.pictures import encoded, gradient
from tests.support.results import RENDERED
from tests.support.samples import SMALL, write_jsonl


@pytest.fixture
def plan(tmp_path, builder):
    """Makes the plan of a manifest with these rows, three samples each."""

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


def shown(plan: Plan) -> list[tuple[str, str | None]]:
    return [(planned.status, planned.id) for planned in plan.open()]


def check(samples: list[PlannedRow], builder: ItemBuilder) -> None:
    """The first is the row as it stands; the seeds of the others follow from its item_id."""
    for number, planned in enumerate(samples):
        digest = hashlib.sha256(f"{samples[0].item_id}:{number}".encode()).digest()
        if number:
            assert planned.request.seed == int.from_bytes(digest[:8], "big") & MAX_SEED
        assert builder.item(planned.request).item_id == planned.item_id
        assert (planned.item.request.id, planned.raw) == (planned.id, samples[0].raw)
    assert len({planned.item_id for planned in samples}) == len(samples)


def test_each_row_stands_for_its_samples(plan, builder):
    [alone] = plan({"seed": 5, "note": 1}, samples=1).open()
    a_plan = plan({"seed": 5, "note": 1}, {"prompt": "b", "id": "b"})
    rows = list(a_plan.open())
    assert (rows[0].item_id, rows[0].request) == (alone.item_id, alone.request)
    assert [p.id for p in rows[:3]] == [p.item_id[:16] for p in rows[:3]]
    assert [p.id for p in rows[3:]] == ["b", "b-s1", "b-s2"]
    assert {p.request.extra for p in rows[:3]} == {'{"note": 1}'}
    check(rows[:3], builder)
    check(rows[3:], builder)
    assert a_plan.counts == {"rows": 6, TODO: 6, "clips": 6}
    one = plan({}, samples=1)
    assert len(list(one.open())) == 1
    assert a_plan.tflop == pytest.approx(6 * one.tflop)


def test_rows_that_are_judged_by_themselves_have_samples_too(plan, builder, tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(gradient()))
    samples = list(plan({"id": "a", "images": [{"path": "x.png"}]}, rules=RowRules()).open())
    assert [p.id for p in samples] == ["a", "a-s1", "a-s2"] and len(samples[2].item.image_digests) == 1
    check(samples, builder)


def test_fewer_samples_are_the_first_of_more(plan):
    of = {n: [p.item_id for p in plan({"id": "a"}, samples=n).open()] for n in (1, 2, 5)}
    assert of[1] == of[5][:1] and of[2] == of[5][:2]


def test_samples_of_the_same_row_are_the_same(plan):
    assert [status for status, _ in shown(plan({"id": "a"}, {"id": "a"}))] == [TODO] * 3 + [REPEATED] * 3


def test_ids_that_belong_to_a_sample_of_another_row(plan):
    rows = list(plan({"id": "a-s1", "prompt": "b"}, {"id": "a"}).open())
    assert [p.status for p in rows] == [TODO] * 3 + [TODO, ILLEGAL, TODO]
    assert "'a-s1', legal: an id of its own" in rows[4].messages()[0]


def test_an_id_without_room_for_the_sample_is_illegal(plan):
    fits, longer = "x" * 125, "x" * 126
    assert [status for status, _ in shown(plan({"id": fits}))] == [TODO] * 3
    [row] = plan({"id": longer}).open()
    assert row.status == ILLEGAL
    assert ":1:id (xxx" in row.messages()[0]
    assert row.messages()[0].endswith("legal: at most 125 characters, so that -s2 fits behind (--samples-per-prompt)")
    assert [status for status, _ in shown(plan({"id": "x" * 128}, samples=1))] == [TODO]
    assert [status for status, _ in shown(plan({"id": fits}, samples=11))] == [ILLEGAL]


def test_an_illegal_row_is_one_row(plan):
    assert shown(plan({"id": "a", "height": 63}, {"id": "b"})) == [
        (ILLEGAL, "a"), (TODO, "b"), (TODO, "b-s1"), (TODO, "b-s2")
    ]  # fmt: skip


def test_a_limit_takes_rows_with_all_their_samples(plan):
    rows = [{"id": name} for name in "abc"]
    both = ["a", "a-s1", "a-s2", "b", "b-s1", "b-s2"]
    assert [i for _, i in shown(plan(*rows, selection=Selection(limit=2)))] == both
    assert [i for _, i in shown(plan(*rows, selection=Selection(shard=(1, 2))))] == ["b", "b-s1", "b-s2"]


def test_ids_take_a_row_or_one_of_its_samples(plan):
    rows = [{"id": name} for name in "abc"]
    wanted = Selection(ids=frozenset({"a", "c-s2"}))
    assert [i for _, i in shown(plan(*rows, selection=wanted))] == ["a", "a-s1", "a-s2", "c-s2"]
    assert [i for _, i in shown(plan(*rows, selection=Selection(limit=1, ids=frozenset({"b-s1"}))))] == ["b-s1"]


def test_samples_are_done_and_fail_one_by_one(plan, tmp_path):
    rows = list(plan({"id": "a"}, {"prompt": "b"}).open())
    writer = DatasetWriter(Store(str(tmp_path / "out")))
    writer.write_index(rows[1].item_id, rows[1].request, RENDERED)
    writer.write_failed(rows[5].item_id, rows[5].request, rows[5].raw, Failure("stage1", 1, "row", "nan"))
    done = list_existing(writer.store)
    again = list(plan({"id": "a"}, {"prompt": "b"}, existing=done).open())
    assert [p.status for p in again] == [TODO, "done", TODO, TODO, TODO, FAILED]
    [failed] = plan(manifest=str(tmp_path / "out" / "failed"), existing=done).open()
    assert (failed.item_id, failed.id, failed.status) == (rows[5].item_id, rows[5].id, FAILED)
    with pytest.raises(ValueError, match="--samples-per-prompt: 3, legal: 1 for a retry"):
        plan({"id": "a"}, retry_failed=True).open()


def test_the_option(tmp_path, capfd, monkeypatch):
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
