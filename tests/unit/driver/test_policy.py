"""The policy: what runs where, and when replicas move between the stages."""

from __future__ import annotations

import heapq
import itertools
import zlib

import pytest

from ltx_ray.driver.policy import Policy, RetryDecision
from ltx_ray.stages import FULL_PATH, OUTPUT_STAGES, PATH_FROM_STORED

TEXT, DECODE_POOL = ("text",), OUTPUT_STAGES
MOVABLE, MOVABLE_FROM_STAGE2 = ("stage1", "stage2"), ("stage2", "stage1")
NBYTES = {"text": 3, "stage1": 2, "stage2": 8, "decode": 1}


def make_policy(replicas: dict[str, tuple[str, ...]], items: int = 0, **options) -> Policy:
    policy = Policy(**options)
    for name, roles in replicas.items():
        policy.add_replica(name, roles)
    for n in range(items):
        policy.admit(f"i{n}")
    return policy


def calls(policy: Policy) -> list[tuple[str, str, str]]:
    """The calls that the policy makes now: (item, stage, replica)."""
    made: list[tuple[str, str, str]] = []
    while len(made) < 100 and (d := policy.next_dispatch()) is not None:
        made.append((d.item, d.stage, d.replica))
    return made


ONE_EACH = {"t": TEXT, "a": ("stage1",), "b": ("stage2",), "d": DECODE_POOL}


def test_capacity_is_the_queue_depth_for_each_replica_of_the_first_stage():
    policy = Policy(queue_depth=3)
    assert policy.capacity() == 3, "rows may wait for the first replica"
    for name in ("t1", "t2"):
        policy.add_replica(name, TEXT)
    assert policy.capacity() == 6
    policy.admit("x")
    assert policy.capacity() == 5
    assert calls(policy) == [("x", "text", "t1")]
    assert policy.capacity() == 6, "a running item does not wait"


def test_a_clip_goes_through_every_stage_once():
    policy = make_policy(ONE_EACH, items=1)
    for stage, replica in zip(FULL_PATH, "tabd"):
        assert calls(policy) == [("i0", stage, replica)]
        assert policy.call_finished("i0") == (stage == "decode")
    assert policy.in_flight == 0


def test_upstream_stops_when_the_queue_behind_it_is_full():
    policy = make_policy({"t": TEXT}, items=5, queue_depth=2)
    for n in range(2):
        assert calls(policy) == [(f"i{n}", "text", "t")]
        policy.call_finished(f"i{n}")
    assert calls(policy) == []
    policy.add_replica("a", ("stage1",))
    assert calls(policy) == [("i0", "stage1", "a"), ("i2", "text", "t")]


def test_the_queue_before_decode_is_bounded_too():
    policy = make_policy({"t": TEXT, "a": ("stage1",), "b": ("stage2",)}, items=3, queue_depth=1)
    while made := calls(policy):
        for item, _, _ in made:
            policy.call_finished(item)
    assert [policy.queued(stage) for stage in FULL_PATH[1:]] == [1, 1, 1]


def test_a_retried_item_goes_before_younger_ones():
    policy = make_policy({"t": TEXT}, items=3)
    assert calls(policy) == [("i0", "text", "t")]
    policy.call_failed("i0")
    assert calls(policy) == [("i0", "text", "t")]


def run_all(policy: Policy, weights: list[str]) -> tuple[list[str], int]:
    """Run an item with each of these weights: (weights in the order in which the items ran, switches)."""
    ran, switched, fed = [], 0, 0
    while fed < len(weights) or policy.in_flight:
        while fed < len(weights) and policy.capacity():
            policy.admit(f"i{fed}", {"stage1": weights[fed]})
            fed += 1
        while (d := policy.next_dispatch()) is not None:
            ran.append(weights[int(d.item[1:])])
            switched += d.switched
        for item in list(policy.running):
            policy.call_finished(item)
    return ran, switched


def one_stage(replicas: int, **options) -> Policy:
    return make_policy({f"a{n}": ("stage1",) for n in range(replicas)}, path=("stage1",), **options)


def test_rows_that_need_the_same_weights_stay_together():
    ran, switched = run_all(one_stage(1, queue_depth=4), ["a", "b"] * 40)
    assert sorted(ran) == sorted(["a", "b"] * 40)
    assert switched <= 16, "in the order of the rows there would be 79"


def test_each_replica_keeps_its_weights():
    _, switched = run_all(one_stage(2, queue_depth=4), ["a", "b"] * 40)
    assert switched <= 2


def merged(*weights: str) -> Policy:
    """Idle replicas a0, a1, ... of which each has merged one of `weights`."""
    policy = one_stage(len(weights))
    for n, name in enumerate(weights):
        policy.admit(f"w{n}", {"stage1": name})
    for item, _, _ in calls(policy):
        policy.call_finished(item)
    return policy


def test_an_item_goes_to_the_replica_that_has_its_weights():
    policy = merged("a", "b")
    policy.admit("x", {"stage1": "b"})
    assert calls(policy) == [("x", "stage1", "a1")]


def test_an_item_is_left_to_the_replica_that_has_merged_its_weights():
    policy = merged("a", "b")
    policy.admit("first", {"stage1": "b"})
    calls(policy)
    policy.admit("x", {"stage1": "b"})
    policy.admit("y", {"stage1": "c"})
    assert calls(policy) == [("y", "stage1", "a0")], "x is older, but a1 has its weights and is soon idle"


def test_the_weights_of_a_lost_replica_no_longer_count():
    policy = merged("a", "b")
    policy.remove_replica("a1")
    policy.admit("x", {"stage1": "b"})
    policy.admit("y", {"stage1": "c"})
    assert calls(policy) == [("x", "stage1", "a0")]


def test_weights_that_no_replica_has_merged_are_forgotten():
    """Rows may sweep over any number of strengths."""
    policy = one_stage(2)
    run_all(policy, [f"strength {n}" for n in range(100)])
    assert len(policy._merged) <= 2


def test_a_lone_row_with_other_weights_is_not_passed_over_for_ever():
    ran, _ = run_all(one_stage(1, queue_depth=4, max_passed_over=5), ["a"] * 3 + ["b"] + ["a"] * 60)
    assert 3 <= ran.index("b") <= 3 + 5


def test_without_weights_the_oldest_goes_first():
    policy = one_stage(2, queue_depth=4)
    for n in range(6):
        policy.admit(f"i{n}")
    assert [item for item, _, _ in calls(policy)] == ["i0", "i1"]


def test_attempts_are_capped_and_uncharged_losses_are_free():
    policy = make_policy({"t": TEXT}, items=1, max_attempts=2)
    for _ in range(3):
        calls(policy)
        assert policy.inputs_lost("i0") == RetryDecision("i0", True, 1)
    calls(policy)
    assert policy.call_failed("i0") == RetryDecision("i0", True, 2)
    calls(policy)
    assert policy.remove_replica("t", charged=lambda item: False) == [RetryDecision("i0", True, 2)]
    policy.add_replica("t", TEXT)
    calls(policy)
    assert policy.remove_replica("t") == [RetryDecision("i0", False, 2)]
    assert policy.in_flight == 0


def test_lost_inputs_start_over():
    policy = make_policy(ONE_EACH, items=1)
    calls(policy)
    policy.call_finished("i0")
    assert calls(policy) == [("i0", "stage1", "a")]
    policy.inputs_lost("i0")
    assert calls(policy) == [("i0", "text", "t")]


def stages_run(policy: Policy) -> list[str]:
    """The stages of the calls until no call is left."""
    ran = []
    while (call := policy.next_dispatch()) is not None:
        ran.append(call.stage)
        policy.call_finished(call.item)
    return ran


def test_stored_latents_replace_stage_1():
    policy = make_policy(ONE_EACH)
    policy.admit("x", path=PATH_FROM_STORED)
    assert stages_run(policy) == list(PATH_FROM_STORED)


def test_when_the_stored_latents_are_gone_the_item_takes_the_full_path():
    policy = make_policy(ONE_EACH)
    policy.admit("x", path=PATH_FROM_STORED)
    assert calls(policy) == [("x", "text", "t")]
    policy.call_finished("x")
    assert calls(policy) == [("x", "load_latents", "d")]
    assert policy.inputs_lost("x", FULL_PATH) == RetryDecision("x", True, 1)
    assert stages_run(policy) == list(FULL_PATH)


def test_the_latents_of_an_item_that_is_given_up_are_saved_in_one_attempt():
    policy = make_policy(ONE_EACH, max_attempts=3)
    policy.admit("x", path=("save_latents",), attempts=3)
    policy.draining = True
    assert not policy.drained()
    assert calls(policy) == [("x", "save_latents", "d")], "even while draining"
    assert policy.call_failed("x") == RetryDecision("x", False, 3)
    assert policy.drained()


def test_draining_lets_only_the_last_stage_finish():
    policy = make_policy(ONE_EACH, items=3)
    calls(policy)
    policy.call_finished("i0")
    policy.draining = True
    assert policy.capacity() == 0
    assert calls(policy) == [] and policy.drained()
    policy.draining = False
    for _ in range(2):
        calls(policy)
        policy.call_finished("i0")
    policy.draining = True
    assert not policy.drained(), "a call is under way"
    policy.call_failed("i1")
    assert not policy.drained(), "i0 waits to be decoded"
    assert calls(policy) == [("i0", "decode", "d")]
    policy.call_finished("i0")
    assert policy.drained() and policy.in_flight == 2


def test_misuse_is_an_assertion():
    policy = make_policy({"t": TEXT}, items=1)
    with pytest.raises(AssertionError):
        policy.admit("i0")
    with pytest.raises(AssertionError):
        policy.add_replica("t", TEXT)
    with pytest.raises(AssertionError):
        policy.call_finished("i0")
    assert policy.remove_replica("unknown") == []


def test_a_shared_replica_waits_for_items_that_are_about_to_reach_its_stage():
    policy = make_policy({"t": TEXT, "d": MOVABLE, "c": DECODE_POOL}, queue_depth=4)
    policy.admit("one")
    assert policy.next_dispatch().stage == "text"
    policy.call_finished("one")
    policy.admit("two")
    assert {policy.next_dispatch().stage for _ in range(2)} == {"stage1", "text"}
    policy.call_finished("one")
    # `two` is in the text pool and reaches stage 1 soon, so the replica does not switch for `one` yet.
    assert policy.next_dispatch() is None
    policy.call_finished("two")
    assert policy.next_dispatch().item == "two"
    policy.call_finished("two")
    assert (dispatch := policy.next_dispatch()).stage == "stage2" and dispatch.switched and dispatch.moved


def test_only_idle_replicas_beyond_the_items_in_flight_are_spare():
    policy = make_policy(
        {"t1": TEXT, "t2": TEXT, "a": MOVABLE, "b": MOVABLE_FROM_STAGE2, "c": MOVABLE, "d": DECODE_POOL}, items=2
    )
    assert policy.spare_replicas() == ["a"], "each of two items needs a text, a diffusion and a decode replica"
    assert [call[1] for call in calls(policy)] == ["text", "text"]
    policy.call_finished("i0")
    assert calls(policy) == [("i0", "stage1", "a")]
    assert policy.spare_replicas() == ["t1", "b"], "one of each role stays, and so does a busy one"
    policy.remove_replica("t1")
    policy.call_finished("i1")
    assert policy.spare_replicas() == ["b"], "no item needs text, but one may start over"


def test_results_in_flight_stay_within_memory():
    pools = {f"{role[0]}{n}": role for role in (TEXT, ("stage1",), ("stage2",)) for n in range(4)} | {"d": DECODE_POOL}
    policy, results, peak, fed, done = make_policy(pools, max_bytes=30.0), {}, 0, 0, 0
    for _ in range(2000):
        while policy.capacity() and fed < 200:
            policy.admit(f"i{fed}")
            fed += 1
        calls(policy)
        if not policy.running:
            break
        # Decode is the slowest stage here, so that results pile up before it.
        item = max(policy.running, key=lambda i: (policy.stage_of(i) != "decode", i))
        stage = policy.stage_of(item)
        done += policy.call_finished(item, 1.0, nbytes=NBYTES[stage])
        results.setdefault(item, {})[stage] = NBYTES[stage]
        if stage == "stage2":
            results[item].pop("text")
        elif stage == "decode":
            del results[item]
        if fed > 60:  # the sizes of results have been measured by then
            peak = max(peak, sum(sum(h.values()) for h in results.values()))
    assert done == fed == 200
    assert 20 <= peak <= 30 + NBYTES["stage2"], peak


def test_contexts_take_memory_only_until_the_last_stage_that_reads_them():
    policy = make_policy(ONE_EACH, items=1, max_bytes=NBYTES["stage1"] + NBYTES["stage2"] + NBYTES["text"])
    for stage in FULL_PATH[:-1]:
        calls(policy)
        policy.call_finished("i0", 1.0, nbytes=NBYTES[stage])
    policy.admit("i1")
    assert calls(policy) == [("i0", "decode", "d"), ("i1", "text", "t")]
    policy.admit("i2")
    policy.call_finished("i1", 1.0, nbytes=NBYTES["text"])
    assert calls(policy) == [], "there is no memory for another result"
    policy.call_finished("i0", 1.0, nbytes=NBYTES["decode"])
    assert calls(policy) == [("i1", "stage1", "a"), ("i2", "text", "t")]


# --- replicas that move between the stages -------------------------------------------------------

HQ = {"text": 0.1, "stage1": 46.0, "stage2": 17.0, "decode": 1.75}


class Flow:
    """A run in virtual time: a call takes about `seconds` of its stage, a merge `switch` seconds."""

    def __init__(self, policy: Policy, seconds=HQ, switch: float = 1.5, seed: int = 0):
        self.policy, self.seconds, self.switch, self.seed = policy, seconds, switch, seed
        self.now, self.moves, self.clips, self.fed = 0.0, 0, 0, 0
        self.busy: dict[str, float] = {}
        self.calls: list[tuple[float, int, str, str, float, float]] = []

    def run(self, clips: int, rows: int | None = None) -> Flow:
        """Go on until `clips` more clips are done, with at most `rows` rows in all; None: rows never run out."""
        end = self.clips + clips
        number = itertools.count()
        while self.clips < end:
            while self.policy.capacity() and (rows is None or self.fed < rows):
                self.policy.admit(f"i{self.fed}")
                self.fed += 1
            while (call := self.policy.next_dispatch()) is not None:
                self.moves += call.moved
                # The seconds of calls are spread by a fifth around the mean.
                chance = zlib.crc32(f"{call.item}{call.stage}{self.seed}".encode()) % 97 / 97
                seconds = self.seconds[call.stage] * (0.8 + 0.4 * chance)
                switching = self.switch if call.switched else 0.0
                at = self.now + seconds + switching
                heapq.heappush(self.calls, (at, next(number), call.item, call.replica, seconds, switching))
            self.now, _, item, replica, seconds, switching = heapq.heappop(self.calls)
            self.busy[replica] = self.busy.get(replica, 0.0) + seconds
            self.clips += self.policy.call_finished(item, seconds + switching, switching)
        return self

    def measured(self, clips: int) -> tuple[float, float]:
        """Over `clips` more clips: the busy share of the movable replicas' time, and moves per 100 clips."""
        self.busy, moves, began = {}, self.moves, self.now
        self.run(clips)
        movable = [name for name in self.policy.assignments if len(self.policy._replicas[name].roles) > 1]
        share = sum(self.busy.get(name, 0.0) for name in movable) / (len(movable) * (self.now - began))
        return share, (self.moves - moves) * 100 / clips


def flow_of(first: int, second: int, **options) -> Flow:
    """Movable replicas, `first` that begin with stage 1 and `second` with stage 2, and others enough for them."""
    pools = {f"a{n}": MOVABLE for n in range(first)} | {f"b{n}": MOVABLE_FROM_STAGE2 for n in range(second)}
    others = -(-(first + second) // 16)
    pools |= {f"t{n}": TEXT for n in range(others)} | {f"d{n}": DECODE_POOL for n in range(others)}
    return Flow(make_policy(pools), **options)


@pytest.mark.parametrize(
    "first, second, seed, most_moves",
    # The fewer replicas there are, the more often one has to move: once for each queue that it fills or empties.
    [(1, 0, 0, 60), (1, 1, 0, 80), (2, 1, 0, 80), (5, 2, 0, 16), (8, 4, 1, 12), (22, 9, 0, 4)],
)
def test_steady_work_keeps_replicas_busy_and_they_seldom_move(first, second, seed, most_moves):
    flow = flow_of(first, second, seed=seed)
    flow.run(12 * (first + second))
    share, moves = flow.measured(300)
    assert share >= 0.97
    assert moves <= most_moves


@pytest.mark.parametrize("first, second", [(7, 0), (1, 6), (6, 1)])
def test_a_wrong_split_is_corrected(first, second):
    flow = flow_of(first, second).run(100)
    assert list(flow.policy.assignments.values()).count("stage1") in (4, 5, 6), "46 s and 17 s per clip: 5 of 7"
    assert flow.measured(200)[0] >= 0.97


def test_the_split_follows_the_work():
    flow = flow_of(5, 2).run(50)
    flow.seconds = {**HQ, "stage1": 6.0, "stage2": 20.0}
    flow.run(150)
    assert list(flow.policy.assignments.values()).count("stage1") in (1, 2, 3)
    assert flow.measured(200)[0] >= 0.97


def test_two_replicas_take_turns():
    """With one replica for each stage, the second would be idle most of the time."""
    flow = flow_of(1, 1).run(10)
    flow.measured(200)
    assert min(flow.busy[name] for name in ("a0", "b0")) / max(flow.busy.values()) >= 0.9


def test_the_last_rows_are_finished_by_the_replicas_that_are_there():
    flow = flow_of(4, 0).run(40, rows=40)
    assert flow.clips == flow.fed == 40 and flow.policy.in_flight == 0


def test_fixed_replicas_never_move():
    pools = {f"a{n}": ("stage1",) for n in range(1)} | {f"b{n}": ("stage2",) for n in range(6)}
    flow = Flow(make_policy(pools | {"t": TEXT, "d": DECODE_POOL})).run(60)
    assert flow.moves == 0
    assert flow.policy.assignments == {name: roles[0] for name, roles in pools.items()}


def test_moving_has_to_pay():
    """A replica stays if its own stage will have work before it could merge there and back."""
    quick = {"text": 0.1, "stage1": 0.5, "stage2": 0.5, "decode": 0.01}
    flow = flow_of(4, 4, seconds=quick, switch=30.0).run(100)
    assert flow.measured(400)[1] <= 1


@pytest.mark.parametrize("replicas, moves", [(40, True), (28, True), (27, False)])
def test_a_surplus_replica_moves_however_short_its_wait(replicas, moves):
    """Of 100 replicas at 46 and 17 s per clip, stage 2 needs 27. With 28, the last one waits for less than a second."""
    path = ("stage1", "stage2", "decode")
    policy = Policy()
    for n in range(100 - replicas):
        policy.add_replica(f"a{n}", ("stage1", "stage2"))
    for n in range(400):
        policy.admit(f"i{n}", path=path)
    while (call := policy.next_dispatch()) is not None:
        assert call.stage == "stage1"
    for n in range(replicas - 1):
        policy.call_finished(f"i{n}", 46.0)
    for n in range(replicas):
        policy.add_replica(f"b{n}", ("stage2", "stage1"))
    started = []
    while (call := policy.next_dispatch()) is not None:
        started.append(call)
    # One clip has passed stage 2, so that both stages have been measured and its replica is idle again.
    first = next(call for call in started if call.stage == "stage2")
    policy.call_finished(first.item, 17.0)
    after = policy.next_dispatch()
    assert [call.moved for call in ([after] if after else [])] == ([True] if moves else [])


def waits_for_text() -> Policy:
    """Replica "d", which serves both stages, waits at stage 1 for "two", though "one" waits for stage 2."""
    policy = make_policy({"t": TEXT, "d": MOVABLE, "c": DECODE_POOL}, items=2)
    assert calls(policy) == [("i0", "text", "t")]
    policy.call_finished("i0", 2.0)
    assert calls(policy) == [("i0", "stage1", "d"), ("i1", "text", "t")]
    policy.call_finished("i0", 40.0)
    assert calls(policy) == []
    return policy


def test_a_shared_replica_waits_for_no_call_that_may_hang():
    policy = waits_for_text()
    assert policy.late_after("text") > 4 * 2.0
    policy.call_is_late("i1")
    policy.call_is_late("i1")
    assert calls(policy) == [("i0", "stage2", "d")]
    policy.call_finished("i0", 10.0)
    policy.call_finished("i1", 300.0)
    assert policy._late.total() == 0, "a call that came back is not late any more"
    policy.call_is_late("i1")
    assert policy._late.total() == 0, "nor is one that is not under way"
    policy.call_is_late("nobody")


@pytest.mark.parametrize("end", ["fails", "dies"])
def test_a_late_call_that_fails_is_waited_for_again(end):
    policy = waits_for_text()
    policy.call_is_late("i1")
    if end == "fails":
        policy.call_failed("i1")
    else:
        policy.remove_replica("t")
        policy.add_replica("t", TEXT)
    assert calls(policy) == [("i1", "text", "t")] and policy._late.total() == 0
