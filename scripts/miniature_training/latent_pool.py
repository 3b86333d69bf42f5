"""Latents of training clips, encoded by the frozen VAEs and kept on the device.

Encoding a clip takes longer than a training step on it, so clips are used several times, with other noise, other noise
levels and other prompts. A pool is filled at the start and renewed in turns.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ltx_ray.engine import codec, components
from ltx_ray.engine.patchify import patchify_video
from ltx_ray.miniature import picture, sound, world
from ltx_ray.miniature.config import ACTIVE_AUDIO, ACTIVE_VIDEO
from ltx_ray.records import AV
from ltx_ray.shapes import ClipShape
from scripts.miniature_training import audio

#: Pixels that are encoded at once.
_PIXELS = 30_000_000


class FrozenEncoders:
    """The encoders of the trained VAEs, of which the engine has the video's."""

    def __init__(self, video: Path, sounds: Path, dtype: torch.dtype, device: str) -> None:
        self.device = device
        self._video = components.load_video_vae(video, dtype, device, part="encoder")
        if device.startswith("cuda"):
            self._video = self._video.to(memory_format=torch.channels_last_3d)
        self._audio = audio.load_audio_vae(sounds)
        self._audio.decoder = None
        self._audio.to(device)

    @torch.no_grad()
    def video(self, clips: Sequence[world.Clip], shape: ClipShape) -> torch.Tensor:
        """Used channels (B, tokens, ACTIVE_VIDEO) of the clips' packed normalised latents."""
        pixels = picture.draw_frames(clips, shape.num_frames, shape.height, shape.width, self.device)
        return patchify_video(codec.encode_video(self._video, pixels))[..., :ACTIVE_VIDEO]

    @torch.no_grad()
    def audio(self, clips: Sequence[world.Clip], shape: ClipShape, phases: Sequence[float]) -> torch.Tensor:
        """Used numbers (B, latents, ACTIVE_AUDIO) of the packed normalised latents; `phases` are in turns."""
        rows = [_sound_row(clip.scene.sound, shape.seconds, phase) for clip, phase in zip(clips, phases, strict=True)]
        sounds = audio.synthesise(torch.tensor(rows, dtype=torch.float64, device=self.device), shape.audio_latents)
        return audio.packed(audio.normalised(self._audio, sounds.source))[..., :ACTIVE_AUDIO]


def _sound_row(name: str, seconds: float, phase: float) -> tuple[float, float, float, float]:
    """A sound of the world in a clip of `seconds`, as audio.synthesise takes it."""
    octaves = math.log2(sound.RISING[1] / sound.RISING[0]) / seconds if name == "rising" else 0.0
    peak = 0.0 if name == "silent" else sound.AMPLITUDE
    return sound.TONES.get(name, sound.RISING[0]), octaves, peak, phase


@dataclass(frozen=True)
class Drawn:
    """Packed latents of B clips: used channels (B, T, C) float32 of both streams, and numbers of the scenes (B,)."""

    latents: AV[torch.Tensor]
    scenes: torch.Tensor


class LatentPool:
    """Latents of `capacity` clips of `shape`, whose scenes are those of `scenes`.

    A tone begins with a random phase. No token knows its place before the model has seen the others, so a fixed phase
    could not be kept when sampling begins.
    """

    def __init__(
        self, encoders: FrozenEncoders, shape: ClipShape, scenes: Sequence[world.Scene], capacity: int, seed: str
    ) -> None:
        self.shape = shape
        self._encoders, self._scenes, self._capacity = encoders, scenes, capacity
        self._rng = random.Random(f"{seed} {shape}")
        device = encoders.device
        self._latents = AV(
            torch.zeros(capacity, shape.video_tokens, ACTIVE_VIDEO, device=device),
            torch.zeros(capacity, shape.audio_latents, ACTIVE_AUDIO, device=device),
        )
        self._numbers = torch.zeros(capacity, dtype=torch.long, device=device)
        self._next = 0
        self.renew(capacity)

    def __len__(self) -> int:
        return self._capacity

    def renew(self, count: int) -> None:
        """Encode `count` new clips in the place of the oldest."""
        most = max(1, _PIXELS // (self.shape.num_frames * self.shape.height * self.shape.width))
        while count > 0:
            part = min(count, most, self._capacity - self._next)
            numbers = [self._rng.randrange(len(self._scenes)) for _ in range(part)]
            aspect = self.shape.width / self.shape.height
            clips = [world.draw_clip(self._rng, "train", aspect, self._scenes[number]) for number in numbers]
            phases = [self._rng.random() for _ in clips]
            rows = slice(self._next, self._next + part)
            self._latents.video[rows] = self._encoders.video(clips, self.shape).float()
            self._latents.audio[rows] = self._encoders.audio(clips, self.shape, phases)
            self._numbers[rows] = torch.tensor(numbers, device=self._numbers.device)
            self._next = (self._next + part) % self._capacity
            count -= part

    def draw(self, count: int, generator: torch.Generator) -> Drawn:
        """The latents of `count` random clips."""
        rows = torch.randint(self._capacity, (count,), generator=generator, device=self._numbers.device)
        return Drawn(self._latents.map(lambda x: x[rows]), self._numbers[rows])
