"""The driver over simulated replicas, one rare situation in each test."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest

from ltx_ray.driver.policy import Policy
from ltx_ray.driver.publisher import Publisher
from ltx_ray.pools.pool import StartFailed
from ltx_ray.pools.protocol import ReplicaLost
from ltx_ray.stages import FULL_PATH
from tests.support.datasets import rows_in
from tests.support.schedules import WatchedReplicas
from tests.support.simulated_runs import pools, rows, run


def test_a_gradual_drain_ends_when_the_decode_pool_is_gone(tmp_path):
    """--max-failed-fraction and --max-gpu-hours drain like this: nothing is killed, and no gang is started again."""

    class Watched(WatchedReplicas):
        def submit(self, replica, stage, item, inputs, timeout):
            if stage == "decode":
                self.driver._drain("enough")
            super().submit(replica, stage, item, inputs, timeout)

        def fault(self, stage, item):
            return "crash" if stage == "decode" and self.driver.policy.draining else super().fault(stage, item)

    driver, _ = run(tmp_path, rows(3), Watched)
    assert driver.run(driver.tracker.plan.open())


def test_the_preflight_goes_first(tmp_path):
    order = []

    class Watched(WatchedReplicas):
        def submit(self, replica, stage, item, inputs, timeout):
            order.append((stage, item.preflight))
            super().submit(replica, stage, item, inputs, timeout)

    driver, _ = run(tmp_path, rows(8), Watched, preflight={"prompt": "preflight"}, the_pools=pools(4))
    driver.run(driver.tracker.plan.open())
    assert [p for s, p in order if s == "stage1"].index(True) == 0


def test_a_row_like_the_preflight_is_not_lost(tmp_path):
    driver, store = run(
        tmp_path,
        [{"id": "z", "prompt": "other"}] * 1
        + [{"id": f"q{i}", "prompt": f"q {i}"} for i in range(6)]
        + [{"id": "a", "prompt": "preflight"}],
        preflight={"prompt": "preflight"},
        queue_depth=1,
    )
    driver.run(driver.tracker.plan.open())
    assert len(rows_in(store, "index")) == 8


def test_a_row_like_the_preflight_admitted_before_it(tmp_path):
    driver, store = run(tmp_path, [{"id": "a", "prompt": "preflight"}], preflight={"prompt": "preflight"})
    driver.run(driver.tracker.plan.open())
    assert len(rows_in(store, "index")) == 1


def test_gangs_that_die_idle_one_after_the_other_end_the_run(tmp_path):
    class Watched(WatchedReplicas):
        def _started(self, name, replica, fails):
            event = super()._started(name, replica, fails)
            if name.startswith("stage1"):
                replica.dead = True
            return event

        def wait(self, timeout):
            assert self.waits < 3000, "the run does not end"
            return super().wait(timeout)

    driver, _ = run(tmp_path, rows(2), Watched)
    with pytest.raises(StartFailed):
        driver.run(driver.tracker.plan.open())


def test_an_edited_row_that_fails_again_or_is_a_copy_has_one_failure(tmp_path):
    def failed(store):
        return rows_in(store, "failed")

    for what in ("one", "two"):
        driver, store = run(tmp_path, [{"id": "a", "prompt": f"{what} [[stage1:crash]]"}])
        driver.run(driver.tracker.plan.open())
    assert len(failed(store)) == 1


def test_an_edited_row_that_becomes_a_copy(tmp_path):
    driver, store = run(tmp_path, [{"id": "a", "prompt": "x [[stage1:crash]]"}, {"id": "b", "prompt": "fine"}])
    driver.run(driver.tracker.plan.open())
    driver, store = run(tmp_path, [{"id": "a", "prompt": "fine"}, {"id": "b", "prompt": "fine"}])
    driver.run(driver.tracker.plan.open())
    assert len(rows_in(store, "index")) == 2 and not rows_in(store, "failed")


def test_spare_leaves_a_server_for_each_stage():
    policy = Policy()
    for name, roles in {"t": ("text",), "a": ("stage1",), "b": ("stage2",), "d": ("decode",)}.items():
        policy.add_replica(name, roles)
    policy.admit("x")
    policy.next_dispatch()
    assert policy.spare_replicas() == []


def test_spare_names_each_once():
    policy = Policy()
    for name in "xy":
        policy.add_replica(name, FULL_PATH)
    policy.admit("i")
    policy.next_dispatch()
    spare = policy.spare_replicas()
    assert len(spare) == len(set(spare))


def test_clips_that_are_finished_are_indexed_when_a_pool_gives_up(tmp_path):
    class Slow(Publisher):
        def submit(self, write, then):
            super().submit(lambda: (time.sleep(0.3), write()), then)

    class Watched(WatchedReplicas):
        def submit(self, replica, stage, item, inputs, timeout):
            if item.request.id == "r5" and stage == "text":
                raise StartFailed("gave up")
            super().submit(replica, stage, item, inputs, timeout)

    driver, store = run(tmp_path, rows(9), Watched, publisher=Slow, queue_depth=1)
    with pytest.raises(StartFailed):
        driver.run(driver.tracker.plan.open())
    clips = store.list_names("clips", recursive=True)
    assert len(clips) >= 2
    assert len(rows_in(store, "index")) == len(clips)


def test_latents_that_were_lost_are_not_saved(tmp_path):
    """An item that is given up after max_restarts has lost its results, so there are no latents to save."""
    called = []

    class Watched(WatchedReplicas):
        def submit(self, replica, stage, item, inputs, timeout):
            called.append((stage, len(inputs)))
            if stage == "decode":
                inputs = [replace(payload, life=-1) for payload in inputs]  # as if their node had been lost
            super().submit(replica, stage, item, inputs, timeout)

    driver, _ = run(tmp_path, rows(1), Watched, max_attempts=1)
    driver.run(driver.tracker.plan.open())
    assert called and ("save_latents", 0) not in called


def test_a_later_row_of_the_same_preview_is_not_rendered_again(tmp_path):
    stages = Counter()

    class Watched(WatchedReplicas):
        def submit(self, replica, stage, item, inputs, timeout):
            stages[stage] += 1
            super().submit(replica, stage, item, inputs, timeout)

    copies = [{"id": name, "prompt": "x"} for name in "ab"]
    manifest = [copies[0], *rows(12), copies[1]]
    driver, store = run(tmp_path, manifest, Watched, latents_only=True, queue_depth=1)
    driver.run(driver.tracker.plan.open())
    assert stages["stage1"] == 13 and len(rows_in(store, "previews")) == 14


def test_first_calls_keep_to_the_memory_bound_too():
    """Until calls have been measured, the results of a large clip are assumed."""
    policy = Policy(max_bytes=60e6)
    for n in range(4):
        policy.add_replica(f"t{n}", ("text",))
        policy.admit(f"i{n}")
    made = 0
    while policy.next_dispatch() is not None:
        made += 1
    assert made == 2


@pytest.mark.parametrize("immediate", [True, False])
def test_what_has_passed_stage_1_when_a_run_is_told_to_stop_goes_on_from_there(tmp_path, immediate):
    asked: list[tuple[str, str]] = []

    class Watched(WatchedReplicas):
        stops = True

        def submit(self, replica, stage, item, inputs, timeout):
            asked.append((stage, item.item_id))
            if stage == "decode" and self.stops:
                self.driver.request_drain("asked") if immediate else self.driver._drain("enough")
            super().submit(replica, stage, item, inputs, timeout)

    class GoesOn(Watched):
        stops = False

    three = [replace(pool, replicas=3 if pool.name == "stage1" else 1) for pool in pools()]
    driver, store = run(tmp_path, rows(6), Watched, the_pools=three)
    assert driver.run(driver.tracker.plan.open())
    saved = {name.removesuffix(".safetensors") for name in store.list_names("latents", recursive=True)}
    assert saved and not rows_in(store, "failed") and len(rows_in(store, "index")) == 1
    asked.clear()
    driver, store = run(tmp_path, rows(6), GoesOn)
    assert not driver.run(driver.tracker.plan.open())
    assert len(rows_in(store, "index")) == 6
    assert {item for stage, item in asked if stage == "load_latents"} == saved
    # The simulated store has lost the latents of items whose id begins with a small digit.
    again = {item for stage, item in asked if stage == "stage1"} & saved
    assert again == {item for item in saved if item[0] < "8"}


def test_a_pool_without_a_place_does_not_end_a_run_that_others_can_carry(tmp_path):
    """Replicas of stage 1 that can switch serve stage 2 as well, so the pool of stage 2 may wait for a place."""

    class Placeless(WatchedReplicas):
        def _started(self, name, replica, fails):
            return [] if name.startswith("stage2") else super()._started(name, replica, fails)

        def placing(self):
            first = self._replicas.get("stage1-0")
            return {"stage2-0": 9999.0} if first is not None and first.ready else {}

    text, stage1, stage2, decode = pools()
    switching = [text, replace(stage1, roles=("stage1", "stage2")), replace(stage2, roles=("stage2", "stage1")), decode]
    driver, store = run(tmp_path, rows(3), Placeless, the_pools=switching, start_timeout=10.0)
    assert not driver.run(driver.tracker.plan.open())
    assert len(rows_in(store, "index")) == 3


@pytest.mark.parametrize("node_lost, attempts", [(True, 1), (False, 2)])
def test_a_lost_node_costs_its_rows_no_attempt(tmp_path, node_lost, attempts):
    """A rank that dies costs one: its row may have killed it."""

    class LosesOne(WatchedReplicas):
        lost = False

        def wait(self, timeout):
            events = super().wait(timeout)
            for at, event in enumerate(events):
                item = next(iter(self.driver.policy.items_of(event.replica)), None)
                if item and not self.lost and self.driver.policy.stage_of(item) == "stage1":
                    self.lost = True
                    self.kill(event.replica)
                    events[at] = ReplicaLost(event.replica, "lost by the test", served=True, node_lost=node_lost)
            return events

    driver, store = run(tmp_path, rows(1), LosesOne)
    assert not driver.run(driver.tracker.plan.open())
    (row,) = rows_in(store, "index")
    assert row["attempts"] == attempts
