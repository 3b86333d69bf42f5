"""The policy against a model of it: whatever joins, leaves, ends or fails, no item is lost and none gets stuck."""

from __future__ import annotations

import itertools
import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ltx_ray.driver.policy import Dispatch, Policy, RetryDecision
from ltx_ray.stages import FULL_PATH, OUTPUT_STAGES, PATH_FROM_STORED, Stage

MERGED = ("stage1", "stage2")
TEXT, ASIDE = ("text",), OUTPUT_STAGES
EITHER, EITHER_BUT_SECOND, ALL = ("stage1", "stage2"), ("stage2", "stage1"), tuple(tuple(Stage))
ROLES = (TEXT, ("stage1",), ("stage2",), EITHER, EITHER_BUT_SECOND, ASIDE, ALL)
GUESSED_BYTES = {"text": 25e6, "stage1": 2e6, "load_latents": 2e6, "stage2": 8e6, "decode": 0, "save_latents": 0}
NBYTES = {"text": 3, "stage1": 2, "load_latents": 2, "stage2": 8, "decode": 1, "save_latents": 1}


class PolicyMachine(RuleBasedStateMachine):
    """Drives a Policy as the loop does and keeps its own books of every item and replica."""

    @initialize(
        depth=st.integers(1, 3),
        attempts=st.integers(1, 3),
        patience=st.integers(0, 3),
        max_bytes=st.sampled_from([math.inf, 1.0, 40.0, 30e6]),
        restarts=st.integers(0, 3),
    )
    def start(self, depth, attempts, patience, max_bytes, restarts):
        self.depth, self.attempts, self.patience = depth, attempts, patience
        self.max_bytes, self.restarts = max_bytes, restarts
        self.policy = Policy(
            queue_depth=depth,
            max_attempts=attempts,
            max_passed_over=patience,
            max_bytes=max_bytes,
            max_restarts=restarts,
        )
        self.numbers = itertools.count()
        self.roles: dict[str, tuple[str, ...]] = {}
        self.home: dict[str, str | None] = {}
        self.running: dict[str, Dispatch] = {}
        self.path: dict[str, tuple[str, ...]] = {}
        self.at: dict[str, int] = {}
        self.kinds: dict[str, dict[str, str]] = {}
        self.order: dict[str, int] = {}
        self.tried: dict[str, int] = {}
        self.losses: dict[str, int] = {}
        self.held: dict[str, dict[str, int]] = {}
        self.came_back: set[str] = set()
        self.passed_over: dict[str, int] = {}
        self.admitted: set[str] = set()
        self.ended: set[str] = set()
        self.measured: set[str] = set()
        self.most_servers = dict.fromkeys(tuple(Stage), 1)
        self.most_makers = dict.fromkeys(tuple(Stage), 0)

    # --- what may happen -------------------------------------------------------------------------

    @rule(roles=st.sampled_from(ROLES))
    def join(self, roles):
        self._join(roles)

    def _join(self, roles):
        name = f"r{next(self.numbers)}"
        self.roles[name] = roles
        self.home[name] = next((role for role in roles if role in MERGED), None)
        self.policy.add_replica(name, roles)

    @precondition(lambda self: self.roles)
    @rule(data=st.data(), charged=st.booleans(), inputs_lost=st.booleans())
    def leave(self, data, charged, inputs_lost):
        name = data.draw(st.sampled_from(sorted(self.roles)))
        del self.roles[name], self.home[name]
        call = self.running.pop(name, None)
        verdict = self.policy.remove_replica(name, charged, inputs_lost)
        if call is None:
            assert verdict is None, "a gang that holds no row charges none"
        elif inputs_lost:
            self._started_over(call.item, None, verdict)
        else:
            self.losses[call.item] += not charged
            self._judged(call.item, verdict, charged or self.losses[call.item] > self.restarts)

    @rule(
        wanted=st.integers(1, 6),
        path=st.sampled_from([None, None, PATH_FROM_STORED]),
        kind=st.sampled_from([None, "a", "b", "c"]),
    )
    def admit(self, wanted, path, kind):
        for _ in range(min(wanted, self.policy.capacity())):
            item = f"i{next(self.numbers)}"
            self.admitted.add(item)
            self._admit(item, path or FULL_PATH, {"stage1": kind, "stage2": kind} if kind else {}, 1)
            self.policy.admit(item, self.kinds[item], path)

    def _admit(self, item, path, kinds, attempts):
        self.path[item], self.at[item], self.kinds[item] = path, 0, kinds
        self.order[item], self.tried[item], self.losses[item] = next(self.numbers), attempts, 0
        self.held[item] = {}

    @rule()
    def dispatch(self):
        """Make every call that can be made, and check each choice against the books."""
        while (call := self.policy.next_dispatch()) is not None:
            self._take(call)
        for name in set(self.roles) - set(self.running):
            for role in self._serves(name):
                assert not self._open(role), f"{name} idles, though {role} has work for it"

    @precondition(lambda self: self.running)
    @rule(data=st.data(), seconds=st.sampled_from([None, 0.05, 1.0, 50.0]), switch=st.sampled_from([0.0, 0.0, 2.0]))
    def finish(self, data, seconds, switch):
        self._finish(self._some_call(data), seconds, switch)

    def _finish(self, call, seconds=1.0, switch=0.0):
        item, stage = call.item, call.stage
        last = self.at[item] + 1 == len(self.path[item])
        assert self.policy.call_finished(item, seconds, switch, NBYTES[stage]) == last
        if seconds is not None:
            self.measured.add(stage)
        if last:
            self._end(item)
            return
        self.at[item] += 1
        self.came_back.discard(item)
        self.held[item][stage] = NBYTES[stage]
        if self.at[item] + 1 == len(self.path[item]):
            self.held[item].pop("text", None)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), keep=st.booleans())
    def fail_call(self, data, keep):
        call = self._some_call(data)
        self._judged(call.item, self.policy.call_failed(call.item), charged=True)
        if keep and call.item in self.ended and call.stage in ("stage2", "decode"):
            # as the loop does with an item whose latents are worth keeping
            self.ended.remove(call.item)
            self._admit(call.item, ("save_latents",), {}, self.attempts)
            self.policy.admit(call.item, path=("save_latents",), attempts=self.attempts)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fail_row(self, data):
        item = self._some_call(data).item
        assert self.policy.row_failed(item) == RetryDecision(item, False, self.tried[item])
        self._end(item)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), reroute=st.booleans())
    def lose_inputs(self, data, reroute):
        item = self._some_call(data).item
        path = FULL_PATH if reroute and self.path[item] == PATH_FROM_STORED else None
        self._started_over(item, path, self.policy.inputs_lost(item, path))

    # --- books -----------------------------------------------------------------------------------

    def _some_call(self, data) -> Dispatch:
        return self.running.pop(data.draw(st.sampled_from(sorted(self.running))))

    def _end(self, item: str) -> None:
        del self.path[item], self.held[item]
        self.passed_over.pop(item, None)
        self.came_back.discard(item)
        self.ended.add(item)

    def _started_over(self, item: str, path: tuple[str, ...] | None, verdict: RetryDecision) -> None:
        self.path[item], self.at[item], self.held[item] = path or self.path[item], 0, {}
        self.losses[item] += 1
        # what is lost again and again is charged in the end, so that it does not go on for ever
        self._judged(item, verdict, charged=self.losses[item] > self.restarts)

    def _judged(self, item: str, verdict: RetryDecision, charged: bool) -> None:
        retry = not charged or self.tried[item] < self.attempts
        self.tried[item] += charged and retry
        assert verdict == RetryDecision(item, retry, self.tried[item])
        if retry:
            self.came_back.add(item)
        else:
            self._end(item)

    def _stage(self, item: str) -> str:
        return self.path[item][self.at[item]]

    def _following(self, item: str) -> str | None:
        return (*self.path[item], None)[self.at[item] + 1]

    def _waiting(self, stage: str) -> list[str]:
        busy = {c.item for c in self.running.values()}
        return sorted((i for i in self.path if self._stage(i) == stage and i not in busy), key=self.order.__getitem__)

    def _serves(self, name: str) -> list[str]:
        return [role for role in self.roles[name] if role not in MERGED or role == self.home[name]]

    def _servers(self, stage: str) -> int:
        return max(1, sum(stage in self._serves(name) for name in self.roles))

    def _open(self, stage: str) -> list[str]:
        """Items that may run in `stage` now: there is room behind it, and memory."""
        if self.policy.draining and stage not in ("decode", "save_latents"):
            return []
        if not self._memory_for(stage):
            return []
        room = {
            after: after is None or len(self._waiting(after)) < self.depth * self._servers(after)
            for after in {self._following(item) for item in self._waiting(stage)}
        }
        return [item for item in self._waiting(stage) if room[self._following(item)]]

    def _memory_for(self, stage: str) -> bool:
        if stage in ("decode", "save_latents") or not self.running:
            return True
        coming = [c.stage for c in self.running.values() if c.stage not in ("decode", "save_latents")] + [stage]
        expected = sum(NBYTES[s] if s in self.measured else GUESSED_BYTES[s] for s in coming)
        return sum(sum(h.values()) for h in self.held.values()) + expected <= self.max_bytes

    def _take(self, call: Dispatch) -> None:
        item, stage, name = call.item, call.stage, call.replica
        assert name in self.roles and name not in self.running, "one call a replica"
        assert item not in {c.item for c in self.running.values()}, "one replica an item"
        assert stage in self.roles[name]
        assert self._stage(item) == stage
        may_run = self._open(stage)
        assert item in may_run, "the queue behind it is full, or memory is"
        if call.moved:
            assert stage in MERGED and stage != self.home[name] is not None
            for role in self._serves(name):
                assert not self._open(role), f"{name} moves, though there is work at home"
            assert not any(stage in self._serves(other) for other in self.roles if other not in self.running)
            self.home[name] = stage
        else:
            assert stage in self._serves(name)
            for later in tuple(Stage)[tuple(Stage).index(stage) + 1 :]:
                idle = [r for r in self.roles if r not in self.running and later in self._serves(r)]
                assert not idle or not self._open(later), f"{later} is downstream of {stage} and could have run"
        oldest = may_run[0]
        if item != oldest:
            kinds = {self.kinds[i].get(stage) for i in may_run}
            assert len(kinds) > 1, "items alike are served in order"
            self.passed_over[oldest] = self.passed_over.get(oldest, 0) + 1
            assert self.passed_over[oldest] <= self.patience
        self.passed_over.pop(item, None)
        self.running[name] = call

    # --- what always holds -----------------------------------------------------------------------

    @invariant()
    def no_item_is_lost_or_doubled(self):
        assert self.admitted == set(self.path) | self.ended and not set(self.path) & self.ended
        assert self.policy.in_flight == len(self.path)
        assert self.policy.running == {r: c.item for r, c in self.running.items()}
        assert self.policy.assignments == {r: home for r, home in self.home.items() if home is not None}
        for stage in tuple(Stage):
            assert self.policy.queued(stage) == len(self._waiting(stage))

    @invariant()
    def queues_are_bounded(self):
        """By depth x the most servers there have been, and one for each replica before; what came back is on top."""
        for stage in tuple(Stage)[:-1]:
            before = {path[path.index(stage) - 1] for path in (FULL_PATH, PATH_FROM_STORED) if stage in path[1:]}
            makers = sum(bool(before & set(roles)) for roles in self.roles.values())
            self.most_servers[stage] = max(self.most_servers[stage], self._servers(stage))
            self.most_makers[stage] = max(self.most_makers[stage], makers)
            new = [item for item in self._waiting(stage) if item not in self.came_back]
            assert len(new) <= self.depth * self.most_servers[stage] + self.most_makers[stage]

    @invariant()
    def what_is_spare_is_idle(self):
        assert set(self.policy.spare_replicas()) <= set(self.roles) - set(self.running)

    @invariant()
    def there_is_always_something_to_do(self):
        served = {stage for roles in self.roles.values() for stage in roles}
        needed = {stage for item in self.path for stage in self.path[item][self.at[item] :]}
        if self.path and not self.running and needed <= served:
            call = self.policy.next_dispatch()
            assert call is not None, f"stuck with {self.path}"
            self._take(call)

    def teardown(self):
        """Drained, decoding comes to its end; undrained, with a replica for each stage, so does every item."""
        if not hasattr(self, "policy"):
            return
        for roles in (TEXT, EITHER, ASIDE):
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
