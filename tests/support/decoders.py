"""A video decoder with the structure of the release's, small widths and random weights."""

from __future__ import annotations

import torch


def small_decoder(widths: tuple[int, ...] = (32, 64, 64, 128), **changes) -> torch.nn.Module:
    """A decoder in float32 on the CPU.

    `widths` are the input channels of each upsampler, from the pixels inwards. The last convolution has half the first.
    """
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
