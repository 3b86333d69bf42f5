"""Scores of rendered clips: what is right by attribute, whether given images are kept, and how sharp edges are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ltx_ray.miniature import judge, measure
from ltx_ray.miniature.judge import Reading
from ltx_ray.miniature.world import Clip
from scripts.clip_quality.rendering import images_of, latents_of, model_files, read_mp4
from scripts.clip_quality.settings import Settings

#: What is read off a clip that was not rendered.
NOT_RENDERED = Reading(*["not rendered"] * len(judge.ATTRIBUTES))


@dataclass(frozen=True)
class Scores:
    """`first_frames` says of each clip whether it starts as its image; None where no images were given.

    `sharpness` is None where it was not measured.
    """

    readings: list[Reading]
    first_frames: list[bool] | None
    sharpness: float | None


def score(clips: list[Clip], paths: Mapping[str, Path], settings: Settings, output: Path, sharp: int) -> Scores:
    """Score the clips' mp4s in `paths`, by id. Sharpness is measured on `sharp` of them, in the dataset `output`."""
    images = images_of(clips, settings) if settings.images else None
    readings, kept = [], []
    for number, name in enumerate(settings.ids()):
        if name not in paths:
            readings.append(NOT_RENDERED)
            kept.append(False)
            continue
        frames, sound, rate, frame_rate = read_mp4(paths[name])
        readings.append(judge.read_clip(frames, sound, rate, frame_rate))
        if images is not None:
            # A preview has half the size of its image.
            step = images[number].shape[0] // frames.shape[1]
            kept.append(judge.starts_as_given(frames[0], images[number][::step, ::step]))
    some = [path for path in paths.values() if latents_of(path, output).exists()][:sharp]
    sharpness = _sharpness(some, output, settings) if some and not settings.stage1_alone else None
    return Scores(readings, kept if images is not None else None, sharpness)


def _sharpness(paths: list[Path], output: Path, settings: Settings) -> float | None:
    """How many times as wide as in the clips edges are without stage 2: in stage 1's frames, enlarged bilinearly.

    Each clip counts by its first, middle and last frame. None when no clip shows an object.
    """
    import torch
    from safetensors.torch import load_file

    from ltx_ray.engine import codec, components

    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = components.load_video_vae(model_files(settings)["checkpoint_path"], torch.float32, device)
    ratios = []
    for path in paths:
        frames, *_ = read_mp4(path)
        latent = load_file(latents_of(path, output))["stage_1.video"].to(device, torch.float32)
        picked = [0, len(frames) // 2, len(frames) - 1]
        small = codec.decode_video_tile(vae, latent)[0].movedim(1, 0)[picked]
        large = torch.nn.functional.interpolate(small, size=frames.shape[1:3], mode="bilinear")
        before = ((large + 1) * 127.5).round().clamp(0, 255).byte().movedim(1, -1).cpu().numpy()
        widths = [(measure.edge_width(b), measure.edge_width(frames[i])) for b, i in zip(before, picked, strict=True)]
        ratios += [first / second for first, second in widths if first and second]
    return float(np.exp(np.mean(np.log(ratios)))) if ratios else None
