"""Latents as a clip's grid, and packed as the tokens of the transformer (docs/ltx-2.3.md#sizes-of-latents).

Source: `ltx_core/components/patchifiers.py` of the reference v1.2.0.
"""

from __future__ import annotations

import torch

from ltx_ray.records import AV
from ltx_ray.shapes import AUDIO_BINS, AUDIO_CHANNELS, VIDEO_CHANNELS, ClipShape


def latent_sizes(shape: ClipShape) -> AV[tuple[int, ...]]:
    """Sizes of a clip's latents: video (1, C, F, H, W) and audio (1, 8, T, 16)."""
    return AV(
        (1, VIDEO_CHANNELS, shape.latent_frames, shape.latent_height, shape.latent_width),
        (1, AUDIO_CHANNELS, shape.audio_latents, AUDIO_BINS),
    )


def patchify_video(latent: torch.Tensor) -> torch.Tensor:
    """(1, C, F, H, W) -> (1, F*H*W, C), the order in which noise is drawn.

    The result stays a transposed view, as in the reference: on a CPU, bfloat16 products of another memory layout are
    rounded otherwise.
    """
    return latent.flatten(2).transpose(1, 2)


def patchify(latents: AV[torch.Tensor]) -> AV[torch.Tensor]:
    """(1, C, F, H, W) and (1, C, T, F) -> (1, F*H*W, C) and (1, T, C*F)."""
    return AV(patchify_video(latents.video), latents.audio.transpose(1, 2).flatten(2))


def unpatchify(packed: AV[torch.Tensor], shape: ClipShape) -> AV[torch.Tensor]:
    """The inverse of `patchify`, contiguous."""
    grid = (shape.latent_frames, shape.latent_height, shape.latent_width)
    video = packed.video.transpose(1, 2).unflatten(2, grid).contiguous()
    audio = packed.audio.unflatten(2, (AUDIO_CHANNELS, AUDIO_BINS)).transpose(1, 2).contiguous()
    return AV(video, audio)
