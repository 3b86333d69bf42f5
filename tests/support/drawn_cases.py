"""Toy models and manifest rows drawn at random, so that nothing can be fitted to fixed cases."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ltx_ray.config import LoraSpec, ModelFiles
from ltx_ray.toy import ToyShape, make_toy_model

_WORDS = """a the old red small bright woman cat train river forest market window piano camera pans slowly across
runs sleeps while snow rain music plays whisper über Straße città 夕暮れ の 海 собака бежит 🎬 "Go!" 3.5 night, voice;
fire""".split()
_USER_LORA = "user-lora"


@dataclass(frozen=True)
class Case:
    """A model (its widths and the seed of its weights) and a row that leaves nothing to defaults."""

    shape: ToyShape
    model_seed: int
    row: dict

    def of_one_token(self) -> Case:
        """The same, of 64x64 and one frame. The upsampler has two channels for each of its norms' groups, because the
        reference cannot norm a single value."""
        shape = replace(self.shape, upsampler_channels=64)
        return Case(
            shape, self.model_seed, {**self.row, "height": 64, "width": 64, "num_frames": 1, "frame_rate": 24.0}
        )

    def make(self, folder: Path) -> ModelFiles:
        files = make_toy_model(folder, seed=self.model_seed, shape=self.shape)
        loras = tuple(
            LoraSpec(use["name"], _user_lora(folder / f"{use['name']}.safetensors", files, self.model_seed))
            for use in self.row["loras"]
        )
        return ModelFiles(**files, loras=loras)


def draw_case(seed: str, portrait: bool) -> Case:
    """A case that takes a second or two on a CPU. The same `seed` gives the same case."""
    rng = random.Random(seed)
    shape = _shape(rng)
    long, short = rng.choice(((128, 64), (192, 64), (192, 128), (256, 128)))
    height, width = (long, short) if portrait else (short, long)
    row = {
        "prompt": _prompt(rng),
        "negative_prompt": rng.choice(("", _prompt(rng), _prompt(rng))),
        "seed": rng.choice((rng.randrange(1000), rng.randrange(2**63))),
        "height": height,
        "width": width,
        "num_frames": rng.choice((9, 17, 25)),
        "frame_rate": rng.choice((12.0, 23.976, 24.0, 25.0, 29.97, 30.0, 50.0)),
        "num_inference_steps": rng.randint(2, 5),
        "distilled_lora_strength_stage_1": _sometimes(rng, 0.0, 0.1, 1.0),
        "distilled_lora_strength_stage_2": _sometimes(rng, 0.0, 0.1, 1.0),
        "loras": rng.choice(([], [{"name": _USER_LORA, "strength": _number(rng, -0.5, 1.0)}])),
        "images": [],
        "pipeline": "hq",
    }
    # The same for both streams: in 1.0.0, a stream that skips a call still takes part in the unconditional pass.
    skip_step = rng.choice((0, 0, 1))
    for stream in ("video", "audio"):
        blocks = rng.sample(range(shape.layers), rng.randint(1, shape.layers))
        row |= {
            f"{stream}_cfg_scale": _sometimes(rng, 1.0, 1.5, 8.0),
            f"{stream}_stg_scale": _sometimes(rng, 0.0, 0.2, 1.5),
            f"{stream}_stg_blocks": blocks,
            f"{stream}_rescale_scale": _sometimes(rng, 0.0, 0.1, 1.0),
            f"{stream}_modality_scale": _sometimes(rng, 1.0, 1.5, 4.0),
            f"{stream}_skip_step": skip_step,
        }
    return Case(shape, rng.randrange(2**32), row)


def _shape(rng: random.Random) -> ToyShape:
    kv_heads = rng.randint(1, 3)
    gemma_heads = kv_heads * rng.randint(1, 3)
    return ToyShape(
        layers=rng.randint(1, 4),
        heads=rng.randint(1, 6),
        head_dim=rng.randrange(12, 49, 2),
        audio_head_dim=rng.randrange(8, 33, 2),
        connector_layers=rng.randint(1, 3),
        gemma_hidden=2 * gemma_heads * rng.randint(4, 10),
        gemma_layers=rng.randint(1, 5),
        gemma_heads=gemma_heads,
        gemma_kv_heads=kv_heads,
        upsampler_channels=rng.choice((32, 64)),
        upsampler_blocks=rng.randint(1, 2),
        lora_rank=rng.randint(1, 12),
        # The latents do not depend on these, so they are the smallest.
        decoder_layers=(1, 1, 1, 1, 1),
        decoder_base=1,
        vocoder_channels=64,
        bwe_channels=32,
    )


def _number(rng: random.Random, low: float, high: float) -> float:
    return round(rng.uniform(low, high), 3)


def _sometimes(rng: random.Random, neutral: float, low: float, high: float) -> float:
    """Mostly a number between `low` and `high`, at times the one that turns the feature off."""
    return neutral if rng.random() < 0.2 else _number(rng, low, high)


def _prompt(rng: random.Random) -> str:
    # 900 words make more than the 1,024 tokens that a prompt is cut to.
    words = rng.choices(_WORDS, k=900 if rng.random() < 0.1 else rng.randint(1, 40))
    return rng.choice(("", " ", "\n")) + " ".join(words)


def _user_lora(path: Path, files: dict[str, str], seed: int) -> str:
    """A LoRA of another rank and dtype, for some of the layers that the distilled one covers."""
    rng, generator, tensors = random.Random(seed), torch.Generator().manual_seed(seed), {}
    rank, dtype = rng.randint(1, 8), rng.choice((torch.float32, torch.float16, torch.bfloat16))
    with safe_open(files["distilled_lora"], "pt") as file:
        names = sorted(name for name in file.keys() if name.endswith(".lora_A.weight"))  # noqa: SIM118
        sizes = {name: file.get_slice(name).get_shape()[1] for name in names}
        outs = {name: file.get_slice(name.replace("lora_A", "lora_B")).get_shape()[0] for name in names}
    for name in rng.sample(names, rng.randint(1, len(names))):
        a = torch.randn((rank, sizes[name]), generator=generator) / sizes[name] ** 0.5
        b = torch.randn((outs[name], rank), generator=generator) * 0.05 / rank**0.5
        tensors[name], tensors[name.replace("lora_A", "lora_B")] = a.to(dtype), b.to(dtype)
    save_file(tensors, path)
    return str(path)
