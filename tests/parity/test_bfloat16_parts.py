"""Where a bfloat16 run rounds around the model, against the reference v1.2.0.

Whole runs cannot show this, since they are 1e-2 from float32 in bfloat16 wherever they round. The arithmetic here is
the same on every CPU, unlike the model's matrix products, so that bits can be compared. Inputs are uniform draws from a
seed, which are the same everywhere too, and only results are recorded.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ltx_ray.engine.initial_state import ImageConditioning, LatentState, noised_state
from ltx_ray.engine.patchify import patchify
from ltx_ray.records import AV, Guidance, NoiseLedger
from ltx_ray.sampling.euler import sample_euler
from ltx_ray.sampling.guidance import combine
from ltx_ray.sampling.noise import ClipNoise, SamplerNoise
from ltx_ray.sampling.passes import Pass
from ltx_ray.sampling.res2s import sample_res2s
from ltx_ray.sampling.sigmas import shifted_sigmas
from ltx_ray.shapes import ClipShape
from tests.support.pipeline import GOLDENS
from tests.support.transformers import relative

#: The last bit of one number in a thousand, because another CPU may sum a standard deviation in another order.
TOLERANCE = 1e-4
SHAPE = ClipShape(num_frames=17, height=64, width=96, frame_rate=24.0)
GUIDANCE = AV(
    Guidance(cfg_scale=3.0, stg_scale=1.0, rescale_scale=0.45, modality_scale=3.0, stg_blocks=(1,), skip_step=0),
    Guidance(cfg_scale=7.0, stg_scale=1.0, rescale_scale=1.0, modality_scale=3.0, stg_blocks=(1,), skip_step=0),
)


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / "parts" / "bfloat16.safetensors")


@pytest.fixture(scope="module")
def given() -> SimpleNamespace:
    """What the recorder drew, in its order: a state of stage 2 with two images, and the results of four passes."""
    generator = torch.Generator().manual_seed(5)

    def draw(*size: int) -> torch.Tensor:
        return ((torch.rand(size, generator=generator) * 2 - 1) * 3**0.5).bfloat16()

    latents = AV(draw(1, 128, 3, 2, 3), draw(1, 8, 18, 16))
    images = [ImageConditioning(0, 0.7, draw(1, 128, 1, 2, 3)), ImageConditioning(9, 0.8, draw(1, 128, 1, 2, 3))]
    passes = {name: AV(draw(1, 24, 128), draw(1, 18, 128)) for name in Pass}
    noise = ClipNoise(NoiseLedger(10, "cpu", "cpu"), torch.device("cpu"))
    state = noised_state(SHAPE, "stage_2", noise, patchify(latents), 0.909375, images)
    return SimpleNamespace(state=state, passes=passes)


def check(recorded: dict[str, torch.Tensor], name: str, found: AV[torch.Tensor], tolerance: float) -> None:
    for stream, tensor in zip(("video", "audio"), found, strict=True):
        expected = recorded[f"{name}.{stream}"]
        assert tensor.dtype == expected.dtype, f"{name}.{stream}"
        assert relative(tensor.float(), expected.float()) <= tolerance, f"{name}.{stream}"


def test_initial_state(recorded, given):
    check(recorded, "start", given.state.latents, 0.0)
    assert torch.equal(given.state.denoise_mask, recorded["start.mask"])


@pytest.mark.parametrize("name, sampler", [("res_2s", sample_res2s), ("euler", sample_euler)])
def test_samplers(recorded, given, name, sampler):
    state: LatentState = given.state

    def denoise(latents: AV[torch.Tensor], sigma: torch.Tensor, step: int) -> AV[torch.Tensor]:
        return latents.map(lambda x: (x.float() * 0.8 + 0.05 * float(sigma)).to(x.dtype))

    sigmas = shifted_sigmas(15, SHAPE.video_tokens)
    check(recorded, name, sampler(denoise, state.latents, sigmas, SamplerNoise("cpu"), state.blend_clean), TOLERANCE)


def test_guidance(recorded, given):
    videos = {name: result.video for name, result in given.passes.items()}
    audios = {name: result.audio for name, result in given.passes.items()}
    found = GUIDANCE.map(combine, AV(videos, audios))
    check(recorded, "guidance", found, TOLERANCE)
