"""With noise that is drawn on GPUs, a run uses those of one model."""

from __future__ import annotations

import pytest

from ltx_ray.placement.gpu_models import GpuNode, choose_nodes, model_of


def node(number: int, model: str, gpus: float = 8.0) -> GpuNode:
    return GpuNode(f"id{number}", f"10.0.0.{number}", model, gpus, 64.0)


MIXED = [node(1, "A100"), node(2, "H100"), node(3, "H100"), node(4, "")]


def test_the_model_with_the_most_free_cards_is_the_runs_and_the_others_are_named():
    choice = choose_nodes(MIXED, None, one_model=True)
    assert [node.id for node in choice.nodes] == ["id2", "id3", "id4"], "nobody knows what the fourth has"
    assert choice.told() == "the GPUs of this run are H100; left alone: 10.0.0.1 (A100)"
    busy = [node(1, "A100"), node(2, "H100", 1.0)]
    assert [node.model for node in choose_nodes(busy, None, one_model=True).nodes] == ["A100"]


def test_the_user_may_name_another():
    choice = choose_nodes(MIXED, "A100", one_model=True)
    assert [node.id for node in choice.nodes] == ["id1", "id4"]
    assert [node.id for node in choose_nodes(MIXED, "H100", one_model=False).others] == ["id1"]


def test_noise_of_a_cpu_allows_all():
    choice = choose_nodes(MIXED, None, one_model=False)
    assert len(choice.nodes) == 4 and choice.told() is None


def test_a_model_that_no_node_has_is_refused():
    with pytest.raises(ValueError, match=r"--gpu-model: 'B200', legal: A100, H100 \(the GPUs of this cluster\)"):
        choose_nodes(MIXED, "B200", one_model=True)
    assert len(choose_nodes([node(4, "")], "B200", one_model=True).nodes) == 1, "Ray does not know this one"


def test_the_model_is_read_from_the_resources():
    assert model_of({"CPU": 8.0, "GPU": 1.0, "accelerator_type:H100": 1.0}) == "H100" and model_of({"CPU": 1.0}) == ""
