"""Where a stage begins: noised latents, what images hold fast in them, and where every token sits.

Source: `tools.py`, `latent_cond.py`, `keyframe_cond.py` and `helpers.py` of the reference v1.2.0. An image at
frame 0 takes the place of the first latent frame in the clean latent; an image at a later frame is appended
as tokens of its own, which are dropped again at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ltx_ray.model.rope import audio_positions, video_positions
from ltx_ray.records import AV, RenderRequest
from ltx_ray.sampling.noise import ClipNoise, noised
from ltx_ray.shapes import AUDIO_BINS, AUDIO_CHANNELS, SPACE_FACTOR, VIDEO_CHANNELS, ClipShape


@dataclass(frozen=True)
class ImageConditioning:
    """An image of a stage: its frame, its strength, its normalised latent (1, C, 1, H, W)."""

    frame_idx: int
    strength: float
    latent: torch.Tensor


@dataclass(frozen=True)
class LatentState:
    """Packed state of a stage. `mask` (1, T, 1) float32 is 1 where a video token is free; None: all are."""

    latents: AV[torch.Tensor]
    clean: torch.Tensor
    mask: torch.Tensor | None
    positions: AV[torch.Tensor]
    video_tokens: int

    def blend(self, x: AV[torch.Tensor]) -> AV[torch.Tensor]:
        """Put the clean video latent back where it is held; the sound is always free."""
        if self.mask is None:
            return x
        video = (x.video * self.mask + self.clean.float() * (1 - self.mask)).to(x.video.dtype)
        return AV(video, x.audio)

    def timesteps(self, level: torch.Tensor) -> AV[torch.Tensor]:
        """Noise level of every token at `level` (1,): (1, T) where tokens differ, else (1, 1)."""
        one = level.reshape(1, 1)
        return AV(one if self.mask is None else self.mask[..., 0] * one, one)

    def trim(self, x: AV[torch.Tensor]) -> AV[torch.Tensor]:
        """Without the tokens that images appended."""
        return AV(x.video[:, : self.video_tokens], x.audio)


def latent_sizes(shape: ClipShape) -> AV[tuple[int, ...]]:
    """Unpacked sizes of a clip's latents, (1, C, F, H, W) and (1, 8, T, 16)."""
    return AV(
        (1, VIDEO_CHANNELS, shape.latent_frames, shape.latent_height, shape.latent_width),
        (1, AUDIO_CHANNELS, shape.audio_latents, AUDIO_BINS),
    )


def stage_1_draws(request: RenderRequest, dtype: str) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """What the noise ledger of `request` holds after stage 1, in latents of `dtype`."""
    shape = request.shape.half()
    keyframes = sum(image.frame_idx != 0 for image in request.images)
    tokens = shape.video_tokens + keyframes * shape.latent_height * shape.latent_width
    return (
        ("stage_1.video", (1, tokens, VIDEO_CHANNELS), dtype),
        ("stage_1.audio", (1, shape.audio_latents, AUDIO_CHANNELS * AUDIO_BINS), dtype),
    )


def begin(
    shape: ClipShape,
    stage: str,
    noise: ClipNoise,
    initial: AV[torch.Tensor],
    scale: float,
    images: Sequence[ImageConditioning] = (),
) -> LatentState:
    """Noise the packed `initial` latents (1, T, C) to `scale` and apply `images`, in their order."""
    device = initial.video.device
    latent, clean, tokens = initial.video, initial.video.clone(), initial.video.shape[1]
    positions = video_positions(shape, device)
    mask = torch.ones((1, tokens, 1), device=device) if images else None
    for image in images:
        packed = image.latent.flatten(2).transpose(1, 2)
        if image.frame_idx == 0:
            clean[:, : packed.shape[1]] = packed
            mask[:, : packed.shape[1]] = 1.0 - image.strength
            continue
        latent = torch.cat((latent, torch.zeros_like(packed)), dim=1)
        clean = torch.cat((clean, packed), dim=1)
        # the appended part of the mask passes through the latents' dtype, as in the reference
        held = torch.full((1, packed.shape[1], 1), 1.0 - image.strength, device=device, dtype=packed.dtype)
        mask = torch.cat((mask, held.float()), dim=1)
        positions = torch.cat((positions, _keyframe_positions(shape, image.frame_idx, device)), dim=2)
    drawn = AV("video", "audio").map(
        lambda name, x: noise.draw(f"{stage}.{name}", tuple(x.shape), x.dtype), AV(latent, initial.audio)
    )
    latents = AV(
        noised(drawn.video, latent, clean, mask, scale),
        noised(drawn.audio, initial.audio, initial.audio, None, scale),
    )
    return LatentState(latents, clean, mask, AV(positions, audio_positions(shape.audio_latents, device)), tokens)


def _keyframe_positions(shape: ClipShape, frame_idx: int, device: torch.device) -> torch.Tensor:
    """Token intervals (1, 3, H*W, 2) of one pixel frame at `frame_idx`."""
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
