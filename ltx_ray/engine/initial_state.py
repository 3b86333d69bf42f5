"""The latent state in which a stage begins: noised latents, conditioning by images, and positions of all tokens.

Source: docs/ltx-2.3.md#initial-state and #images; `ltx_core/tools.py`, `ltx_core/conditioning/types/latent_cond.py`,
`keyframe_cond.py` and `ltx_pipelines/utils/helpers.py` of the reference v1.2.0. An image at frame 0 takes the place of
the first latent frame in the clean latent. An image at a later frame is appended as keyframe tokens of its own, which
are dropped at the end of the stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ltx_ray.engine.patchify import patchify_video
from ltx_ray.model.rope import audio_positions, video_positions
from ltx_ray.records import AV, RenderRequest
from ltx_ray.sampling.noise import ClipNoise, add_noise
from ltx_ray.shapes import AUDIO_BINS, AUDIO_CHANNELS, SPACE_FACTOR, VIDEO_CHANNELS, ClipShape


@dataclass(frozen=True)
class ImageConditioning:
    """An image's normalised latent (1, C, 1, H, W) on the device, and the pixel frame that it conditions."""

    frame_idx: int
    strength: float
    latent: torch.Tensor


@dataclass(frozen=True)
class LatentState:
    """Packed state of a stage (the reference's LatentState), in which only the video can be conditioned.

    latents (1, T, C), keyframe tokens included; clean_latent (1, T, C) of the video; denoise_mask (1, T, 1) float32, 1
    where a video token is free, None when all are; positions as in model/rope.py; video_tokens without keyframes.
    """

    latents: AV[torch.Tensor]
    clean_latent: torch.Tensor
    denoise_mask: torch.Tensor | None
    positions: AV[torch.Tensor]
    video_tokens: int

    def blend_clean(self, x: AV[torch.Tensor]) -> AV[torch.Tensor]:
        """`x` with the clean video latent put back where the denoise mask holds it. Audio is always free."""
        if self.denoise_mask is None:
            return x
        video = x.video * self.denoise_mask + self.clean_latent.float() * (1 - self.denoise_mask)
        return AV(video.to(x.video.dtype), x.audio)

    def token_sigmas(self, sigma: torch.Tensor) -> AV[torch.Tensor]:
        """Noise level of every token when the stage is at `sigma` (1,): (1, T), or (1, 1) when all have the same."""
        sigma = sigma.reshape(1, 1)
        return AV(sigma if self.denoise_mask is None else self.denoise_mask[..., 0] * sigma, sigma)

    def without_keyframes(self, x: AV[torch.Tensor]) -> AV[torch.Tensor]:
        """`x` without the keyframe tokens."""
        return AV(x.video[:, : self.video_tokens], x.audio)


def stage1_draws(request: RenderRequest, dtype: str) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """The draws in the noise ledger of `request` after stage 1, with latents of `dtype` (docs/ltx-2.3.md#noise)."""
    shape = request.shape.half()
    keyframes = sum(image.frame_idx != 0 for image in request.images)
    tokens = shape.video_tokens + keyframes * shape.latent_height * shape.latent_width
    return (
        ("stage_1.video", (1, tokens, VIDEO_CHANNELS), dtype),
        ("stage_1.audio", (1, shape.audio_latents, AUDIO_CHANNELS * AUDIO_BINS), dtype),
    )


def noised_state(
    shape: ClipShape,
    stage: str,
    noise: ClipNoise,
    latents: AV[torch.Tensor],
    scale: float,
    images: Sequence[ImageConditioning] = (),
) -> LatentState:
    """The state in which `stage` begins: packed `latents` (1, T, C) noised to `scale`, with `images` in their order.

    Draws the noise of the stage (docs/ltx-2.3.md#order-of-draws), video first.
    """
    device = latents.video.device
    video, tokens = latents.video, latents.video.shape[1]
    clean_latent = video.clone()
    positions = video_positions(shape, device)
    mask = torch.ones((1, tokens, 1), device=device)
    for image in images:
        packed = patchify_video(image.latent)
        if image.frame_idx == 0:
            clean_latent[:, : packed.shape[1]] = packed
            mask[:, : packed.shape[1]] = 1.0 - image.strength
            continue
        video = torch.cat((video, torch.zeros_like(packed)), dim=1)
        clean_latent = torch.cat((clean_latent, packed), dim=1)
        # The mask of keyframe tokens passes through the latents' dtype, as in the reference.
        keyframe_mask = torch.full((1, packed.shape[1], 1), 1.0 - image.strength, device=device, dtype=packed.dtype)
        mask = torch.cat((mask, keyframe_mask.float()), dim=1)
        positions = torch.cat((positions, _keyframe_positions(shape, image.frame_idx, device)), dim=2)
    denoise_mask = mask if images else None
    drawn = AV("video", "audio").map(
        lambda name, x: noise.draw(f"{stage}.{name}", tuple(x.shape), x.dtype), AV(video, latents.audio)
    )
    noised = AV(
        add_noise(drawn.video, video, clean_latent, denoise_mask, scale),
        add_noise(drawn.audio, latents.audio, latents.audio, None, scale),
    )
    all_positions = AV(positions, audio_positions(shape.audio_latents, device))
    return LatentState(noised, clean_latent, denoise_mask, all_positions, tokens)


def _keyframe_positions(shape: ClipShape, frame_idx: int, device: torch.device) -> torch.Tensor:
    """Intervals (1, 3, H*W, 2) of the tokens of one pixel frame at `frame_idx`, as video_positions gives them."""
    grid = torch.meshgrid(
        torch.arange(shape.latent_height, device=device), torch.arange(shape.latent_width, device=device), indexing="ij"
    )
    rows, columns = (axis.flatten() * SPACE_FACTOR for axis in grid)
    time = torch.full_like(rows, frame_idx)
    starts = torch.stack((time, rows, columns))
    ends = torch.stack((time + 1, rows + SPACE_FACTOR, columns + SPACE_FACTOR))
    positions = torch.stack((starts, ends), dim=-1).float()
    positions[0] = positions[0] / shape.frame_rate
    return positions[None]
