"""Clips of the miniature's world, drawn and encoded as the dataset encodes rendered ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ltx_ray.engine.frames import to_yuv420
from ltx_ray.engine.mp4 import write_mp4
from ltx_ray.miniature import picture, sound
from ltx_ray.miniature.world import Clip
from ltx_ray.shapes import ClipShape, frame_rate_fraction


def write_drawn(path: Path, clip: Clip, shape: ClipShape, audio: np.ndarray | None = None) -> Path:
    """Draw `clip` and encode it to `path`. `audio` (2, samples) at 48 kHz replaces its sound."""
    pixels = picture.draw_frames([clip], shape.num_frames, shape.height, shape.width)
    if audio is None:
        audio = sound.make_sound(clip.scene.sound, shape.audio_samples / 48000)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(
        str(path),
        [to_yuv420(pixels).numpy()],
        width=shape.width,
        height=shape.height,
        frame_rate=frame_rate_fraction(shape.frame_rate),
        audio=audio,
        sample_rate=48000,
        metadata={"item_id": "0" * 32},
    )
    return path
