"""Final latents against those of the reference v1.2.0, recorded in float32 on the toy model.

Other tests break one thing each, which must show in the distance.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from ltx_ray.config import LoraSpec, ModelFiles
from ltx_ray.sampling import noise, res2s
from ltx_ray.toy import ToyShape, make_toy_model
from tests.support.pipeline import GOLDENS, ToyPipeline, toy_pipeline
from tests.support.transformers import relative

RECORDED = {path.stem: path for path in sorted(GOLDENS.glob("*.safetensors"))}
#: Recorded on a toy model of another shape, which is in its metadata.
WIDTHS = GOLDENS / "widths" / "base.safetensors"
TOLERANCE = 1e-4
#: Relative L2 of the reference's bf16 against its own float32, in stage 1 and in stage 2.
BF16_FLOOR = {"stage_1": 5e-2, "stage_2": 1e-2}


def load(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    with safe_open(RECORDED[name], "pt") as file:
        return json.loads(file.metadata()["request"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def distance(name: str, compiled: str = "off", **changes) -> float:
    """The largest relative L2 over the four latents of a golden, with `changes` made to its request."""
    request, expected = load(name)
    found = toy_pipeline(request["pipeline"] == "distilled", compiled=compiled).latents({**request, **changes})
    return max(relative(found[key], value) for key, value in expected.items())


def test_every_pipeline_has_a_golden():
    assert {load(name)[0]["pipeline"] for name in RECORDED} == {"hq", "base", "distilled"}


@pytest.mark.parametrize("compiled", ["off", "fused"])
@pytest.mark.parametrize("name", RECORDED)
def test_latents_are_the_references(name, compiled):
    """With the plain path, which rounds where the reference does, and the fused one, which batches guidance."""
    assert distance(name, compiled) <= TOLERANCE


def test_other_widths_and_a_users_lora(tmp_path):
    """A model whose widths RoPE does not fill evenly, with few heads, a user LoRA and the distilled one."""
    with safe_open(WIDTHS, "pt") as file:
        metadata, expected = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    shape = ToyShape(**json.loads(metadata["shape"]))
    files, others = (make_toy_model(tmp_path / str(seed), seed=seed, shape=shape) for seed in (1, 2))
    pipeline = ToyPipeline(ModelFiles(**files, loras=(LoraSpec("style", others["distilled_lora"]),)))
    request = json.loads(metadata["request"])
    found = pipeline.latents(request)
    assert max(relative(found[key], value) for key, value in expected.items()) <= TOLERANCE
    other = pipeline.latents({**request, "loras": [{"name": "style", "strength": 0.71}]})
    assert max(relative(other[key], value) for key, value in expected.items()) > TOLERANCE


@pytest.mark.parametrize("name", ["hq", "hq_image", "base_keyframes", "distilled_keyframes"])
def test_bfloat16_stays_within_its_noise_floor(name):
    request, expected = load(name)
    found = toy_pipeline(request["pipeline"] == "distilled", "bfloat16").latents(request)
    for key, value in expected.items():
        floor = BF16_FLOOR[key.partition(".")[0]]
        assert found[key].dtype == torch.bfloat16
        assert floor / 100 < relative(found[key].float(), value) <= floor * 1.5, key


def test_fp8_is_near_whatever_was_merged_before():
    """Two stages with a switch of LoRAs between them give the same bits twice, off by the rounding of fp8."""
    request, expected = load("hq")
    pipeline = toy_pipeline(dtype="bfloat16", compiled="fused", precision="fp8")
    found, again = (pipeline.latents(request) for _ in range(2))
    for key, value in expected.items():
        assert torch.equal(found[key], again[key])
        assert 1e-2 < relative(found[key].float(), value) <= 0.5, key


@pytest.mark.parametrize(
    "golden, changes",
    [
        ("hq", {"video_cfg_scale": 3.1}),
        ("hq", {"audio_cfg_scale": 6.9}),
        ("hq", {"video_modality_scale": 2.9}),
        ("hq", {"video_rescale_scale": 0.5}),
        ("hq", {"audio_rescale_scale": 0.9}),
        ("hq", {"video_stg_scale": 0.1, "video_stg_blocks": [1]}),
        ("hq_portrait", {"video_stg_blocks": [1]}),
        ("hq_portrait", {"video_skip_step": 1}),
        ("hq", {"distilled_lora_strength_stage_1": 0.26}),
        ("hq", {"distilled_lora_strength_stage_2": 0.51}),
        ("hq", {"frame_rate": 23.8}),
        ("hq", {"seed": 4}),
        ("hq", {"prompt": "A dog runs over a field"}),
        ("hq", {"negative_prompt": ""}),
        ("base", {"video_stg_scale": 0.9}),
        ("base", {"num_inference_steps": 5}),
        ("hq_image", {"images": [{"path": "a.png", "strength": 0.81}]}),
        ("hq_image", {"images": [{"path": "a.png", "strength": 0.8, "crf": 32}]}),
        ("base_image", {"images": [{"path": "b.jpg", "frame_idx": 9, "strength": 0.6}]}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_a_changed_setting_shows(golden, changes):
    assert distance(golden, **changes) > TOLERANCE


def test_cross_attention_follows_the_tokens_own_timesteps(monkeypatch):
    """As in v1.2.0. In 1.0.0, scale and shift came from the other stream's noise level."""
    from ltx_ray.model.transformer import Transformer

    embed = Transformer._embed

    def other_rule(self, own, other, names):
        stream, embedded = embed(self, own, other, names)
        timesteps = (other.sigma * self.config.timestep_scale).flatten()
        modulation, _ = getattr(self, names.cross_adaln)(timesteps, own.latent.dtype)
        stream.cross_modulation = modulation.view(1, 1, 4, -1)
        return stream, embedded

    monkeypatch.setattr(Transformer, "_embed", other_rule)
    assert distance("hq_keyframes") > TOLERANCE
    assert distance("hq") <= TOLERANCE


def test_breaking_the_sigma_shift_shows(monkeypatch):
    from ltx_ray.engine import diffusion

    original = diffusion.shifted_sigmas
    monkeypatch.setattr(diffusion, "shifted_sigmas", lambda steps, tokens: original(steps, tokens * 4))
    assert distance("hq") > TOLERANCE


@pytest.mark.parametrize("seed", ["STEP_SEED", "SUBSTEP_SEED"])
def test_breaking_the_samplers_seeds_shows(monkeypatch, seed):
    monkeypatch.setattr(noise, seed, 10)
    assert distance("hq") > TOLERANCE


def test_breaking_the_anchor_refinement_shows(monkeypatch):
    """Only steps with h < 0.5 are refined, so the golden must have one."""
    monkeypatch.setattr(res2s, "_REFINE_BELOW_H", 0.0)
    assert distance("hq_portrait") > TOLERANCE


def test_breaking_the_ledger_shows(monkeypatch):
    original = noise.ClipNoise.__init__
    monkeypatch.setattr(
        noise.ClipNoise,
        "__init__",
        lambda self, ledger, device: original(self, replace(ledger, draws=ledger.draws[:1]), device),
    )
    assert distance("hq") > TOLERANCE


def test_breaking_the_merge_shows(monkeypatch):
    from ltx_ray.parallel import lora

    original = lora.merge_

    def stronger(target, clean, products, **where):
        original(target, clean, [(a, b, s * 1.05) for a, b, s in products], **where)

    monkeypatch.setattr(lora, "merge_", stronger)
    assert distance("hq", distilled_lora_strength_stage_1=0.2500001) > TOLERANCE
