"""The driver on real Ray with an engine that fails as its prompts say: no row is lost, and none is rendered twice."""

from __future__ import annotations

import json

import pytest

from ltx_ray.config import RunLimits
from tests.support.passing_time import let_time_pass
from tests.support.runner import FAKE

SIZE = {"height": 64, "width": 64, "num_frames": 9}


def rows(*prompts: str) -> list[dict]:
    return [{"id": f"r{n}", "prompt": prompt, "seed": n, **SIZE} for n, prompt in enumerate(prompts)]


def test_every_row_is_in_the_index_and_a_second_run_finds_nothing_to_do(runner):
    manifest = rows("one", "two", "three", "four")
    assert runner.render(manifest) == 0
    first = runner.index()
    assert set(first) == {"r0", "r1", "r2", "r3"}
    for row in first.values():
        assert (runner.output / row["clip"]).is_file()
        assert row["attempts"] == 1
    assert runner.render(manifest) == 0
    assert [e["event"] for e in runner.events()].count("gang_starting") == 0
    assert runner.index() == first


def test_results_do_not_depend_on_pools_or_order(runner, tmp_path):
    manifest = rows("one", "two", "three", "four", "five")
    layouts = [
        {"stage1": 1, "stage2": 1},
        {"stage1": 2, "stage2": 2},
        {"stage1": 1, "stage2": 0},
        {"stage1": 2, "stage2": 1, "tp": 2},
    ]
    found = []
    for number, layout in enumerate(layouts):
        output = tmp_path / f"out{number}"
        order = manifest if number % 2 == 0 else manifest[::-1]
        assert runner.render(order, output, **layout) == 0
        found.append({name: row["latents_sha256"] for name, row in runner.index(output).items()})
    assert all(f == found[0] for f in found)


def test_a_shared_replica_switches_seldom(runner):
    engines = dict.fromkeys(FAKE, "tests.support.engines:TextFirst")
    manifest = rows(*("8 rows, of which this is " + letter for letter in "abcdefgh"))
    assert runner.render(manifest, fake=False, engines=engines, stage1=1, stage2=0) == 0
    switches = sum(row["switches"] for row in runner.index().values())
    # Eight clips are rendered in turns of up to four: stage 1, stage 2, stage 1, stage 2.
    assert 2 <= switches <= 8
    assert {row["stage1_replica"] for row in runner.index().values()} == {"diffusion-0"}


def test_a_dead_rank_costs_an_attempt_and_the_row_is_rendered(runner):
    assert runner.render(rows("fine", "[[stage1:crash:1]]", "[[decode:crash:2]]", "fine too"), tp=2) == 0
    index = runner.index()
    assert {name: row["attempts"] for name, row in index.items()} == {"r0": 1, "r1": 2, "r2": 3, "r3": 1}
    lost = [e for e in runner.events() if e["event"] == "gang_lost"]
    # A replica that began in the other stage may have taken the call, when it was ready first.
    assert sorted(e["role"].rstrip("12") for e in lost) == ["decode", "decode", "stage"]
    assert {e["cause"] for e in lost} == {"rank"}
    assert not runner.failed()


def test_a_poison_row_is_given_up_and_the_others_go_on(runner):
    assert runner.render(rows("fine", "[[stage2:crash]]", "fine too")) == 3
    assert set(runner.index()) == {"r0", "r2"}
    failed = runner.failed()["r1"]
    assert (failed["stage"], failed["attempts"], failed["error_class"]) == ("stage2", 3, "infrastructure")


def test_a_row_at_fault_fails_at_once_and_only_retry_tries_it_again(runner, capsys):
    manifest = rows("fine", "[[stage1:row]]")
    assert runner.render(manifest, tp=2) == 3
    failed = runner.failed()["r1"]
    assert (failed["stage"], failed["attempts"], failed["error_class"]) == ("stage1", 1, "row")
    assert "told to fail" in failed["message"] and "RowError" in failed["traceback"]
    assert not [e for e in runner.events() if e["event"] == "gang_lost"]
    assert runner.render(manifest) == 3
    assert not [e for e in runner.events() if e["event"] == "call"]
    told = f"the same command passes them over, and ltx-ray retry {runner.output} renders them again"
    assert capsys.readouterr().err.count(f"1 rows failed by their own fault, in this run or before: {told}") == 2
    assert runner.render(str(runner.output / "failed"), retry_failed=True) == 3
    assert [e["stage"] for e in runner.events() if e["event"] == "call"] == ["text", "stage1"]


def test_infrastructure_failures_are_retried_by_the_same_command(runner, capsys):
    manifest = rows("[[stage1:crash:3]]")
    assert runner.render(manifest) == 3
    assert runner.failed()["r0"]["error_class"] == "infrastructure"
    assert "ltx-ray retry" not in capsys.readouterr().err
    assert runner.render(manifest) == 0
    assert set(runner.index()) == {"r0"} and not runner.failed()


def test_a_call_that_fails_the_same_way_on_all_ranks_costs_no_gang(runner):
    assert runner.render(rows("[[stage1:error:2]]", "[[stage1:error]]", "[[decode:store]]"), tp=2) == 3
    assert runner.index()["r0"]["attempts"] == 3
    failed = runner.failed()["r1"]
    assert (failed["attempts"], failed["error_class"]) == (3, "row") and "RuntimeError" in failed["traceback"]
    failed = runner.failed()["r2"]
    assert (failed["attempts"], failed["error_class"]) == (3, "infrastructure") and "store" in failed["message"]
    assert not [e for e in runner.events() if e["event"] == "gang_lost"]


def test_a_retry_renders_what_failed_without_the_runs_defaults(runner):
    row = {"id": "r0", "prompt": "[[stage1:crash:3]]", "note": {"a": 1}}
    defaults = {"height": 64, "width": 128, "num_frames": 9, "seed": 5}
    assert runner.render([row], row_defaults=defaults) == 3
    item = runner.failed()["r0"]["item_id"]
    assert runner.render(str(runner.output / "failed"), retry_failed=True) == 0
    done = runner.index()["r0"]
    assert (done["item_id"], done["width"], done["seed"]) == (item, 128, 5)
    assert done["extra"] == '{"note": {"a": 1}}' and not runner.failed()


def test_a_row_rendered_as_another_item_leaves_its_old_failure(runner):
    manifest = [{"id": "r0", "prompt": "[[stage1:crash:3]]", **SIZE}]
    assert runner.render(manifest) == 3
    assert runner.render([{**manifest[0], "prompt": "corrected"}]) == 0
    assert not runner.failed()


def test_a_duplicate_id_stays_illegal_when_retried(runner):
    manifest = [{"id": "a", "prompt": "one", **SIZE}, {"id": "a", "prompt": "two", **SIZE}]
    assert runner.render(manifest) == 3
    assert runner.render(str(runner.output / "failed"), retry_failed=True) == 3
    assert runner.index()["a"]["prompt"] == "one" and runner.failed()["a"]["prompt"] == "two"
    assert runner.render([manifest[0], {**manifest[1], "id": "b"}]) == 0
    assert set(runner.index()) == {"a", "b"} and not runner.failed()


def test_too_many_failures_stop_the_run(runner):
    good = [{"id": f"g{n}", "prompt": "fine", "seed": n, **SIZE} for n in range(30)]
    bad = [{"id": f"b{n}", "prompt": "fine", "height": 100} for n in range(12)]
    assert runner.render([*bad, *good], limits=RunLimits(max_failed_fraction=0.5)) == 3
    assert len(runner.index()) < 30
    # Rows that were done before count as well.
    assert runner.render(good) == 0
    assert runner.render([*good, *bad], limits=RunLimits(max_failed_fraction=0.5)) == 3
    assert json.loads((runner.output / "run.json").read_text())["state"] == "finished"


def test_failed_rows_may_end_a_run_with_zero(runner):
    """KubeRay runs a job again that ends with another code."""
    manifest = [{"id": "a", "prompt": "fine", **SIZE}, {"id": "b", "prompt": "fine", "height": 100}]
    assert runner.render(manifest) == 3
    assert runner.render(manifest, exit_zero_on_failed_rows=True) == 0
    assert set(runner.index()) == {"a"} and set(runner.failed()) == {"b"}


def test_a_manifest_that_is_mostly_illegal_is_refused_unless_that_is_meant(runner):
    manifest = [{"id": f"b{n}", "prompt": "fine", "height": 100} for n in range(999)]
    manifest.append({"id": "a", "prompt": "fine", **SIZE})
    with pytest.raises(ValueError, match="999 of the first 1,000 rows are illegal: 999 of height: legal: "):
        runner.render(manifest)
    assert not runner.output.exists()
    assert runner.render(manifest, allow_illegal=True) == 3
    assert set(runner.index()) == {"a"} and len(runner.failed()) == 999


def test_an_address_where_nothing_listens_is_said_before_the_manifest_is_read(runner, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    runner.cluster = "127.0.0.1:1"
    with pytest.raises(ValueError, match=r"--ray-address: 127.0.0.1:1, cannot be reached"):
        runner.render(str(runner.folder / "no-manifest.jsonl"))
    assert not runner.output.exists()


def test_a_rank_that_fails_alone_takes_its_gang_with_it(runner):
    assert runner.render(rows("[[stage1:lone:1]]"), tp=2) == 0
    (lost,) = [e for e in runner.events() if e["event"] == "gang_lost"]
    assert lost["role"] in ("stage1", "stage2"), "the replica that was ready first took the call"


def test_a_hanging_call_is_ended_at_its_deadline(runner, monkeypatch):
    """Time passes once the call has begun and nothing else is under way."""

    def time_passed() -> float:
        return RunLimits().call_timeout + 1 if runner.made("*-stage2-0") and runner.is_up("text", "decode") else 0.0

    let_time_pass(monkeypatch.setattr, time_passed)
    assert runner.render(rows("[[stage2:hang:1]]"), stage1=1, stage2=0) == 0
    lost = [e for e in runner.events() if e["event"] == "gang_lost"]
    assert len(lost) == 1 and "longer than 7200 s" in lost[0]["reason"] and lost[0]["cause"] == "timeout"


def test_an_illegal_row_is_listed_and_the_others_render(runner):
    manifest = [*rows("one", "two"), {"id": "bad", "prompt": "x", "height": 100}]
    assert runner.render(manifest) == 3
    assert set(runner.index()) == {"r0", "r1"}
    failed = runner.failed()["bad"]
    assert failed["stage"] == "plan" and "rows.jsonl:3:height (bad): 100" in failed["message"]
    # Correcting the manifest takes the row off the list.
    assert runner.render([*rows("one", "two"), {"id": "bad", "prompt": "x", **SIZE}]) == 0
    assert not runner.failed() and set(runner.index()) == {"r0", "r1", "bad"}


def test_rows_with_one_content_are_rendered_once(runner):
    twins = [{"id": name, "prompt": "same", "seed": 1, "note": name, **SIZE} for name in ("x", "y", "z")]
    assert runner.render(twins) == 0
    index = runner.index()
    assert set(index) == {"x", "y", "z"} and len({row["item_id"] for row in index.values()}) == 1
    assert index["y"]["extra"] == '{"note": "y"}'
    assert [e["stage"] for e in runner.events() if e["event"] == "call"] == ["text", "stage1", "stage2", "decode"]
    assert runner.render([{**twins[0], "id": "later"}]) == 0
    assert runner.index()["later"]["clip"] == index["x"]["clip"]


def test_pools_that_do_not_fit_are_refused_before_anything_starts(runner):
    with pytest.raises(ValueError, match=r"CPU slots: 66 needed, \d+ free"):
        runner.render(rows("one"), stage1=32, stage2=32)


def test_an_engine_that_never_loads_ends_the_run(runner, capsys):
    broken = dict.fromkeys(("text", "diffusion", "decode"), "ltx_ray.engine.fake:NoSuchEngine")
    assert runner.render(rows("one"), fake=False, engines=broken) == 1
    assert "gangs failed to start" in capsys.readouterr().err
