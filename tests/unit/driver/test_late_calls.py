"""Calls that take much longer than such calls do: when they are late, and that no replica waits for them."""

from __future__ import annotations

from types import SimpleNamespace

from ltx_ray.config import PoolSpec
from ltx_ray.driver.calls_under_way import CallsUnderWay
from ltx_ray.stages import OUTPUT_STAGES
from tests.support.schedules import SPEC, WatchedReplicas
from tests.support.simulated_runs import rows, run


def test_a_call_is_late_once_and_never_when_it_has_ended():
    clock = SimpleNamespace(now=0.0)
    calls = CallsUnderWay(lambda: clock.now)
    pool = SimpleNamespace(gpus_of_replica=0)
    calls.begin("slow", 10.0)
    calls.begin("quick", 5.0)
    clock.now = 4.0
    assert calls.late() == []
    calls.lose(SimpleNamespace(item=SimpleNamespace(item_id="quick"), gpu_seconds=0.0), pool)
    clock.now = 9.0
    assert calls.late() == []
    calls.begin("quick", 100.0)  # again
    clock.now = 11.0
    assert calls.late() == ["slow"]
    clock.now = 50.0
    assert calls.late() == []


class HangsInText(WatchedReplicas):
    """The text call of r1 hangs until its deadline. Whoever waits for events gets an answer every second."""

    def fault(self, stage, item):
        return "hang" if stage == "text" and item.request.id == "r1" and not self.hung else None

    hung = 0.0

    def submit(self, replica, stage, item, inputs, timeout):
        super().submit(replica, stage, item, inputs, timeout)
        if stage == "text" and item.request.id == "r1":
            self.hung = self.hung or self.now + timeout
        if stage == "stage2" and item.request.id == "r0":
            self.refined = self.now

    def wait(self, timeout):
        if self._events and self._events[0][0] > self.now + 1.0:
            self.now += 1.0
            return []
        return super().wait(timeout)


def test_a_replica_of_both_stages_does_not_wait_for_a_text_call_that_hangs(tmp_path):
    both = PoolSpec("diffusion", ("stage1", "stage2"), 1, 1, SPEC)
    pools = [PoolSpec("text", ("text",), 1, 1, SPEC), both, PoolSpec("decode", OUTPUT_STAGES, 1, 1, SPEC)]
    driver, _ = run(tmp_path, rows(2), HangsInText, the_pools=pools, call_timeout=3000.0)
    driver._calls = CallsUnderWay(lambda: driver._replicas.now)
    assert not driver.run(driver.tracker.plan.open())
    assert driver.counts["rendered"] == 2
    assert driver._replicas.refined < 200.0 < 3000.0 < driver._replicas.hung
