"""The policy against a model of it: no item is lost or stuck, whatever joins, leaves, ends or fails."""

from __future__ import annotations

import itertools
import math
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ltx_ray.driver.policy import Dispatch, Policy, RetryDecision
from ltx_ray.stages import DIFFUSION_STAGES, FULL_PATH, OUTPUT_STAGES, PATH_FROM_STORED, Stage

TEXT, DECODE_POOL = ("text",), OUTPUT_STAGES
MOVABLE, MOVABLE_FROM_STAGE2, ALL = ("stage1", "stage2"), ("stage2", "stage1"), tuple(Stage)
ROLES = (TEXT, ("stage1",), ("stage2",), MOVABLE, MOVABLE_FROM_STAGE2, DECODE_POOL, ALL)
GUESSED_BYTES = {"text": 25e6, "stage1": 2e6, "load_latents": 2e6, "stage2": 8e6, "decode": 0, "save_latents": 0}
NBYTES = {"text": 3, "stage1": 2, "load_latents": 2, "stage2": 8, "decode": 1, "save_latents": 1}


class PolicyMachine(RuleBasedStateMachine):
    """Drives a Policy as the loop does, and keeps its own record of every item and replica."""

    @initialize(
        depth=st.integers(1, 3),
        max_attempts=st.integers(1, 3),
        max_passed_over=st.integers(0, 3),
        max_bytes=st.sampled_from([math.inf, 1.0, 40.0, 30e6]),
        max_restarts=st.integers(0, 3),
    )
    def start(self, depth, max_attempts, max_passed_over, max_bytes, max_restarts):
        self.depth, self.max_attempts, self.max_passed_over = depth, max_attempts, max_passed_over
        self.max_bytes, self.max_restarts = max_bytes, max_restarts
        self.policy = Policy(
            queue_depth=depth,
            max_attempts=max_attempts,
            max_passed_over=max_passed_over,
            max_bytes=max_bytes,
            max_restarts=max_restarts,
        )
        self.numbers = itertools.count()
        self.roles: dict[str, tuple[str, ...]] = {}
        self.assigned: dict[str, str | None] = {}
        self.running: dict[str, Dispatch] = {}
        self.path: dict[str, tuple[str, ...]] = {}
        self.position: dict[str, int] = {}
        self.weights: dict[str, dict[str, str]] = {}
        self.order: dict[str, int] = {}
        self.attempts: dict[str, int] = {}
        self.restarts: dict[str, int] = {}
        self.results: dict[str, dict[str, int]] = {}
        self.came_back: set[str] = set()
        self.passed_over: dict[str, int] = {}
        self.admitted: set[str] = set()
        self.ended: set[str] = set()
        self.measured: set[str] = set()
        self.late: set[str] = set()
        self.most_servers = dict.fromkeys(Stage, 1)
        self.most_upstream = dict.fromkeys(Stage, 0)

    # --- what may happen -------------------------------------------------------------------------

    @rule(roles=st.sampled_from(ROLES))
    def join(self, roles):
        self._join(roles)

    def _join(self, roles):
        name = f"r{next(self.numbers)}"
        self.roles[name] = roles
        self.assigned[name] = next((role for role in roles if role in DIFFUSION_STAGES), None)
        self.policy.add_replica(name, roles)

    @precondition(lambda self: self.roles)
    @rule(data=st.data(), charged=st.booleans(), inputs_lost=st.booleans())
    def leave(self, data, charged, inputs_lost):
        name = data.draw(st.sampled_from(sorted(self.roles)))
        del self.roles[name], self.assigned[name]
        call = self.running.pop(name, None)
        decisions = self.policy.remove_replica(name, lambda item: charged, inputs_lost)
        if call is None:
            assert decisions == [], "an idle replica charges no item"
            return
        [decision] = decisions
        if inputs_lost:
            self._check_restart(call.item, None, decision)
        else:
            self.restarts[call.item] += not charged
            self._check_decision(call.item, decision, charged or self.restarts[call.item] > self.max_restarts)

    @rule(
        count=st.integers(1, 6),
        path=st.sampled_from([None, None, PATH_FROM_STORED]),
        weights=st.sampled_from([None, "a", "b", "c"]),
    )
    def admit(self, count, path, weights):
        for _ in range(min(count, self.policy.capacity())):
            item = f"i{next(self.numbers)}"
            self.admitted.add(item)
            self._admit(item, path or FULL_PATH, dict.fromkeys(DIFFUSION_STAGES, weights) if weights else {}, 1)
            self.policy.admit(item, self.weights[item], path)

    def _admit(self, item, path, weights, attempts):
        self.path[item], self.position[item], self.weights[item] = path, 0, weights
        self.order[item], self.attempts[item], self.restarts[item] = next(self.numbers), attempts, 0
        self.results[item] = {}

    @rule()
    def dispatch(self):
        """Take every dispatch that the policy offers, and check each against the model."""
        while (call := self.policy.next_dispatch()) is not None:
            self._check_dispatch(call)
        for name in set(self.roles) - set(self.running):
            for role in self._serves(name):
                assert not self._runnable(role), f"{name} is idle although {role} has work for it"

    @precondition(lambda self: self.running)
    @rule(data=st.data(), seconds=st.sampled_from([None, 0.05, 1.0, 50.0]), switch=st.sampled_from([0.0, 0.0, 2.0]))
    def finish(self, data, seconds, switch):
        self._finish(self._some_call(data), seconds, switch)

    def _finish(self, call, seconds=1.0, switch=0.0):
        item, stage = call.item, call.stage
        last = self.position[item] + 1 == len(self.path[item])
        assert self.policy.call_finished(item, seconds, switch, NBYTES[stage]) == last
        if seconds is not None:
            self.measured.add(stage)
        if last:
            self._end(item)
            return
        self.position[item] += 1
        self.came_back.discard(item)
        self.results[item][stage] = NBYTES[stage]
        if self.position[item] + 1 == len(self.path[item]):
            self.results[item].pop("text", None)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), save=st.booleans())
    def fail_call(self, data, save):
        call = self._some_call(data)
        self._check_decision(call.item, self.policy.call_failed(call.item), charged=True)
        if save and call.item in self.ended and call.stage in ("stage2", "decode"):
            # The loop saves the latents of such an item.
            self.ended.remove(call.item)
            self._admit(call.item, ("save_latents",), {}, self.max_attempts)
            self.policy.admit(call.item, path=("save_latents",), attempts=self.max_attempts)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fail_row(self, data):
        item = self._some_call(data).item
        assert self.policy.row_failed(item) == RetryDecision(item, False, self.attempts[item])
        self._end(item)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), reroute=st.booleans())
    def lose_inputs(self, data, reroute):
        item = self._some_call(data).item
        path = FULL_PATH if reroute and self.path[item] == PATH_FROM_STORED else None
        self._check_restart(item, path, self.policy.inputs_lost(item, path))

    @precondition(lambda self: self.path)
    @rule(data=st.data())
    def be_late(self, data):
        """A call, or that of an item that is back in its queue because its replica was given back meanwhile."""
        item = data.draw(st.sampled_from(sorted(self.path)))
        self.policy.call_is_late(item)
        self.late.add(item)

    # --- the model -------------------------------------------------------------------------------

    def _some_call(self, data) -> Dispatch:
        return self.running.pop(data.draw(st.sampled_from(sorted(self.running))))

    def _end(self, item: str) -> None:
        del self.path[item], self.results[item]
        self.passed_over.pop(item, None)
        self.came_back.discard(item)
        self.ended.add(item)

    def _check_restart(self, item: str, path: tuple[str, ...] | None, decision: RetryDecision) -> None:
        self.path[item], self.position[item], self.results[item] = path or self.path[item], 0, {}
        self.restarts[item] += 1
        # Beyond the limit each restart is charged, so that an item does not start over for ever.
        self._check_decision(item, decision, charged=self.restarts[item] > self.max_restarts)

    def _check_decision(self, item: str, decision: RetryDecision, charged: bool) -> None:
        retry = not charged or self.attempts[item] < self.max_attempts
        self.attempts[item] += charged and retry
        assert decision == RetryDecision(item, retry, self.attempts[item])
        if retry:
            self.came_back.add(item)
        else:
            self._end(item)

    def _stage(self, item: str) -> str:
        return self.path[item][self.position[item]]

    def _following(self, item: str) -> str | None:
        return (*self.path[item], None)[self.position[item] + 1]

    def _waiting(self, stage: str) -> list[str]:
        busy = {c.item for c in self.running.values()}
        return sorted((i for i in self.path if self._stage(i) == stage and i not in busy), key=self.order.__getitem__)

    def _serves(self, name: str) -> list[str]:
        return [role for role in self.roles[name] if role not in DIFFUSION_STAGES or role == self.assigned[name]]

    def _servers(self, stage: str) -> int:
        return max(1, sum(stage in self._serves(name) for name in self.roles))

    def _runnable(self, stage: str) -> list[str]:
        """Items that may run in `stage` now, because the next queue has space and memory allows it."""
        if self.policy.draining and stage not in ("decode", "save_latents"):
            return []
        if not self._memory_allows(stage):
            return []
        has_space = {
            after: after is None or len(self._waiting(after)) < self.depth * self._servers(after)
            for after in {self._following(item) for item in self._waiting(stage)}
        }
        return [item for item in self._waiting(stage) if has_space[self._following(item)]]

    def _memory_allows(self, stage: str) -> bool:
        if stage in ("decode", "save_latents") or not self.running:
            return True
        unfinished = [c.stage for c in self.running.values() if c.stage not in ("decode", "save_latents")] + [stage]
        expected = sum(NBYTES[s] if s in self.measured else GUESSED_BYTES[s] for s in unfinished)
        return sum(sum(h.values()) for h in self.results.values()) + expected <= self.max_bytes

    def _check_dispatch(self, call: Dispatch) -> None:
        item, stage, name = call.item, call.stage, call.replica
        assert name in self.roles and name not in self.running, "a replica has one call at a time"
        assert item not in {c.item for c in self.running.values()}, "an item is on one replica at a time"
        assert stage in self.roles[name]
        assert self._stage(item) == stage
        may_run = self._runnable(stage)
        assert item in may_run, "the next queue or the memory is full"
        if call.moved:
            assert stage in DIFFUSION_STAGES and stage != self.assigned[name] is not None
            for role in self._serves(name):
                assert not self._runnable(role), f"{name} moves although its stages have work"
            assert not any(stage in self._serves(other) for other in self.roles if other not in self.running)
            self.assigned[name] = stage
        else:
            assert stage in self._serves(name)
            for later in tuple(Stage)[tuple(Stage).index(stage) + 1 :]:
                idle = [r for r in self.roles if r not in self.running and later in self._serves(r)]
                assert not idle or not self._runnable(later), f"{later} comes after {stage} and could have run"
        oldest = may_run[0]
        if item != oldest:
            weights = {self.weights[i].get(stage) for i in may_run}
            assert len(weights) > 1, "items with the same weights are served in order"
            self.passed_over[oldest] = self.passed_over.get(oldest, 0) + 1
            assert self.passed_over[oldest] <= self.max_passed_over
        self.passed_over.pop(item, None)
        self.running[name] = call

    # --- what always holds -----------------------------------------------------------------------

    @invariant()
    def calls_are_late_until_they_end(self):
        self.late &= {call.item for call in self.running.values()}
        assert +self.policy._late == Counter((self._stage(item), self._following(item)) for item in self.late)
        assert self.policy._late <= self.policy._calls

    @invariant()
    def no_item_is_lost_or_doubled(self):
        assert self.admitted == set(self.path) | self.ended and not set(self.path) & self.ended
        assert self.policy.in_flight == len(self.path)
        assert self.policy.running == {c.item: r for r, c in self.running.items()}
        assert self.policy.assignments == {r: stage for r, stage in self.assigned.items() if stage is not None}
        for stage in Stage:
            assert self.policy.queued(stage) == len(self._waiting(stage))

    @invariant()
    def queues_are_bounded(self):
        """New items in a queue: `depth` for each of the most servers so far, and one for each replica before it."""
        for stage in tuple(Stage)[:-1]:
            before = {path[path.index(stage) - 1] for path in (FULL_PATH, PATH_FROM_STORED) if stage in path[1:]}
            upstream = sum(bool(before & set(roles)) for roles in self.roles.values())
            self.most_servers[stage] = max(self.most_servers[stage], self._servers(stage))
            self.most_upstream[stage] = max(self.most_upstream[stage], upstream)
            new = [item for item in self._waiting(stage) if item not in self.came_back]
            assert len(new) <= self.depth * self.most_servers[stage] + self.most_upstream[stage]

    @invariant()
    def spare_replicas_are_idle(self):
        assert set(self.policy.spare_replicas()) <= set(self.roles) - set(self.running)

    @invariant()
    def progress_is_possible(self):
        served = {stage for roles in self.roles.values() for stage in roles}
        needed = {stage for item in self.path for stage in self.path[item][self.position[item] :]}
        if self.path and not self.running and needed <= served:
            call = self.policy.next_dispatch()
            assert call is not None, f"stuck with {self.path}"
            self._check_dispatch(call)

    def teardown(self):
        """While the run drains, decoding finishes. With a replica for each stage, every item finishes afterwards."""
        if not hasattr(self, "policy"):
            return
        for roles in (TEXT, MOVABLE, DECODE_POOL):
            self._join(roles)
        self.policy.draining = True
        while self.running:
            self._finish(self.running.pop(min(self.running)))
            self.dispatch()
            self.no_item_is_lost_or_doubled()
        self.dispatch()
        while self.running:
            self._finish(self.running.pop(min(self.running)))
            self.dispatch()
        assert self.policy.drained() and self.policy.capacity() == 0
        assert not self._waiting("decode") and not self._waiting("save_latents")
        self.policy.draining = False
        for _ in range(len(self.path) * len(FULL_PATH) + 1):
            self.dispatch()
            for name in list(self.running):
                self._finish(self.running.pop(name))
        assert not self.path and self.policy.in_flight == 0
        assert self.ended == self.admitted


TestPolicyMachine = PolicyMachine.TestCase
TestPolicyMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
