"""The transformer's configuration: defaults, and files of another architecture."""

from __future__ import annotations

import math

import pytest

from ltx_ray.checkpoints.safetensors import read_header
from ltx_ray.checkpoints.transformer_config import TransformerConfig
from tests.support.checkpoint_files import RELEASED, REQUIRED


@pytest.fixture
def toy_config(toy) -> dict:
    return read_header(toy["checkpoint_path"]).config["transformer"]


@pytest.mark.parametrize(
    "field, value", [("apply_gated_attention", None), ("cross_attention_adaln", False), ("rope_type", "interleaved")]
)
def test_another_architecture_under_the_same_version_is_refused(toy_config, field, value):
    config = {**toy_config, field: value}
    if value is None:
        del config[field]
    with pytest.raises(ValueError, match=rf"x: config.transformer.{field} is .*; legal: .* \(LTX-2.3\)"):
        TransformerConfig.from_metadata(config, "x")


@pytest.mark.parametrize(
    "field, value, legal",
    [
        ("num_layers", "many", "an integer"),
        ("num_layers", math.inf, "an integer"),
        ("num_layers", 0, "a positive integer"),
        ("attention_head_dim", 63, "an even number, because channels rotate in pairs"),
        ("audio_attention_head_dim", 7, "an even number, because channels rotate in pairs"),
        ("in_channels", None, "an integer"),
        ("norm_eps", [], "a number"),
        ("norm_eps", math.nan, "a positive number"),
        ("positional_embedding_theta", 0.0, "a positive number"),
        ("out_channels", 64, "128, the channels of a token of the latents"),
        ("audio_in_channels", 256, "128, the channels of a token of the latents"),
        ("positional_embedding_max_pos", 20, "a list of numbers"),
        ("positional_embedding_max_pos", [20, 2048], "3 positive numbers, one for each axis"),
        ("positional_embedding_max_pos", [20, 2048, "wide"], "3 positive numbers, one for each axis"),
        ("audio_positional_embedding_max_pos", [0], "1 positive numbers, one for each axis"),
        ("audio_num_attention_heads", 2, "32, as many as the video stream has"),
        ("connector_num_learnable_registers", 96, "a divisor of 1024, the tokens of a padded prompt"),
        ("connector_num_learnable_registers", 2048, "a divisor of 1024, the tokens of a padded prompt"),
        ("connector_num_learnable_registers", None, "an integer"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(field, value, legal):
    with pytest.raises(ValueError) as caught:
        TransformerConfig.from_metadata({**REQUIRED, field: value}, "x")
    assert str(caught.value) == f"x: config.transformer.{field} is {value!r}; legal: {legal}"


def test_a_configuration_that_is_not_an_object_is_refused():
    with pytest.raises(ValueError, match=r"x: config.transformer is \[\]; legal: a JSON object"):
        TransformerConfig.from_metadata([], "x")


def test_absent_fields_have_the_released_models_values():
    assert (RELEASED.num_layers, RELEASED.video.dim, RELEASED.audio.dim) == (48, 4096, 2048)
    assert (RELEASED.video.context_dim, RELEASED.audio.context_dim) == (4096, 2048)
