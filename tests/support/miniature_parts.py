"""The miniature's parts, with random weights at its real sizes for those that are not trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from ltx_ray.miniature import config, export
from ltx_ray.toy import ToyShape, gemma, weights


def random_parts(folder: Path, seed: int = 0) -> Path:
    """Fill `folder` with the parts that `ltx_ray/miniature/weights` is to have. The two VAEs are the trained ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vae", "audio"):
        shutil.copyfile(export.WEIGHTS / f"{name}.safetensors", folder / f"{name}.safetensors")
    shape = ToyShape(
        layers=config.LAYERS,
        heads=config.HEADS,
        head_dim=config.HEAD_DIM,
        audio_head_dim=config.AUDIO_HEAD_DIM,
        connector_layers=config.CONNECTOR_LAYERS,
        gemma_hidden=config.GEMMA_HIDDEN,
        gemma_layers=config.GEMMA_LAYERS,
        gemma_heads=2,
        gemma_kv_heads=1,
        upsampler_channels=config.UPSAMPLER_CHANNELS,
        lora_rank=config.LORA_RANK,
    )
    generator = torch.Generator().manual_seed(seed)

    def part(*draws) -> dict[str, torch.Tensor]:
        draw = weights.Draw(generator)
        for one in draws:
            one(draw, shape)
        return draw.tensors

    transformer = part(weights.draw_transformer, weights.draw_text)
    export.save_part(folder / "transformer.safetensors", transformer)
    lora = part(lambda draw, shape: weights.draw_lora(draw, transformer, shape))
    export.save_part(folder / "distilled_lora.safetensors", lora, {})
    export.save_part(folder / "upsampler.safetensors", part(weights.draw_upsampler), config.upsampler_config())
    (folder / "gemma").mkdir(exist_ok=True)
    export.save_part(folder / "gemma" / "model.safetensors", part(gemma.draw_weights), {})
    for name, content in gemma.files(shape).items():
        (folder / "gemma" / name).write_text(json.dumps(content))
    return folder
