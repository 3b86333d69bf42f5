"""Our transformer against diffusers' on the same weights, in float32: relative L2 at most 1e-5."""

from __future__ import annotations

import pytest
import torch

from ltx_ray.model.transformer import NO_PERTURBATION, Perturbation
from ltx_ray.records import AV
from ltx_ray.toy import ToyShape, make_toy_model
from tests.support.transformers import Inputs, load_diffusers, load_ours, relative

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["default", "wide"])
def pair(request, toy, tmp_path_factory):
    if request.param == "default":
        path = toy["checkpoint_path"]
    else:
        shape = ToyShape(layers=2, heads=8, head_dim=24, audio_head_dim=12)
        path = make_toy_model(tmp_path_factory.mktemp("wide"), seed=5, shape=shape)["checkpoint_path"]
    return load_ours(path), load_diffusers(path)


def check(found: AV[torch.Tensor], expected: AV[torch.Tensor]) -> None:
    for name, ours, theirs in zip(("video", "audio"), found, expected, strict=True):
        assert relative(ours, theirs) <= TOLERANCE, name


@pytest.mark.parametrize("sigma", [1.0, 0.7, 0.0011])
def test_plain(pair, sigma):
    ours, theirs = pair
    inputs = Inputs.random(ours, seed=1, sigma=sigma)
    check(inputs.ours(ours, NO_PERTURBATION), inputs.theirs(theirs, use_cross_timestep=True))


def test_streams_at_different_levels(pair):
    """The gate of cross-attention follows the other stream's level. Its scale and shift are made constant here."""
    ours, theirs = pair
    inputs = Inputs.random(ours, seed=2)
    inputs = Inputs(inputs.latents, inputs.contexts, AV(0.8, 0.3))
    found = inputs.ours(ours, NO_PERTURBATION)
    crossed = inputs.theirs(theirs, use_cross_timestep=True)
    own = inputs.theirs(theirs, use_cross_timestep=False)
    # v1.2.0 takes scale and shift from the stream itself and the gate from the other, which is neither of the two.
    for name in ("video", "audio"):
        assert relative(getattr(found, name), getattr(crossed, name)) > 1e-4
        assert relative(getattr(found, name), getattr(own, name)) > 1e-4
    with _constant(theirs, "scale_shift"), _constant_ours(ours, "scale_shift"):
        check(inputs.ours(ours, NO_PERTURBATION), inputs.theirs(theirs, use_cross_timestep=True))


def test_per_token_timesteps(pair):
    """diffusers has no rule like that of v1.2.0 for the gate, so the gate is made constant in both."""
    ours, theirs = pair
    inputs = Inputs.random(ours, seed=3).with_mask(seed=4)
    with _constant(theirs, "gate"), _constant_ours(ours, "gate"):
        check(inputs.ours(ours, NO_PERTURBATION), inputs.theirs(theirs, use_cross_timestep=False))


def test_per_token_timesteps_isolated(pair):
    ours, theirs = pair
    inputs = Inputs.random(ours, seed=5).with_mask(seed=6)
    found = inputs.ours(ours, Perturbation(isolated=True))
    check(found, inputs.theirs(theirs, use_cross_timestep=True, isolate_modalities=True))


def test_one_timestep_for_all_tokens_is_the_per_token_result(pair):
    ours, _ = pair
    inputs = Inputs.random(ours, seed=7)
    ones = Inputs(inputs.latents, inputs.contexts, inputs.sigma, torch.ones(1, inputs.latents.video.shape[1]))
    check(inputs.ours(ours, NO_PERTURBATION), ones.ours(ours, NO_PERTURBATION))


def test_stg(pair):
    ours, theirs = pair
    inputs = Inputs.random(ours, seed=8)
    found = inputs.ours(ours, Perturbation(values_only=AV(frozenset({1}), frozenset({1}))))
    check(found, inputs.theirs(theirs, use_cross_timestep=True, spatio_temporal_guidance_blocks=[1]))
    assert relative(found.video, inputs.ours(ours, NO_PERTURBATION).video) > 1e-4


def test_isolated(pair):
    ours, theirs = pair
    inputs = Inputs.random(ours, seed=9)
    found = inputs.ours(ours, Perturbation(isolated=True))
    check(found, inputs.theirs(theirs, use_cross_timestep=True, isolate_modalities=True))
    assert relative(found.video, inputs.ours(ours, NO_PERTURBATION).video) > 1e-4


class _constant:
    """Remove the timestep from diffusers' modulation of cross-attention, so that only its bias is left."""

    names = {
        "gate": ("av_cross_attn_video_a2v_gate", "av_cross_attn_audio_v2a_gate"),
        "scale_shift": ("av_cross_attn_video_scale_shift", "av_cross_attn_audio_scale_shift"),
    }

    def __init__(self, model, what: str):
        self.linears = [getattr(model, name).linear for name in self.names[what]]

    def __enter__(self):
        self.weights = [linear.weight.data.clone() for linear in self.linears]
        for linear in self.linears:
            linear.weight.data.zero_()

    def __exit__(self, *error):
        for linear, weight in zip(self.linears, self.weights, strict=True):
            linear.weight.data.copy_(weight)


class _constant_ours(_constant):
    names = {
        "gate": ("av_ca_a2v_gate_adaln_single", "av_ca_v2a_gate_adaln_single"),
        "scale_shift": ("av_ca_video_scale_shift_adaln_single", "av_ca_audio_scale_shift_adaln_single"),
    }
