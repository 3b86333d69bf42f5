"""The layout that is chosen where the user names none."""

from __future__ import annotations

import pytest

from ltx_ray.checkpoints.transformer_config import TransformerConfig
from ltx_ray.placement.layouts import Cards, choose_layout
from ltx_ray.placement.sizing import ParallelConfig
from ltx_ray.toy.config import ToyShape, checkpoint_config

RELEASED = TransformerConfig.from_metadata(
    checkpoint_config(ToyShape(layers=48, heads=32, head_dim=128, audio_head_dim=64))["transformer"]
)


def chosen(model: str, count: int, fewest: int = 1, distilled: bool = False, **asked: object) -> ParallelConfig:
    """On `count` cards of which `fewest` hold the model together."""
    parallel = ParallelConfig(**asked)
    return choose_layout(parallel, Cards(model, count), RELEASED, distilled, lambda tp: tp >= fewest)


@pytest.mark.parametrize(
    ("count", "fewest", "tp"),
    [(1, 1, 1), (8, 1, 1), (8, 2, 2), (8, 3, 4), (8, 5, 8), (2, 2, 2), (1, 2, 1), (3, 4, 1), (8, 9, 1)],
)
def test_throughput_takes_the_fewest_cards_that_hold_the_model(count, fewest, tp):
    assert chosen("L40S", count, fewest) == ParallelConfig(tp=tp)


@pytest.mark.parametrize(
    ("model", "count", "fewest", "flags"),
    [
        ("H200", 1, 1, ""),
        ("H200", 2, 1, "--stage1-sequence-parallel 2 --sequence-parallel 2"),
        ("H200", 3, 1, "--stage1-sequence-parallel 2 --sequence-parallel 2"),
        ("H200", 8, 1, "--stage1-sequence-parallel 8 --sequence-parallel 8"),
        # Over PCIe two cards share the passes sooner than the tokens.
        ("L40S", 2, 1, "--guidance-parallel 2 --sequence-parallel 2"),
        ("L40S", 4, 2, "--tp 2 --guidance-parallel 2 --sequence-parallel 2"),
        ("A10G", 2, 1, "--stage1-sequence-parallel 2 --sequence-parallel 2"),
        ("", 4, 1, "--stage1-sequence-parallel 4 --sequence-parallel 4"),
        ("A10G", 4, 4, "--tp 4"),
    ],
)
def test_latency_takes_the_cards_of_a_node_for_one_gang(model, count, fewest, flags):
    found = chosen(model, count, fewest, optimize="latency")
    assert found.flags == flags
    assert (found.stage1, found.stage2) == (1, 0)
    assert found.alternating_ranks == found.ranks[0] == found.ranks[1]


def test_the_distilled_pipeline_has_no_passes_to_share():
    assert chosen("L40S", 2, distilled=True, optimize="latency").guidance_parallel == 1


def test_without_stage_2_nothing_is_divided_there():
    found = chosen("H200", 2, optimize="latency", with_stage2=False)
    assert (found.stage1_sequence_parallel, found.sequence_parallel) == (2, 1)


@pytest.mark.parametrize("asked", [{"tp": 4}, {"stage2_tp": 1}, {"sequence_parallel": 2}, {"guidance_parallel": 2}])
def test_a_layout_that_is_named_is_kept(asked):
    assert chosen("H200", 8, 2, **asked) == ParallelConfig(**asked)


@pytest.mark.parametrize("asked", [{"tp": 2}, {"stage1": 2}, {"stage2": 0}, {"max_replicas": 3}])
def test_latency_excludes_ranks_and_replicas_of_ones_own(asked):
    with pytest.raises(ValueError, match="--optimize: 'latency' with ranks or replicas of your own, legal: one of the"):
        ParallelConfig(optimize="latency", **asked).check(distilled=False)
