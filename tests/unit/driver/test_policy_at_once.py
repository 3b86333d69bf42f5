"""Replicas that take several calls at once, and items that have replicas to themselves."""

from __future__ import annotations

from ltx_ray.driver.policy import Policy
from ltx_ray.driver.policy_state import RetryDecision
from ltx_ray.stages import FULL_PATH, OUTPUT_STAGES

DIFFUSION = ("stage1", "stage2")


def calls(policy: Policy) -> list[tuple[str, str, str]]:
    made = []
    while (call := policy.next_dispatch()) is not None:
        made.append((call.item, str(call.stage), call.replica))
    return made


# --- replicas that take several calls at once ----------------------------------------------------


def two_at_once(**replicas) -> Policy:
    policy = Policy(path=("decode",))
    for name, count in replicas.items():
        policy.add_replica(name, OUTPUT_STAGES, count)
    for number in range(6):
        policy.admit(f"i{number}")
    return policy


def test_a_replica_takes_as_many_calls_as_it_can_and_one_without_any_goes_first():
    policy = two_at_once(d=2, e=2)
    assert calls(policy) == [(f"i{n}", "decode", name) for n, name in enumerate("dede")]
    assert policy.running == {"i0": "d", "i1": "e", "i2": "d", "i3": "e"}
    assert policy.items_of("d") == ["i0", "i2"] and policy.spare_replicas() == []
    policy.call_finished("i3")
    policy.call_finished("i1")
    assert calls(policy) == [("i4", "decode", "e"), ("i5", "decode", "e")]


def test_a_lost_replica_charges_the_item_that_broke_it_alone():
    policy = two_at_once(d=2)
    calls(policy)
    assert policy.remove_replica("d", charged=lambda item: item == "i1") == [
        RetryDecision("i0", True, 1), RetryDecision("i1", True, 2)
    ]  # fmt: skip
    policy.add_replica("e", OUTPUT_STAGES, 2)
    assert [item for item, _, _ in calls(policy)] == ["i0", "i1"]


# --- an item that goes first ---------------------------------------------------------------------


def test_an_item_may_have_all_stages_to_itself():
    """The preflight clip is not kept waiting by rows that hold the first replicas for a minute each."""
    policy = Policy()
    for name, roles in {"t": ("text",), "a": DIFFUSION, "b": DIFFUSION[::-1], "d": OUTPUT_STAGES}.items():
        policy.add_replica(name, roles)
    policy.admit("row")
    calls(policy)
    policy.call_finished("row", 1.0)
    policy.admit("first", first=True)
    policy.alone = "first"
    policy.admit("other")
    seen = []
    while "first" in policy._items:
        seen += calls(policy)
        policy.call_finished(policy.alone, 1.0)
    assert [(item, stage) for item, stage, _ in seen] == [("first", stage) for stage in FULL_PATH]
    assert {stage for _, stage, _ in calls(policy)} >= {"stage1", "text"}
