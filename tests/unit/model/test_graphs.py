"""How many graphs and shapes are kept, without a GPU. tests/gpu compares what graphs compute."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ltx_ray.model import graphs
from ltx_ray.model.graphs import GraphedTransformer
from ltx_ray.model.rope import RopeTable
from ltx_ray.model.transformer import Modality, Perturbation, Prefix
from ltx_ray.parallel.collectives import SINGLE_RANK
from ltx_ray.records import AV


class Dit:
    """Stands for a FusedTransformer without modulations. A pass gives the latents back."""

    ropes = None
    model = SimpleNamespace(tp=SINGLE_RANK)

    def tables(self, inputs: AV[Modality]) -> AV[Modality]:
        return inputs

    def run(self, inputs: AV[Modality], tables, perturbation: Perturbation, group, prefix) -> AV[torch.Tensor]:
        if prefix is not None and prefix.streams is None:
            prefix.streams = inputs.map(lambda modality: 2 * modality.latent)
        return inputs.map(lambda modality: modality.latent)


@pytest.fixture
def graphed(monkeypatch) -> GraphedTransformer:
    """With captures that record the order of their calls and compute nothing."""
    made = GraphedTransformer(Dit())
    made.captured = []

    def capture(shape, call):
        made.captured.append(call)
        results = shape.inputs.map(lambda modality: modality.latent)
        if call.prefix is None or not call.begins:
            return graphs._Graph(SimpleNamespace(replay=lambda: None), results, None)
        begun = results.map(torch.empty_like)
        replay = lambda: begun.map(lambda place, x: torch.mul(x, 2, out=place), results)  # noqa: E731
        return graphs._Graph(SimpleNamespace(replay=replay), results, begun)

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
    assert [sum(call.perturbation == perturbation for call in graphed.captured) for perturbation in usual] == [1, 1]


def test_what_was_forgotten_is_captured_again(graphed, monkeypatch):
    monkeypatch.setattr(graphs, "_MAX_GRAPHS", 1)
    given = inputs(3)
    for number in (0, 0, 1, 1, 0, 1):
        graphed(given, sweep(number))
    assert [call.perturbation for call in graphed.captured] == [sweep(0), sweep(1), sweep(0), sweep(1)]


def test_a_prefix_goes_from_one_graph_to_another(graphed):
    """The pass that takes it over reads a copy in fixed memory, as its other inputs."""
    for number in range(4):
        given, prefix = inputs(3), Prefix(2)
        graphed(given, prefix=prefix)
        begun = prefix.streams
        assert all(torch.equal(x, 2 * m.latent) for x, m in zip(begun, given, strict=True))
        graphed(given, sweep(2), prefix=prefix)
        if number:
            places = next(shape.begun for shape in graphed._shapes.values() if shape.begun is not None)
            assert all(torch.equal(a, b) and a is not b for a, b in zip(places, begun, strict=True))
    first, second = graphed.captured
    assert (first.prefix, first.begins) == (2, True) and (second.prefix, second.begins) == (2, False)
    # Another first block is another graph.
    for _ in range(2):
        graphed(inputs(3), prefix=Prefix(3))
    assert len(graphed.captured) == 3
