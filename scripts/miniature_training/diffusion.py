"""Training of the text projections, connectors and DiT together, by flow matching on latents of generated clips.

Clips, latents, hidden states of prompts and noise are made on the device. `flow.py` has the loss.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from ltx_ray.miniature import export, gemma, world
from ltx_ray.model.transformer import Perturbation
from ltx_ray.records import AV
from ltx_ray.shapes import ClipShape
from scripts.miniature_training import rendering
from scripts.miniature_training.flow import NoisyBatch, Ropes, TextAndDit, flow_losses, ropes_of, takes_muon
from scripts.miniature_training.graphs import RecordedLosses
from scripts.miniature_training.latent_pool import FrozenEncoders, LatentPool
from scripts.miniature_training.loop import Budget, Trainer, weights_of
from scripts.miniature_training.prompts import NEGATIVES, FrozenGemma, TrainingPrompts

#: Fraction of prompts replaced by each of the negative ones.
_DROPPED = 0.05
#: Shift of half of the noise levels, near that of stage 1's schedules; the others are spread evenly.
_SHIFT = 4.0
#: Fraction of noise levels that are the first of stage 1, and the first of stage 2.
_FIRST, _STAGE2_LEVEL = 0.03, 0.92
#: Largest noise level of held tokens, as a fraction of the clip's, in half of the clips; the others are held entirely.
_FREE = 0.5
#: Noise levels at which the loss over held-out clips is shown.
_VALIDATED = (1.0, 0.95, 0.8, 0.5, 0.2)
#: Steps for which a clip of the pool is used on average, and steps between renewals of a pool.
_USES, _RENEW_EVERY = 12, 4


@dataclass(frozen=True)
class Kind:
    """Training steps that are recorded as one graph: clips of one size.

    `pixels` are frames, height, width. `share` is relative to other kinds. `image`: some clips have a first frame.
    `isolated`: without the attention between the streams. `refined`: noise levels are those of stage 2.
    """

    pixels: tuple[int, int, int]
    frame_rate: float = 24.0
    share: float = 1.0
    image: bool = False
    isolated: bool = False
    refined: bool = False

    @property
    def shape(self) -> ClipShape:
        return ClipShape(*self.pixels, self.frame_rate)


SMALL, LARGE = (33, 128, 192), (33, 256, 384)
_KINDS = (
    Kind(SMALL, share=12),
    Kind(SMALL, share=3, image=True),
    Kind(SMALL, share=2, isolated=True),
    Kind(LARGE, share=4),
    Kind(LARGE, share=7, refined=True),
    Kind(LARGE, share=2, image=True),
    Kind((9, 192, 192), 12.0),
    Kind((17, 192, 128), 30.0),
    Kind((25, 128, 256), 25.0, image=True),
    Kind((41, 160, 96), 24.0, isolated=True),
    Kind((65, 128, 192), 24.0, share=2),
    Kind((121, 128, 192), 24.0, share=2),
    Kind((121, 96, 160), 30.0),
    Kind((49, 224, 128), 25.0),
    Kind((17, 320, 448), 24.0, refined=True),
    Kind((33, 384, 256), 24.0, image=True),
    Kind((65, 64, 128), 16.0),
)


@dataclass(frozen=True)
class TrainingSize:
    """Sizes of training and of its score.

    A step has about `tokens` video tokens, and at most `rows` clips, of which `draws` are one clip with other noise, or
    twice as many where a clip has at most `few_tokens`. They share their text, which takes most of a small clip's time.
    `rows` and `draws` are powers of two.
    `others` prompts of a scene are beyond the world's phrasings. `scored` prompts and `images` images are rendered at
    `scored_shape`. Training knows every `scene_step`-th scene of the split.
    """

    tokens: int = 122_880
    rows: int = 512
    draws: int = 2
    few_tokens: int = 256
    others: int = 63
    kinds: tuple[Kind, ...] = _KINDS
    scored: int = 48
    images: int = 12
    scored_shape: ClipShape = Kind(SMALL).shape
    scored_steps: int = 15
    scene_step: int = 1
    show_every: int = 200

    def kind_of(self, step: int, rng: random.Random) -> Kind:
        """The kind of a step. The first steps go through all, so that one that fails does so at once."""
        return self.kinds[step] if step < len(self.kinds) else rng.choices(self.kinds, [k.share for k in self.kinds])[0]

    def rows_of(self, shape: ClipShape) -> int:
        """Clips of a step of this shape: a power of two."""
        return min(self.rows, max(2 * self.draws, 2 ** int(math.log2(self.tokens / shape.video_tokens))))

    def draws_of(self, shape: ClipShape) -> int:
        """Clips of a step that are the same but for their noise and the strength of their first frame."""
        return self.draws * (2 if shape.video_tokens <= self.few_tokens else 1)

    @property
    def scenes(self) -> Sequence[world.Scene]:
        return world.scenes("train")[:: self.scene_step]


FULL = TrainingSize()
_TINY = (9, 64, 96)
SMOKE = TrainingSize(
    tokens=100,
    few_tokens=12,
    others=2,
    kinds=(Kind(_TINY), Kind(_TINY, image=True), Kind((17, 64, 96), 12.0, isolated=True, refined=True)),
    scored=1,
    images=1,
    scored_shape=ClipShape(*_TINY, 24.0),
    scored_steps=2,
    scene_step=1000,
)


# --- batches -----------------------------------------------------------------------------------------------------


class Batches:
    """Random batches of all kinds, on one device."""

    def __init__(self, size: TrainingSize, prompts: TrainingPrompts, encoders: FrozenEncoders, seed: int) -> None:
        self._size, self._prompts = size, prompts
        self.generator = torch.Generator(encoders.device).manual_seed(seed)
        self._pools = {
            shape: LatentPool(encoders, shape, size.scenes, 4 * size.rows_of(shape), f"{seed}")
            for shape in dict.fromkeys(kind.shape for kind in size.kinds)
        }

    def __len__(self) -> int:
        return sum(map(len, self._pools.values()))

    def renew_in_turn(self, kind: Kind, step: int) -> None:
        """In some steps, encode new clips of a kind, for as many steps as lie between two renewals."""
        if step % _RENEW_EVERY == 0:
            clips = self._size.rows_of(kind.shape) // self._size.draws_of(kind.shape)
            self._pools[kind.shape].renew(max(1, clips * _RENEW_EVERY // _USES))

    def draw(self, kind: Kind, count: int) -> tuple[AV[torch.Tensor], torch.Tensor]:
        """Latents of `count` random clips, and their prompts (count,), some of them negative."""
        drawn = self._pools[kind.shape].draw(count, self.generator)
        prompts = self._prompts.draw(drawn.scenes, self.generator)
        chance = self._uniform(count)
        for number in range(len(NEGATIVES)):
            dropped = (chance >= number * _DROPPED) & (chance < (number + 1) * _DROPPED)
            prompts = torch.where(dropped, self._prompts.negative(number), prompts)
        return drawn.latents, prompts

    def inputs(self, kind: Kind) -> tuple[torch.Tensor, ...]:
        """What KindLosses takes: latents and noise of both streams, noise levels and prompts, and with images the mask.

        There is one level and one prompt for each `draws_of(kind.shape)` clips that follow each other.
        """
        rows, draws = self._size.rows_of(kind.shape), self._size.draws_of(kind.shape)
        assert rows % draws == 0, (rows, draws)
        clips, prompts = self.draw(kind, rows // draws)
        latents = clips.map(lambda x: x.repeat_interleave(draws, 0))
        sigma = draw_sigmas(self.generator, rows // draws, _STAGE2_LEVEL if kind.refined else 1.0)
        inputs = (*latents, *self.noise(latents), sigma, prompts)
        return (*inputs, self.held(rows)) if kind.image else inputs

    def held(self, count: int) -> torch.Tensor:
        """Denoise masks (count,) of first frames, 0 where an image is held entirely.

        Of four clips, about one has no image, and one or two have an image of a lower strength.
        """
        partly = _FREE * self._uniform(count) * (self._uniform(count) < 0.5)
        return torch.where(self._uniform(count) < 0.25, 1.0, partly)

    def noise(self, latents: AV[torch.Tensor]) -> AV[torch.Tensor]:
        """Standard normal numbers of the shapes of `latents`."""
        device = self.generator.device
        return latents.map(lambda x: torch.randn(x.shape, generator=self.generator, device=device))

    def integers(self, count: int, low: int, high: int) -> torch.Tensor:
        """Random integers (count,) from `low` to `high` - 1."""
        return torch.randint(low, high, (count,), generator=self.generator, device=self.generator.device)

    def _uniform(self, count: int) -> torch.Tensor:
        return torch.rand(count, generator=self.generator, device=self.generator.device)


class KindLosses:
    """The losses of each kind of step, as functions of what Batches.inputs gives."""

    def __init__(self, model: TextAndDit, prompts: TrainingPrompts, device: str) -> None:
        self._model, self._prompts, self._device = model, prompts, device
        self._ropes: dict[ClipShape, Ropes] = {}

    def of(self, kind: Kind) -> Callable[..., dict[str, torch.Tensor]]:
        """The losses of a kind. The function draws no random numbers, so that it can be recorded."""

        def losses(
            video: torch.Tensor,
            audio: torch.Tensor,
            video_noise: torch.Tensor,
            audio_noise: torch.Tensor,
            prompt_sigma: torch.Tensor,
            prompts: torch.Tensor,
            held: torch.Tensor | None = None,
        ) -> dict[str, torch.Tensor]:
            latents, noise = AV(video, audio), AV(video_noise, audio_noise)
            return self.of_batch(kind, NoisyBatch(latents, noise, prompt_sigma, *self._prompts.states(prompts), held))

        return losses

    def of_batch(self, kind: Kind, batch: NoisyBatch) -> dict[str, torch.Tensor]:
        """The losses of a batch."""
        shape = kind.shape
        if shape not in self._ropes:
            self._ropes[shape] = ropes_of(self._model.transformer, shape, self._model.dtype, self._device)
        frame_tokens = shape.latent_height * shape.latent_width
        return flow_losses(self._model, batch, self._ropes[shape], frame_tokens, Perturbation(isolated=kind.isolated))


def draw_sigmas(generator: torch.Generator, count: int, top: float) -> torch.Tensor:
    """Noise levels (count,) in (0, top], of which half are shifted to the upper end, in a random order.

    They are drawn in strata, so that the losses of two batches differ little.
    """
    device = generator.device
    order = torch.randperm(count, generator=generator, device=device)
    even = (order + torch.rand(count, generator=generator, device=device)) / count
    first = torch.rand(count, generator=generator, device=device) < _FIRST
    shifted = torch.arange(count, device=device) % 2 == 0
    levels = torch.where(shifted, _SHIFT * even / (1 + (_SHIFT - 1) * even), even)
    return (torch.where(first, 1.0, levels) * top).clamp(min=1e-3)


# --- training ----------------------------------------------------------------------------------------------------


def prepare_device(seed: int) -> None:
    """Seed torch's global generator, and keep attention off cuDNN, which plans for seconds for every new size."""
    torch.manual_seed(seed)
    torch.backends.cuda.enable_cudnn_sdp(False)


def dtype_on(device: str) -> torch.dtype:
    """The dtype in which the engine computes on `device`."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def train(
    folder: Path, budget: Budget, seed: int, device: str, size: TrainingSize, start: Path | None = None
) -> dict[str, float]:
    """Train all three, export them to `folder/transformer.safetensors` and return their score.

    Gemma is written to `folder/gemma`. Training resumes from the checkpoint in `folder`. Without one it starts from the
    exported file `start`, and without that from random weights.
    """
    prepare_device(seed)
    dtype = dtype_on(device)
    vae, sounds = weights_of("vae", folder), weights_of("audio", folder)
    gemma.write_gemma(folder / "gemma")
    prompts = TrainingPrompts(FrozenGemma(folder / "gemma", dtype, device), size.scenes, size.others, seed)
    model = TextAndDit(dtype).to(device)
    if start is not None:
        load(model, start)
    else:
        model.prepare(
            *prompts.states(torch.arange(0, prompts.each * len(size.scenes), prompts.each, device=device)[:32])
        )
    trainer = Trainer(
        model, folder, budget, rate=2e-3, warmup=300, average_over=1000, muon_rate=0.01, takes_muon=takes_muon
    )
    encoders = FrozenEncoders(vae, sounds, dtype, device)
    batches = Batches(size, prompts, encoders, seed * 1_000_003 + trainer.step)
    print(f"{len(prompts)} prompts, {len(batches)} clips", flush=True)
    losses = KindLosses(model, prompts, device)
    rng = random.Random(f"dit {seed} {trainer.step}")
    recorded = RecordedLosses(trainer.weights.values())

    def step(number: int) -> dict[str, torch.Tensor]:
        kind = size.kind_of(number, rng)
        batches.renew_in_turn(kind, number)
        return recorded(kind, losses.of(kind), *batches.inputs(kind))

    trainer.run(step, show_every=size.show_every)
    write(trainer.average, folder / "transformer.safetensors")
    validated = validate(trainer.average, prompts, encoders, size, device)
    return {**validated, **score(folder, device, size)}


def write(model: TextAndDit, path: Path) -> None:
    """Write the part's file."""
    connectors = export.released_connectors(model.connectors.state_dict())
    export.save_part(path, {**export.released_transformer(model.transformer.state_dict()), **connectors})


def load(model: TextAndDit, path: Path) -> None:
    """Fill the model with the tensors of a part's file."""
    tensors = load_file(str(path))
    for module, released in (
        (model.connectors, export.released_connectors),
        (model.transformer, export.released_transformer),
    ):
        state = module.state_dict()
        names = released({key: torch.tensor(number) for number, key in enumerate(state)})
        keys = list(state)
        module.load_state_dict({keys[int(number)]: tensors[name].float() for name, number in names.items()})


# --- score -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(
    model: TextAndDit, prompts: TrainingPrompts, encoders: FrozenEncoders, size: TrainingSize, device: str
) -> dict[str, float]:
    """Errors of the velocity in both streams at some noise levels, of held-out scenes in phrasings of the training."""
    shape = size.scored_shape
    scenes = world.scenes("held_out")[:: max(1, len(world.scenes("held_out")) // (4 * size.scored))]
    pool = LatentPool(encoders, shape, scenes, 4 * size.scored, "validation")
    generator = torch.Generator(device).manual_seed(0)
    drawn = pool.draw(4 * size.scored, generator)
    rng = random.Random("validation")
    texts = [rng.choice(world.prompts(scenes[number], "train")) for number in drawn.scenes.tolist()]
    hidden, mask = prompts.gemma.hidden_states(texts).padded(torch.arange(len(texts), device=device))
    noise = drawn.latents.map(lambda x: torch.randn(x.shape, generator=generator, device=device))
    losses = KindLosses(model, prompts, device)
    found: dict[str, float] = {}
    for level in _VALIDATED:
        sigma = torch.full((len(texts),), level, device=device)
        batch = NoisyBatch(drawn.latents, noise, sigma, hidden, mask)
        errors = losses.of_batch(Kind((shape.num_frames, shape.height, shape.width), shape.frame_rate), batch)
        found |= {f"{stream} loss at {level}": float(errors[stream]) for stream in ("video", "audio")}
    return found


def score(folder: Path, device: str, size: TrainingSize) -> dict[str, float]:
    """Fractions of held-out prompts that stage 1 of the hq pipeline renders correctly, and of images that it keeps."""
    whole = folder / "whole.safetensors"
    parts = (weights_of("vae", folder), weights_of("audio", folder), folder / "transformer.safetensors")
    rendering.join_parts(whole, *parts)
    renderer = rendering.Renderer(whole, folder / "gemma", device)
    off = {"num_inference_steps": size.scored_steps, "distilled_lora_strength_stage_1": 0.0}
    shape, sheet = size.scored_shape, folder / "clips.png"
    found = rendering.score_prompts(renderer, "hq", shape, size.scored, sheet, **off)
    return {**found, **rendering.score_images(renderer, "hq", shape, size.images, folder, **off)}
