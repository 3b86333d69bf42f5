"""A video decoder built as the release's, of small widths and random weights."""

from __future__ import annotations

import torch


def small_decoder(widths: tuple[int, ...] = (32, 64, 64, 128), **changes) -> torch.nn.Module:
    """`widths`: of the channels that go into each upsampler, from the pixel end; the decoder ends with half the
    first. Float32, on the CPU."""
    from diffusers.models.autoencoders.autoencoder_kl_ltx2 import LTX2VideoDecoder3d

    arguments = dict(
        in_channels=128,
        block_out_channels=widths,
        spatio_temporal_scaling=(True,) * 4,
        layers_per_block=(1, 2, 2, 1, 1),
        upsample_type=("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
        inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(2, 2, 1, 2),
        spatial_padding_mode="zeros",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LTX2VideoDecoder3d(**{**arguments, **changes}).eval().requires_grad_(False)
