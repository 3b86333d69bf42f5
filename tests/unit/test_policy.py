"""The policy: any order of joins, leaves, completions and failures loses no item and never gets stuck."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ltx_ray.driver.policy import STAGES, Dispatch, Policy, Verdict

LAYOUTS = {
    "split": (("text",), ("stage1",), ("stage2",), ("decode",)),
    "shared": (("text",), ("stage1", "stage2"), ("decode",)),
    "one": (STAGES,),
    "latents": (("text",), ("stage1",), ("decode",)),
}


class PolicyMachine(RuleBasedStateMachine):
    """Drives a Policy as the loop does and keeps its own books of every item."""

    @initialize(layout=st.sampled_from(sorted(LAYOUTS)), depth=st.integers(1, 3), attempts=st.integers(1, 3))
    def start(self, layout, depth, attempts):
        self.pools = LAYOUTS[layout]
        self.stages = tuple(s for s in STAGES if any(s in roles for roles in self.pools))
        self.depth, self.attempts = depth, attempts
        self.policy = Policy(queue_depth=depth, max_attempts=attempts, stages=self.stages)
        self.replicas: dict[str, tuple[str, ...]] = {}
        self.running: dict[str, Dispatch] = {}
        self.stage: dict[str, str] = {}
        self.failures: dict[str, int] = {}
        self.losses: dict[str, int] = {}
        self.order: list[str] = []
        self.ended: set[str] = set()
        self.peak = dict.fromkeys(self.stages, 0)
        self.came_back: set[str] = set()
        self.joined = 0

    # --- what may happen -------------------------------------------------------------------------

    @rule(data=st.data())
    def join(self, data):
        name = f"r{self.joined}"
        self.joined += 1
        self.replicas[name] = data.draw(st.sampled_from(self.pools))
        self.policy.join(name, self.replicas[name])

    @precondition(lambda self: self.replicas)
    @rule(data=st.data(), charged=st.booleans())
    def leave(self, data, charged):
        name = data.draw(st.sampled_from(sorted(self.replicas)))
        del self.replicas[name]
        call = self.running.pop(name, None)
        verdict = self.policy.leave(name, charged)
        if call is None:
            assert verdict is None, "a gang that holds no row charges none"
        else:
            self._judged(call.item, verdict, charged)

    @rule(wanted=st.integers(1, 6))
    def admit(self, wanted):
        for _ in range(min(wanted, self.policy.room())):
            item = f"i{len(self.order)}"
            self.order.append(item)
            self.stage[item], self.failures[item] = self.stages[0], 0
            self.policy.admit(item)

    @rule()
    def dispatch(self):
        """Make every call that can be made, and check each choice against the books."""
        while (call := self.policy.next_dispatch()) is not None:
            self._check(call)
            self.running[call.replica] = call

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data):
        item = self._some_call(data).item
        stage = self.stage[item]
        if self.policy.finished(item):
            assert stage == self.stages[-1]
            self._end(item)
        else:
            self.stage[item] = self.stages[self.stages.index(stage) + 1]
            self.came_back.discard(item)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fail_call(self, data):
        item = self._some_call(data).item
        self._judged(item, self.policy.call_failed(item), charged=True)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fail_row(self, data):
        item = self._some_call(data).item
        assert self.policy.row_failed(item) == Verdict(item, False, self.failures[item] + 1)
        self._end(item)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def lose_inputs(self, data):
        item = self._some_call(data).item
        self.stage[item] = self.stages[0]
        self.losses[item] = self.losses.get(item, 0) + 1
        # what is lost again and again is charged in the end, so that it does not go on for ever
        charged = self.losses[item] > self.policy.max_restarts
        self._judged(item, self.policy.inputs_lost(item), charged)

    # --- books -----------------------------------------------------------------------------------

    def _some_call(self, data) -> Dispatch:
        return self.running.pop(data.draw(st.sampled_from(sorted(self.running))))

    def _end(self, item: str) -> None:
        del self.stage[item]
        self.ended.add(item)

    def _judged(self, item: str, verdict: Verdict, charged: bool) -> None:
        self.failures[item] += charged
        self.came_back.add(item)
        retry = self.failures[item] < self.attempts
        assert verdict == Verdict(item, retry, min(self.failures[item] + 1, self.attempts))
        if not retry:
            self._end(item)

    def _waiting(self, stage: str) -> list[str]:
        busy = {c.item for c in self.running.values()}
        return [i for i in self.order if self.stage.get(i) == stage and i not in busy]

    def _servers(self, stage: str) -> int:
        return max(1, sum(stage in roles for roles in self.replicas.values()))

    def _room_after(self, stage: str) -> bool:
        if stage == self.stages[-1]:
            return True
        following = self.stages[self.stages.index(stage) + 1]
        making = sum(c.stage == stage for c in self.running.values())
        return len(self._waiting(following)) + making < self.depth * self._servers(following)

    def _check(self, call: Dispatch) -> None:
        assert call.replica in self.replicas and call.replica not in self.running, "one call a replica"
        assert call.item not in {c.item for c in self.running.values()}, "one replica an item"
        assert call.stage in self.replicas[call.replica]
        assert self.stage[call.item] == call.stage
        assert self._waiting(call.stage)[0] == call.item, "first admitted, first served"
        assert self._room_after(call.stage), "the queue behind it is full"
        for stage in self.stages[self.stages.index(call.stage) + 1 :]:
            if self._waiting(stage) and self._room_after(stage):
                idle = [r for r, roles in self.replicas.items() if roles == (stage,) and r not in self.running]
                assert not idle, f"{stage} is downstream of {call.stage} and could have run"

    # --- what always holds -----------------------------------------------------------------------

    @invariant()
    def no_item_is_lost_or_doubled(self):
        assert set(self.order) == set(self.stage) | self.ended
        assert self.policy.busy == len(self.stage)
        assert self.policy.running == {r: c.item for r, c in self.running.items()}
        for stage in self.stages:
            assert self.policy.waiting(stage) == len(self._waiting(stage))

    @invariant()
    def queues_are_bounded(self):
        """By depth x the most servers there have been; items whose calls failed come back on top of that."""
        for stage in self.stages:
            self.peak[stage] = max(self.peak[stage], self._servers(stage))
            new = [i for i in self._waiting(stage) if i not in self.came_back]
            assert len(new) <= self.depth * self.peak[stage]

    @invariant()
    def there_is_always_something_to_do(self):
        served = {s for roles in self.replicas.values() for s in roles}
        if self.stage and not self.running and served == set(self.stages):
            call = self.policy.next_dispatch()
            assert call is not None, f"stuck with {self.stage}"
            self._check(call)
            self.running[call.replica] = call

    def teardown(self):
        """With one replica of each pool and no more trouble, every item that is left gets through."""
        if not hasattr(self, "policy"):
            return
        for roles in self.pools:
            name = f"r{self.joined}"
            self.joined += 1
            self.replicas[name] = roles
            self.policy.join(name, roles)
        for _ in range(len(self.stage) * len(self.stages) + 1):
            self.dispatch()
            for call in list(self.running.values()):
                del self.running[call.replica]
                if self.policy.finished(call.item):
                    self._end(call.item)
                else:
                    self.stage[call.item] = self.stages[self.stages.index(call.stage) + 1]
        assert not self.stage
        assert self.policy.busy == 0


TestPolicyMachine = PolicyMachine.TestCase
TestPolicyMachine.settings = settings(max_examples=120, stateful_step_count=60)


# --- single facts --------------------------------------------------------------------------------


def make(pools: dict[str, tuple[str, ...]], items: int = 0, **options) -> Policy:
    policy = Policy(**options)
    for name, roles in pools.items():
        policy.join(name, roles)
    for n in range(items):
        policy.admit(f"i{n}")
    return policy


def calls(policy: Policy) -> list[tuple[str, str, str]]:
    made: list[tuple[str, str, str]] = []
    while len(made) < 100 and (d := policy.next_dispatch()) is not None:
        made.append((d.item, d.stage, d.replica))
    return made


SPLIT = {"t": ("text",), "a": ("stage1",), "b": ("stage2",), "d": ("decode",)}


def test_room_is_depth_for_each_server_of_the_first_stage():
    policy = Policy(queue_depth=3)
    assert policy.room() == 3, "rows may wait for the first replica"
    for name in ("t1", "t2"):
        policy.join(name, ("text",))
    assert policy.room() == 6
    policy.admit("x")
    assert policy.room() == 5
    assert calls(policy) == [("x", "text", "t1")]
    assert policy.room() == 6, "a running item does not wait"


def test_a_clip_goes_through_every_stage_once():
    policy = make(SPLIT, items=1)
    for stage, replica in zip(STAGES, "tabd"):
        assert calls(policy) == [("i0", stage, replica)]
        assert policy.finished("i0") == (stage == "decode")
    assert policy.busy == 0


def test_upstream_stops_when_the_queue_behind_it_is_full():
    policy = make({"t": ("text",)}, items=5, queue_depth=2)
    for n in range(2):
        assert calls(policy) == [(f"i{n}", "text", "t")]
        policy.finished(f"i{n}")
    assert calls(policy) == []
    policy.join("a", ("stage1",))
    assert calls(policy) == [("i0", "stage1", "a"), ("i2", "text", "t")]


def test_what_is_being_made_for_a_queue_counts_into_it():
    policy = make({"t1": ("text",), "t2": ("text",), "t3": ("text",), "a": ("stage1",)}, items=5, queue_depth=2)
    assert calls(policy) == [("i0", "text", "t1"), ("i1", "text", "t2")]
    policy.finished("i0")
    assert calls(policy) == [("i0", "stage1", "a"), ("i2", "text", "t1")]


def test_a_retried_item_goes_before_younger_ones():
    policy = make({"t": ("text",)}, items=3)
    assert calls(policy) == [("i0", "text", "t")]
    policy.call_failed("i0")
    assert calls(policy) == [("i0", "text", "t")]


def test_a_shared_replica_fills_the_queue_then_empties_it():
    policy = make({"t": ("text",), "s": ("stage1", "stage2"), "d": ("decode",)}, items=4, queue_depth=2)
    ran, switched = [], 0
    for _ in range(100):
        while (d := policy.next_dispatch()) is not None:
            if d.replica == "s":
                ran.append(d.stage)
                switched += d.switched
        for item in list(policy.running.values()):
            policy.finished(item)
    assert policy.busy == 0
    assert ran == ["stage1", "stage1", "stage2", "stage2"] * 2
    assert switched == 3


def run_all(policy: Policy, rows: list[str]) -> tuple[list[str], int]:
    """Feed rows of these kinds through the last stage as room allows: (kinds in the order they ran, switches)."""
    ran, switched, fed = [], 0, 0
    while fed < len(rows) or policy.busy:
        while fed < len(rows) and policy.room():
            policy.admit(f"i{fed}", {"decode": rows[fed]})
            fed += 1
        while (d := policy.next_dispatch()) is not None:
            ran.append(rows[int(d.item[1:])])
            switched += d.switched
        for item in list(policy.running.values()):
            policy.finished(item)
    return ran, switched


def one_stage(replicas: int, **options) -> Policy:
    policy = Policy(stages=("decode",), **options)
    for n in range(replicas):
        policy.join(f"d{n}", ("decode",))
    return policy


def test_rows_that_need_the_same_weights_stay_together():
    ran, switched = run_all(one_stage(1, queue_depth=4), ["a", "b"] * 40)
    assert sorted(ran) == sorted(["a", "b"] * 40)
    assert switched <= 16, "strictly in order it would be 79"


def test_each_replica_keeps_to_its_kind():
    _, switched = run_all(one_stage(2, queue_depth=4), ["a", "b"] * 40)
    assert switched <= 2


def test_a_lone_row_of_its_kind_is_not_passed_over_for_ever():
    ran, _ = run_all(one_stage(1, queue_depth=4, patience=5), ["a"] * 3 + ["b"] + ["a"] * 60)
    assert 3 <= ran.index("b") <= 3 + 5


def test_without_kinds_the_oldest_goes_first():
    policy = one_stage(2, queue_depth=4)
    for n in range(6):
        policy.admit(f"i{n}")
    assert [item for item, _, _ in calls(policy)] == ["i0", "i1"]


def test_attempts_are_capped_and_uncharged_losses_are_free():
    policy = make({"t": ("text",)}, items=1, max_attempts=2)
    for _ in range(3):
        calls(policy)
        assert policy.inputs_lost("i0") == Verdict("i0", True, 1)
    calls(policy)
    assert policy.call_failed("i0") == Verdict("i0", True, 2)
    calls(policy)
    assert policy.leave("t") == Verdict("i0", False, 2)
    assert policy.busy == 0


def test_lost_inputs_start_over():
    policy = make(SPLIT, items=1)
    calls(policy)
    policy.finished("i0")
    assert calls(policy) == [("i0", "stage1", "a")]
    policy.inputs_lost("i0")
    assert calls(policy) == [("i0", "text", "t")]


def test_draining_lets_only_the_last_stage_finish():
    policy = make(SPLIT, items=3)
    calls(policy)
    policy.finished("i0")
    policy.draining = True
    assert policy.room() == 0
    assert calls(policy) == [] and policy.idle_when_drained()
    policy.draining = False
    for _ in range(2):
        calls(policy)
        policy.finished("i0")
    policy.draining = True
    assert not policy.idle_when_drained(), "a call is under way"
    policy.call_failed("i1")
    policy.call_failed("i2") if "i2" in policy.running.values() else None
    assert not policy.idle_when_drained(), "i0 waits to be decoded"
    assert calls(policy) == [("i0", "decode", "d")]
    policy.finished("i0")
    assert policy.idle_when_drained() and policy.busy == 2


def test_what_never_happens_is_an_assertion():
    policy = make({"t": ("text",)}, items=1)
    with pytest.raises(AssertionError):
        policy.admit("i0")
    with pytest.raises(AssertionError):
        policy.join("t", ("text",))
    with pytest.raises(AssertionError):
        policy.finished("i0")
    assert policy.leave("nobody") is None


def test_a_shared_replica_waits_for_work_of_its_phase_that_is_being_made():
    policy = Policy(queue_depth=4)
    for name, roles in (("t", ("text",)), ("d", ("stage1", "stage2")), ("c", ("decode",))):
        policy.join(name, roles)
    policy.admit("one")
    assert policy.next_dispatch().stage == "text"
    policy.finished("one")
    policy.admit("two")
    assert {policy.next_dispatch().stage for _ in range(2)} == {"stage1", "text"}
    policy.finished("one")
    # `two` is in the text pool: stage 1 will have work at once, so there is no switch for `one` yet
    assert policy.next_dispatch() is None
    policy.finished("two")
    assert policy.next_dispatch().item == "two"
    policy.finished("two")
    assert (dispatch := policy.next_dispatch()).stage == "stage2" and dispatch.switched
