"""Scores of the DiT: held-out prompts rendered by the engines, and read by the rules of measure.py.

Stage 1 alone is rendered and decoded. Its files are those that training exports, so whatever fails here would fail
later too.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ltx_ray.config import EngineSpec, GangLayout, ModelFiles, Numerics
from ltx_ray.engine import codec, components
from ltx_ray.engine.base import Rank
from ltx_ray.engine.diffusion import DiffusionEngine
from ltx_ray.engine.text import TextEngine
from ltx_ray.miniature import export, files, judge, measure, picture, world
from ltx_ray.presets import DEFAULT_IMAGE_CRF, PIPELINES
from ltx_ray.records import ImageCondition, Recipe, RenderRequest, WorkItem
from ltx_ray.shapes import ClipShape
from ltx_ray.stages import Stage
from scripts.miniature_training.video import to_bytes


def join_parts(path: Path, *parts: Path) -> None:
    """Write the single file `path` of the tensors of several parts."""
    export.save_part(path, files.joined(parts))


class Renderer:
    """The engines on a model's files. `lora` is the distilled LoRA's file."""

    def __init__(self, checkpoint: Path, gemma: Path, device: str, lora: Path | None = None) -> None:
        self._device = torch.device(device)
        self._dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        model = ModelFiles(str(checkpoint), str(gemma), "", str(lora) if lora is not None else None)
        numerics = Numerics(dtype=str(self._dtype).removeprefix("torch."), device=self._device.type)
        spec = EngineSpec("", model, numerics, "", layout=GangLayout((Stage.STAGE1,)))
        # As in the engine of decode.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self._text, self._diffusion = TextEngine(spec, Rank(device=device)), DiffusionEngine(spec, Rank(device=device))
        self._text.load()
        self._diffusion.load()
        self._video = components.load_video_vae(checkpoint, self._dtype, device)
        self._audio = components.load_audio_decoder(checkpoint, self._dtype, device)
        self._vocoder = components.load_vocoder(checkpoint, self._dtype, device)

    def render(self, request: RenderRequest, digests: tuple[str, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
        """(frames (F, H / 2, W / 2, 3) uint8, sound (2, samples) at 48 kHz) of stage 1 of `request`."""
        recipe = Recipe(request.pipeline, "", "", "", "", "", "", None, (0.0, 0.0))
        item = WorkItem("score", request, recipe, "", digests)
        conditions = self._text.run(Stage.TEXT, item)
        latents = self._diffusion.run(Stage.STAGE1, item, conditions)
        assert latents is not None
        video, audio = latents.latents.map(lambda x: x.to(self._device, self._dtype))
        with torch.inference_mode():
            pixels = codec.decode_video_tile(self._video, video)[0].float()
            sound, _ = codec.decode_audio(self._audio, self._vocoder, audio)
        return to_bytes(pixels), sound.cpu().numpy()


def request_of(prompt: str, pipeline: str, stage1: ClipShape, **changes: Any) -> RenderRequest:
    """A request with the defaults of a pipeline, whose stage 1 has the size `stage1`."""
    values = {
        **PIPELINES[pipeline].defaults,
        "prompt": prompt,
        "pipeline": pipeline,
        "height": 2 * stage1.height,
        "width": 2 * stage1.width,
        "num_frames": stage1.num_frames,
        "frame_rate": stage1.frame_rate,
    }
    return RenderRequest(**{**values, **changes})


def score_prompts(
    renderer: Renderer, pipeline: str, shape: ClipShape, count: int, sheet: Path | None = None, **changes: Any
) -> dict[str, float]:
    """Fractions of `count` held-out prompts whose ground, colour, shape, motion and sound are right.

    `sheet`: a PNG of the first, middle and last frames, one clip a row.
    """
    rng = random.Random("score")
    rows, pictures = [], []
    for number in range(count):
        clip = world.draw_clip(rng, "held_out", shape.width / shape.height)
        frames, sound = renderer.render(request_of(clip.prompt, pipeline, shape, seed=number, **changes))
        rows.append(_rights(clip.scene, frames, sound, shape.frame_rate))
        pictures.append(np.concatenate([frames[i] for i in (0, len(frames) // 2, -1)], axis=1))
    if sheet is not None:
        Image.fromarray(np.concatenate(pictures[:16])).save(sheet)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _rights(scene: world.Scene, frames: np.ndarray, sound: np.ndarray, frame_rate: float) -> dict[str, bool]:
    """Attribute -> whether it is right, by the rules for clips. The sound is not cut to the picture's length yet."""
    name = measure.classify_sound(sound, 48000)
    return {**judge.read_clip(frames, sound, 48000, frame_rate).rights(scene), "sound": name == scene.sound}


def score_images(
    renderer: Renderer, pipeline: str, shape: ClipShape, count: int, folder: Path, **changes: Any
) -> dict[str, float]:
    """The fraction of `count` clips with a first frame as an image whose object starts where the image has it."""
    rng = random.Random("images")
    kept = []
    for number in range(count):
        clip = world.draw_clip(rng, "held_out", shape.width / shape.height)
        path = folder / "first-frame.png"
        pixels = picture.draw_frames([clip], 1, 2 * shape.height, 2 * shape.width)
        given = Image.fromarray(((pixels[0, :, 0] + 1) * 127.5).byte().permute(1, 2, 0).numpy())
        given.save(path)
        image = ImageCondition(str(path), 0, 1.0, DEFAULT_IMAGE_CRF)
        request = request_of(clip.prompt, pipeline, shape, seed=number, images=(image,), **changes)
        frames, _ = renderer.render(request, (hashlib.sha256(path.read_bytes()).hexdigest()[:32],))
        kept.append(judge.starts_as_given(frames[0], np.asarray(given.resize((shape.width, shape.height)))))
    return {"image kept": float(np.mean(kept))}
