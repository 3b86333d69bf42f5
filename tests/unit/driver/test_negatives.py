"""The context of a negative prompt travels once to a node, and not with every call."""

from __future__ import annotations

from types import SimpleNamespace

from ltx_ray.driver.negatives import NegativeContexts
from ltx_ray.driver.tracker import TrackedItem
from ltx_ray.records import WorkItem
from ltx_ray.stages import Stage
from tests.support.samples import recipe, request


class Calls:
    """The negative contexts of a run, and the calls of text that it makes."""

    def __init__(self):
        self.shared: list[bytes] = []
        self.contexts = NegativeContexts(SimpleNamespace(share=self._share))

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
            packed = item.request.negative_prompt.encode() if item.negative == "separate" else None
            self.contexts.take(tracked, SimpleNamespace(facts=SimpleNamespace(negative=packed)))
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


def test_an_item_keeps_what_it_refers_to_and_starts_over_with_what_there_is():
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
