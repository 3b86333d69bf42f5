"""How many graphs and shapes are kept, without a GPU. tests/gpu compares what graphs compute."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ltx_ray.model import graphs
from ltx_ray.model.graphs import GraphedTransformer
from ltx_ray.model.rope import RopeTable
from ltx_ray.model.transformer import Modality, Perturbation
from ltx_ray.records import AV


class Dit:
    """Stands for a FusedTransformer without modulations. A pass gives the latents back."""

    ropes = None

    def tables(self, inputs: AV[Modality]) -> AV[Modality]:
        return inputs

    def run(self, inputs: AV[Modality], tables, perturbation: Perturbation) -> AV[torch.Tensor]:
        return inputs.map(lambda modality: modality.latent)


@pytest.fixture
def graphed(monkeypatch) -> GraphedTransformer:
    """With captures that record the order of their calls and compute nothing."""
    made = GraphedTransformer(Dit())
    made.captured = []

    def capture(shape, call):
        made.captured.append(call)
        results = shape.inputs.map(lambda modality: modality.latent)
        return graphs._Graph(SimpleNamespace(replay=lambda: None), results)

    monkeypatch.setattr(made, "_capture", capture)
    return made


def inputs(tokens: int) -> AV[Modality]:
    def modality() -> Modality:
        rope = RopeTable(torch.ones(tokens, 2), torch.zeros(tokens, 2))
        return Modality(torch.randn(1, tokens, 4), torch.ones(1), torch.ones(1, 1), torch.ones(1, 2, 4), rope, rope)

    return AV(modality(), modality())


def sweep(number: int) -> Perturbation:
    return Perturbation(values_only=AV(frozenset({number}), frozenset()))


def kept(graphed: GraphedTransformer) -> int:
    return sum(len(shape.graphs) for shape in graphed._shapes.values())


def test_a_sweep_over_stg_blocks_keeps_a_bounded_number_of_graphs(graphed):
    given = inputs(3)
    for number in range(200):
        for _ in range(2):
            found = graphed(given, sweep(number))
            assert all(torch.equal(x, m.latent) for x, m in zip(found, given, strict=True))
    assert len(graphed.captured) == 200 and kept(graphed) == graphs._MAX_GRAPHS
    assert len(graphed._seen) <= graphs._MAX_SEEN


def test_many_sizes_keep_a_bounded_number_of_shapes(graphed):
    for tokens in range(1, 500):
        for _ in range(2):
            graphed(inputs(tokens), sweep(0))
    assert len(graphed._shapes) == graphs._MAX_SHAPES and len(graphed._seen) <= graphs._MAX_SEEN


def test_graphs_that_are_in_use_stay(graphed):
    """The passes of a guided call, between a sweep's, are captured once."""
    given, usual = inputs(3), [Perturbation(), Perturbation(isolated=True)]
    for number in range(2 * graphs._MAX_GRAPHS):
        for perturbation in (*usual, sweep(number)):
            graphed(given, perturbation)
            graphed(given, perturbation)
    assert [sum(call[0] == perturbation for call in graphed.captured) for perturbation in usual] == [1, 1]


def test_what_was_forgotten_is_captured_again(graphed, monkeypatch):
    monkeypatch.setattr(graphs, "_MAX_GRAPHS", 1)
    given = inputs(3)
    for number in (0, 0, 1, 1, 0, 1):
        graphed(given, sweep(number))
    assert [call[0] for call in graphed.captured] == [sweep(0), sweep(1), sweep(0), sweep(1)]
