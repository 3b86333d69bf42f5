"""The fused decoder with its steps in plain PyTorch. tests/gpu compares the kernel with them."""

from __future__ import annotations

import copy

import pytest
import torch

from ltx_ray.engine import components
from ltx_ray.engine.fused_decoder import fuse_decoder
from tests.support.decoders import small_decoder


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("widths", "size"),
    [((8, 16, 16, 32), (2, 3, 4, 3)), ((6, 12, 12, 24), (1, 1, 1, 1)), ((10, 20, 20, 40), (1, 2, 1, 7))],
)
@pytest.mark.parametrize("causal", [False, True])
def test_same_pixels(widths, size, channels_last, causal):
    decoder = small_decoder(widths)
    names = list(decoder.state_dict())
    latents = torch.randn((size[0], 128, *size[1:]), generator=torch.Generator().manual_seed(1))
    before = latents.clone()
    with torch.inference_mode():
        expected = decoder(latents, causal=causal)
        assert fuse_decoder(decoder, channels_last)
        pixels = decoder(latents, causal=causal)
    assert pixels.shape == expected.shape == (size[0], 3, 8 * size[1] - 7, 32 * size[2], 32 * size[3])
    assert pixels.is_contiguous() and relative(pixels, expected) < 1e-5
    assert torch.equal(latents, before) and list(decoder.state_dict()) == names


def test_reflected_sides():
    decoder = small_decoder((8, 16, 16, 32), spatial_padding_mode="reflect")
    latents = torch.randn((1, 128, 2, 3, 4), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = decoder(latents)
        assert fuse_decoder(decoder) and relative(decoder(latents), expected) < 1e-5


def test_closer_to_exact_than_the_modules():
    decoder = small_decoder().bfloat16()
    exact = copy.deepcopy(decoder).float()
    latents = torch.randn((1, 128, 2, 4, 5), generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        expected, plain = exact(latents.float()), decoder(latents)
        assert fuse_decoder(decoder)
        pixels = decoder(latents)
    assert pixels.dtype == torch.bfloat16 and relative(pixels, expected) < relative(plain, expected)


@pytest.mark.parametrize(
    "change",
    [
        dict(timestep_conditioning=True),
        dict(inject_noise=(True,) * 5),
        dict(upsample_residual=(True,) * 4),
        dict(upsample_factor=(1, 2, 2, 1)),
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_decoder_with_other_parts_is_not_fused(change):
    decoder = small_decoder(**change)
    assert not fuse_decoder(decoder) and "forward" not in vars(decoder)


def test_a_decoder_on_a_cpu_is_not_fused(toy):
    vae = components.load_video_vae(toy["checkpoint_path"], torch.bfloat16, "cpu")
    assert "forward" not in vars(vae.decoder)
    assert fuse_decoder(vae.decoder), "it could be fused, but is not on a CPU"
