"""Nodes that join a run's cluster: what it takes of them, and what it leaves."""

from __future__ import annotations

from ltx_ray.config import EngineSpec, ModelFiles, Numerics, PoolSpec
from ltx_ray.driver.growth import Growth
from ltx_ray.placement.output_pools import Node
from ltx_ray.pools.pool import Pool
from ltx_ray.stages import DIFFUSION_STAGES, OUTPUT_STAGES

SPEC = EngineSpec("m:E", ModelFiles("c", "g", "u"), Numerics(), "out")


class Run:
    """Pools whose replicas all have places, and nodes that have joined."""

    def __init__(self, stage1=11, stage2=5, ranks=1, gpus=0.6, max_gpus=None):
        roles = DIFFUSION_STAGES
        specs = [
            PoolSpec("text", ("text",), 1, 1, SPEC, most=2),
            PoolSpec("stage1", roles, stage1, ranks, SPEC, gpus_per_rank=gpus),
            PoolSpec("stage2", roles[::-1], stage2, ranks, SPEC, gpus_per_rank=gpus),
            PoolSpec("decode", OUTPUT_STAGES, 3, 1, SPEC, 6.0, 0.3, 4),
        ]
        self.pools = [Pool(spec, 4) for spec in specs]
        self.nodes, self.placing, self.now = [], {}, 0.0
        self.growth = Growth(self.pools, lambda: self.nodes, max_gpus)
        self.place()

    def place(self):
        for pool in self.pools:
            pool.missing()

    def grow(self, *nodes: Node) -> dict[str, int]:
        self.nodes, self.now = list(nodes), self.now + 10.0
        return self.growth.grow(lambda: self.placing, self.now)

    def dit(self) -> int:
        return self.pools[1].spec.replicas + self.pools[2].spec.replicas

    def most(self) -> dict[str, int]:
        return {pool.spec.name: pool.spec.most for pool in self.pools if pool.spec.most is not None}


def test_a_node_that_joins_is_filled_and_text_and_decode_may_grow_with_it():
    run = Run()
    assert run.grow() == {}
    assert run.grow(Node(64.0, 8.0)) == {"stage1": 17, "stage2": 7}, "in proportion to the stages' seconds"
    assert run.most() == {"text": 3, "decode": 6}
    run.place()
    assert run.grow(Node(56.0, 0.0)) == {}, "its GPUs are taken"


def test_no_node_is_taken_while_a_replica_is_missing_or_has_no_place():
    run = Run()
    run.pools[1].replicas.popitem()
    assert run.grow(Node(64.0, 8.0)) == {}, "the one that is missing goes there"
    run.place()
    run.placing = {"stage1-11": 3.0}
    assert run.grow(Node(64.0, 8.0)) == {}
    run.placing = {}
    assert run.grow(Node(64.0, 8.0)) == {"stage1": 17, "stage2": 7}


def test_a_gang_never_spans_nodes_and_each_rank_has_a_cpu():
    run = Run(stage1=2, stage2=1, ranks=4)
    assert run.grow(Node(64.0, 3.0), Node(64.0, 3.0), Node(3.0, 8.0)) == {}
    assert run.grow(Node(64.0, 8.0)) == {"stage1": 3, "stage2": 2}


def test_max_gpus_counts_the_cards_of_all_pools():
    run = Run(max_gpus=18)
    run.grow(Node(64.0, 8.0))
    assert run.dit() == 18
    run = Run(stage1=1, stage2=1, gpus=1.0, max_gpus=4)
    run.grow(Node(64.0, 8.0))
    assert run.dit() == 3, "one more, beside the card of text and decode"
    assert run.most() == {"text": 2, "decode": 4}, "a card of their own holds no more"


def test_the_cluster_is_looked_at_every_ten_seconds():
    run = Run()
    assert run.grow() == {}
    run.now -= 9.0
    assert run.grow(Node(64.0, 8.0)) == {}
