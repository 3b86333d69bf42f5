"""The context of a negative prompt travels once to a node, and not with every call."""

from __future__ import annotations

from types import SimpleNamespace

from ltx_ray.driver import negatives
from ltx_ray.driver.negatives import NegativeContexts
from ltx_ray.driver.tracker import TrackedItem
from ltx_ray.records import WorkItem
from ltx_ray.stages import Stage
from tests.support.samples import recipe, request


class Calls:
    """The negative contexts of a run, and the calls of text that it makes."""

    def __init__(self):
        self.shared: list[bytes] = []
        self.wrong_nodes: set[str] = set()
        self.contexts = NegativeContexts(SimpleNamespace(share=self._share), self.wrong_nodes)

    def _share(self, value: bytes) -> str:
        self.shared.append(value)
        return f"handle {len(self.shared)}"

    def item(self, number: int, **values) -> TrackedItem:
        return TrackedItem(WorkItem(f"{number:032x}", request(seed=number, **values), recipe(), "r"), [])

    def text(self, tracked: TrackedItem, ends: bool = True) -> str:
        """What the call is told. It returns a context apart when that is what it is told."""
        item, inputs = self.contexts.call(tracked, Stage.TEXT)
        assert inputs == []
        if ends:
            if item.negative == "separate":
                self.contexts.take(tracked, item.request.negative_prompt.encode(), "n0")
            tracked.payloads[Stage.TEXT] = "conditions"
        return item.negative

    def inputs(self, tracked: TrackedItem, stage: str) -> list:
        return self.contexts.call(tracked, Stage(stage))[1]


def test_the_first_row_carries_its_own_the_second_has_it_shared_and_the_others_refer_to_it():
    calls = Calls()
    items = [calls.item(number, negative_prompt="blurry") for number in range(4)]
    assert [calls.text(item) for item in items] == ["within", "separate", "left out", "left out"]
    assert calls.shared == [b"blurry"]
    assert [calls.inputs(item, "stage1")[1:] for item in items] == [[], *[["handle 1"]] * 3]
    items[3].payloads[Stage.STAGE1] = "latents"
    assert calls.inputs(items[3], "stage2") == ["conditions", "latents"], "stage 2 has no use for it"


def test_calls_that_are_under_way_do_not_all_return_it():
    calls = Calls()
    told = [calls.text(calls.item(number, negative_prompt="blurry"), ends=False) for number in range(8)]
    assert told == ["within", *["separate"] * 3, *["within"] * 4]


def test_more_prompts_in_turn_than_are_kept_drive_none_out():
    calls = Calls()
    told = [calls.text(calls.item(number, negative_prompt=f"n{number % 20}")) for number in range(1200)]
    assert told.count("separate") == 8 and told.count("left out") > 400
    later = [calls.text(calls.item(number, negative_prompt="newer")) for number in range(400)]
    assert later[0] == "within" and later[-1] == "left out", "those that nobody uses any more make room"


def test_a_context_of_a_node_that_computes_wrongly_is_not_used_again():
    calls = Calls()
    assert [calls.text(calls.item(n, negative_prompt="blurry")) for n in range(3)] == ["within", "separate", "left out"]
    calls.wrong_nodes.add("n0")
    assert calls.text(calls.item(3, negative_prompt="blurry")) == "within"


def test_an_item_keeps_what_it_refers_to_and_starts_over_with_what_there_is(monkeypatch):
    monkeypatch.setattr(negatives, "_LEAST_CALLS", 0)
    calls = Calls()
    first = [calls.item(number, negative_prompt="blurry") for number in range(3)]
    for item in first:
        calls.text(item)
    for number in range(100):
        for _ in range(2):
            calls.text(calls.item(number, negative_prompt=f"n{number}"))
    assert calls.inputs(first[2], "stage1") == ["conditions", "handle 1"], "though the driver has forgotten it"
    assert [calls.text(first[2]), calls.text(first[2])] == ["within", "separate"] and len(calls.shared) == 102
    assert calls.inputs(first[2], "stage1") == ["conditions", "handle 102"]


def test_rows_that_each_have_their_own_are_left_as_they_are():
    calls = Calls()
    assert {calls.text(calls.item(number, negative_prompt=f"n{number}")) for number in range(300)} == {"within"}
    assert calls.shared == [] and len(calls.contexts._met) <= 64


def test_rows_without_a_negative_pass_have_none():
    calls = Calls()
    plain = [calls.item(number, video_cfg_scale=1.0, audio_cfg_scale=1.0) for number in range(4)]
    assert [calls.text(item) for item in plain] == ["within"] * 4
    assert calls.inputs(plain[3], "stage1") == ["conditions"]
