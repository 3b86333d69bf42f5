"""Pools of text and decode have as many replicas as their calls and their queues need."""

from __future__ import annotations

from dataclasses import replace

from ltx_ray.config import EngineSpec, ModelFiles, Numerics, PoolSpec
from ltx_ray.driver.policy import Policy
from ltx_ray.driver.pool_sizer import PoolSizer
from ltx_ray.driver.waits import Waits
from ltx_ray.pools.pool import Pool
from ltx_ray.stages import OUTPUT_STAGES

SPEC = EngineSpec("m:E", ModelFiles("c", "g", "u"), Numerics(), "out")
BOTH = ("stage1", "stage2")


class Run:
    """A policy whose stages take `seconds`, with pools of these sizes, and a clock that is set by hand."""

    def __init__(self, seconds, dit=62, decode=2, most=50, split=None):
        self.policy, self.waits, self.now = Policy(), Waits(), 0.0
        self.sizer = PoolSizer(self.policy, self.waits)
        pools = [PoolSpec("text", ("text",), 1, 1, SPEC, most=8)]
        if split is None:
            pools.append(PoolSpec("stage1", BOTH, dit, 1, SPEC))
        else:
            pools += [PoolSpec(name, (name,), count, 1, SPEC) for name, count in zip(BOTH, split)]
        pools.append(PoolSpec("decode", OUTPUT_STAGES, decode, 1, SPEC, most=most))
        self.pools = [Pool(spec, 4, dict.fromkeys(map(str, range(spec.replicas)), True)) for spec in pools]
        for stage, mean in seconds.items():
            self.policy._seconds[stage].add(mean)

    def look(self, *, waited=0.0):
        """Ten seconds later, of which stage 2 has waited a part for decode; the sizes are taken over."""
        self.now += 10.0
        self.waits.there["stage2"] += 100.0
        self.waits.waited["stage2", "decode"] += 100.0 * waited
        sizes = self.sizer.sizes(self.pools, self.now)
        for pool in self.pools:
            if pool.spec.name in sizes:
                pool.spec = replace(pool.spec, replicas=sizes[pool.spec.name])
                pool.replicas = dict.fromkeys(map(str, range(pool.spec.replicas)), True)
        return sizes


HQ = {"text": 0.1, "stage1": 40.0, "stage2": 19.1, "decode": 6.3}


def test_a_pool_keeps_up_with_what_the_dit_can_make():
    assert Run(HQ).look() == {"decode": 9}  # 62 / 59.1 clips a second, each of 6.3 s, and 30 % more
    assert Run({**HQ, "decode": 1.2}).look() == {}
    assert Run(HQ, split=(42, 20)).look() == {"decode": 9}
    assert Run(HQ, split=(42, 5)).look() == {"decode": 3}  # stage 2 bounds the run
    assert Run({**HQ, "text": 2.0}, dit=1000, decode=200, most=500).look() == {"text": 8}, "the most that there may be"


def test_nothing_is_decided_before_the_dit_and_the_stage_have_been_measured():
    for missing in ("stage1", "stage2", "decode"):
        run = Run({stage: mean for stage, mean in HQ.items() if stage != missing})
        assert "decode" not in run.look()


def test_a_pool_that_others_wait_for_grows_although_its_calls_tell_otherwise():
    run = Run({**HQ, "decode": 1.5}, decode=4)
    assert run.look(waited=0.5) == {}, "once may be by chance"
    assert run.look(waited=0.5) == {"decode": 5}
    assert run.look() == {}
    assert run.look(waited=0.01) == run.look(waited=0.01) == {}


def test_a_pool_whose_replicas_are_still_starting_does_not_grow_on():
    run = Run({**HQ, "decode": 1.5}, decode=4)
    run.pools[-1].replicas["0"] = False
    assert run.look(waited=0.5) == run.look(waited=0.5) == run.look(waited=0.5) == {}


def test_a_pool_shrinks_after_it_has_been_far_too_large_for_a_while():
    run = Run({**HQ, "decode": 1.0}, decode=20)
    looks = [run.look() for _ in range(20)]
    assert (looks[:18] == [{}] * 18 and looks[18:] == [{"decode": 2}, {}]) or {"decode": 2} in looks
    assert run.pools[-1].spec.replicas == 2
    near = Run({**HQ, "decode": 1.0}, decode=5)
    assert [near.look() for _ in range(40)] == [{}] * 40, "a few more than are needed do no harm"


def test_looks_are_ten_seconds_apart():
    run = Run(HQ)
    run.look()
    run.policy._seconds["decode"].value = 12.0
    assert run.sizer.sizes(run.pools, run.now + 9.0) == {}
