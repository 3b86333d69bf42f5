"""Distillation of the guided DiT into a LoRA, which needs few steps and no guidance.

At each noise level of the distilled schedule, the student learns the velocity that leads in one step to where the
guided teacher comes in several. It learns at noised clips, and at the states that its own steps lead to. At a strength
below 1, it learns a mixture of that velocity and the teacher's unguided one, because the hq pipeline adds a part of the
LoRA to guided sampling.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.func import functional_call

from ltx_ray.miniature import gemma
from ltx_ray.miniature.config import ACTIVE_AUDIO, ACTIVE_VIDEO, LORA_RANK
from ltx_ray.model.transformer import NO_PERTURBATION, Modality, Transformer
from ltx_ray.presets import DISTILLED_SIGMAS, STAGE2_SIGMAS
from ltx_ray.records import AV
from ltx_ray.toy import save_tensors
from scripts.miniature_training import rendering
from scripts.miniature_training.diffusion import (
    LARGE,
    SMALL,
    Batches,
    Kind,
    TrainingSize,
    dtype_on,
    load,
    prepare_device,
)
from scripts.miniature_training.diffusion import SMOKE as DIFFUSION_SMOKE
from scripts.miniature_training.flow import (
    ACTIVE,
    FIRST_SOUND_WEIGHT,
    NoisyBatch,
    Ropes,
    TextAndDit,
    denoise_mask,
    noisy_inputs,
    ropes_of,
)
from scripts.miniature_training.graphs import RecordedLosses
from scripts.miniature_training.latent_pool import FrozenEncoders
from scripts.miniature_training.loop import Budget, Trainer, weights_of
from scripts.miniature_training.prompts import FrozenGemma, TrainingPrompts

#: Number of the first level of stage 2 in the distilled schedule.
_STAGE2_INDEX = DISTILLED_SIGMAS.index(STAGE2_SIGMAS[0])
#: Steps with a strength of 1; the others have one between the bounds.
_FULL_STRENGTH, _STRENGTHS = 0.6, (0.1, 0.9)
#: Strengths with which the hq pipeline adds the LoRA.
_HQ_STRENGTH = 0.25

_KINDS = (
    Kind(SMALL, share=8),
    Kind(LARGE, share=2),
    Kind(LARGE, share=5, refined=True),
    Kind(SMALL, share=2, image=True),
    Kind((121, 128, 192)),
    Kind((65, 192, 128), 30.0),
    Kind((17, 192, 192), 12.0),
    Kind((33, 384, 256), refined=True),
)


@dataclass(frozen=True)
class LoraSize:
    """Sizes of steps and of the score, the teacher's steps between two levels of the student, and its guidance."""

    training: TrainingSize
    teacher_steps: int = 4
    guidance: AV[float] = AV(2.0, 2.0)  # noqa: RUF009 (immutable)


FULL = LoraSize(TrainingSize(tokens=61_440, rows=256, draws=1, few_tokens=0, kinds=_KINDS))
SMOKE = LoraSize(DIFFUSION_SMOKE, teacher_steps=2)


# --- the student -------------------------------------------------------------------------------------------------


class LoraFactors(torch.nn.Module):
    """A LoRA of rank LORA_RANK for the linear layers of a transformer. At first it changes nothing.

    The embeddings of the noise level are left out. The layer after each of them is not, and all files of the miniature
    have to fit into 16 MB.
    """

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        weights = {name: weight for name, weight in transformer.named_parameters() if _is_adapted(name, weight)}
        self.names = [name.removesuffix(".weight") for name in weights]
        device = next(iter(weights.values())).device
        self.a = torch.nn.ParameterList(
            torch.randn(LORA_RANK, weight.shape[1], device=device) / math.sqrt(weight.shape[1])
            for weight in weights.values()
        )
        self.b = torch.nn.ParameterList(
            torch.zeros(len(weight), LORA_RANK, device=device) for weight in weights.values()
        )
        with torch.no_grad():
            for name, active in (("patchify_proj", ACTIVE_VIDEO), ("audio_patchify_proj", ACTIVE_AUDIO)):
                self.a[self.names.index(name)][:, active:] = 0

    def merged(self, transformer: Transformer, strength: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """All weights of the transformer in `dtype`, with the LoRA at `strength` (0-d)."""
        weights = {name: weight.detach() for name, weight in transformer.named_parameters()}
        for name, a, b in zip(self.names, self.a, self.b, strict=True):
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + strength * (b @ a)
        return {name: weight.to(dtype) for name, weight in weights.items()}

    def released(self) -> dict[str, torch.Tensor]:
        """The factors under the released names."""
        named: dict[str, torch.Tensor] = {}
        for name, a, b in zip(self.names, self.a, self.b, strict=True):
            named |= {f"diffusion_model.{name}.lora_A.weight": a, f"diffusion_model.{name}.lora_B.weight": b}
        return named


def _is_adapted(name: str, weight: torch.Tensor) -> bool:
    """Whether the weight is that of an adapted linear layer. Tables have two dimensions too, but another name."""
    return name.endswith(".weight") and weight.dim() == 2 and ".timestep_embedder." not in name


# --- states ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class States:
    """Clips on their way: used channels (B, T, C) of both streams, number of the noise level (B,), prompts (B,)."""

    latents: AV[torch.Tensor]
    level: torch.Tensor
    prompts: torch.Tensor


class Rollouts:
    """States that the student's own steps lead to, for one kind of clips."""

    def __init__(self, batches: Batches, kind: Kind, rows: int, sigmas: torch.Tensor) -> None:
        self._batches, self._kind, self._rows, self._sigmas = batches, kind, rows, sigmas
        self.states = self._begun()
        # Rows begin at different steps, so that a batch has states of all levels.
        self._wait = torch.arange(rows, device=sigmas.device) % (len(DISTILLED_SIGMAS) - 1 - self._first)

    @property
    def _first(self) -> int:
        return _STAGE2_INDEX if self._kind.refined else 0

    def _begun(self) -> States:
        latents, prompts = self._batches.draw(self._kind, self._rows)
        level = torch.full((self._rows,), self._first, device=self._sigmas.device)
        return States(noised(latents, self._batches.noise(latents), self._sigmas[level]), level, prompts)

    def advance(self, latents: AV[torch.Tensor]) -> None:
        """Go on from `latents`, where the student's step has led. Finished clips are replaced by new ones."""
        old, new = self.states, self._begun()
        waits = self._wait > 0
        level = torch.where(waits, old.level, old.level + 1)
        ends = level == len(DISTILLED_SIGMAS) - 1

        def chosen(before: torch.Tensor, after: torch.Tensor, begun: torch.Tensor) -> torch.Tensor:
            wide = (slice(None), *[None] * (before.dim() - 1))
            return torch.where(ends[wide], begun, torch.where(waits[wide], before, after))

        self.states = States(
            old.latents.map(chosen, latents, new.latents),
            chosen(old.level, level, new.level),
            chosen(old.prompts, old.prompts, new.prompts),
        )
        self._wait = (self._wait - 1).clamp(min=0)


def noised(latents: AV[torch.Tensor], noise: AV[torch.Tensor], sigma: torch.Tensor) -> AV[torch.Tensor]:
    """Latents (B, T, C) at noise levels `sigma` (B,)."""
    return latents.map(lambda x0, n: torch.lerp(x0, n, sigma[:, None, None]), noise)


# --- distillation ------------------------------------------------------------------------------------------------


class Distillation:
    """The losses of each kind of step, as functions that can be recorded."""

    def __init__(self, base: TextAndDit, student: LoraFactors, prompts: TrainingPrompts, size: LoraSize, device: str):
        self._base, self._student, self._prompts, self._size, self._device = base, student, prompts, size, device
        self._ropes: dict[Kind, Ropes] = {}
        self.sigmas = torch.tensor(DISTILLED_SIGMAS, device=device)
        self._weights = {name: weight.to(base.dtype) for name, weight in base.transformer.named_parameters()}
        with torch.no_grad():
            negative = torch.tensor([prompts.negative(1)], device=device)
            self._negative = base.contexts(*prompts.states(negative))

    def of(self, kind: Kind) -> Callable[..., dict[str, torch.Tensor]]:
        """Losses, and where the student's steps lead ("video next", "audio next")."""
        if kind not in self._ropes:
            self._ropes[kind] = ropes_of(self._base.transformer, kind.shape, self._base.dtype, self._device)

        def losses(
            video: torch.Tensor,
            audio: torch.Tensor,
            level: torch.Tensor,
            prompts: torch.Tensor,
            strength: torch.Tensor,
            held: torch.Tensor | None = None,
        ) -> dict[str, torch.Tensor]:
            states = AV(video, audio)
            with torch.no_grad():
                contexts = self._base.contexts(*self._prompts.states(prompts))
                wanted, unguided = self._teacher(kind, states, level, contexts, held)
            weights = self._student.merged(self._base.transformer, strength, self._base.dtype)
            found = self._velocities(kind, weights, states, self.sigmas[level], contexts, held)
            mixture = wanted.map(lambda to, plain: plain + strength * (to - plain), unguided)
            counted = self._free(kind, held, states)
            counted.audio[:, 0] = FIRST_SOUND_WEIGHT
            errors = found.map(lambda v, to, w: ((v - to).square() * w).mean(), mixture, counted)
            before = unguided.map(lambda v, to, w: ((v - to).square() * w).mean(), wanted, counted)
            step = self._steps(level)
            nexts = states.map(lambda x, v: x + v.detach() * step, found)
            return {
                "loss": errors.video + errors.audio,
                "video": errors.video,
                "audio": errors.audio,
                "video without": before.video,
                "audio without": before.audio,
                "video next": nexts.video,
                "audio next": nexts.audio,
            }

        return losses

    def _steps(self, level: torch.Tensor) -> torch.Tensor:
        return (self.sigmas[level + 1] - self.sigmas[level])[:, None, None]

    def _free(self, kind: Kind, held: torch.Tensor | None, states: AV[torch.Tensor]) -> AV[torch.Tensor]:
        """The denoise mask (B, T, 1) of both streams."""
        free = states.map(lambda x: torch.ones_like(x[..., :1]))
        if held is None:
            return free
        frame_tokens = kind.shape.latent_height * kind.shape.latent_width
        return AV(denoise_mask(held, states.video.shape[1], frame_tokens)[..., None], free.audio)

    def _velocities(
        self,
        kind: Kind,
        weights: dict[str, torch.Tensor],
        states: AV[torch.Tensor],
        sigma: torch.Tensor,
        contexts: AV[torch.Tensor],
        held: torch.Tensor | None,
    ) -> AV[torch.Tensor]:
        frame_tokens = kind.shape.latent_height * kind.shape.latent_width
        # The states are noised already, so both ends of the noising are the states themselves.
        batch = NoisyBatch(states, states, sigma, contexts.video, contexts.video, held)
        inputs: AV[Modality]
        inputs, _ = noisy_inputs(batch, contexts, self._ropes[kind], frame_tokens, self._base.dtype)
        found = functional_call(self._base.transformer, weights, (inputs, NO_PERTURBATION))
        return found.map(lambda v, active: v[..., :active].float(), ACTIVE)

    def _teacher(
        self,
        kind: Kind,
        states: AV[torch.Tensor],
        level: torch.Tensor,
        contexts: AV[torch.Tensor],
        held: torch.Tensor | None,
    ) -> tuple[AV[torch.Tensor], AV[torch.Tensor]]:
        """The mean velocity of the guided teacher until the next level, and its first one without guidance."""
        count, free = self._size.teacher_steps, self._free(kind, held, states)
        negative = contexts.map(lambda of_prompts, other: other.expand_as(of_prompts), self._negative)
        step = self._steps(level) / count
        x, first = states, None
        for number in range(count):
            sigma = self.sigmas[level] + number * step[:, 0, 0]
            plain = self._velocities(kind, self._weights, x, sigma, contexts, held)
            other = self._velocities(kind, self._weights, x, sigma, negative, held)
            first = first or plain
            guided = plain.map(lambda c, u, scale: c + (scale - 1) * (c - u), other, self._size.guidance)
            x = x.map(lambda x, v, w: x + v * w * step, guided, free)
        assert first is not None
        # Where tokens are held, only a part of the velocity moves them.
        mean = states.map(lambda a, b, w: (b - a) / (count * step * w.clamp(min=1e-3)), x, free)
        return mean, first


# --- training ----------------------------------------------------------------------------------------------------


def train(
    folder: Path, budget: Budget, seed: int, device: str, size: LoraSize, start: Path | None = None
) -> dict[str, float]:
    """Distil the DiT of weights_of("transformer"), export `folder/distilled_lora.safetensors` and return its score.

    Training resumes from the checkpoint in `folder`, otherwise it starts from a LoRA that changes nothing.
    """
    if start is not None:
        raise ValueError(f"--start {start}; legal: nothing, because a LoRA starts from its base alone")
    prepare_device(seed)
    training, dtype = size.training, dtype_on(device)
    transformer, vae, sounds = (weights_of(part, folder) for part in ("transformer", "vae", "audio"))
    gemma.write_gemma(folder / "gemma")
    prompts = TrainingPrompts(FrozenGemma(folder / "gemma", dtype, device), training.scenes, training.others, seed)
    base = TextAndDit(dtype).to(device).requires_grad_(False)
    load(base, transformer)
    trainer = Trainer(LoraFactors(base.transformer), folder, budget, rate=1e-3, warmup=200, average_over=500)
    encoders = FrozenEncoders(vae, sounds, dtype, device)
    batches = Batches(training, prompts, encoders, seed * 1_000_003 + trainer.step)
    print(f"{len(prompts)} prompts, {len(batches)} clips", flush=True)
    distillation = Distillation(base, trainer.module, prompts, size, device)
    steps = Steps(batches, distillation, training, random.Random(f"lora {seed} {trainer.step}"))
    recorded = RecordedLosses(trainer.weights.values())
    trainer.run(lambda number: steps.run(number, recorded), show_every=training.show_every)
    write(trainer.average, folder / "distilled_lora.safetensors")
    return score(folder, device, training)


def write(student: LoraFactors, path: Path) -> None:
    """Write the LoRA's file."""
    factors = {name: factor.detach().to("cpu", torch.bfloat16) for name, factor in student.released().items()}
    save_tensors(path, factors, {"format": "pt"})


class Steps:
    """Chooses the kind, states and strength of each step. Half of the states are the student's own."""

    def __init__(self, batches: Batches, distillation: Distillation, size: TrainingSize, rng: random.Random) -> None:
        self._batches, self._distillation, self._size, self._rng = batches, distillation, size, rng
        self._rollouts: dict[Kind, Rollouts] = {}

    def run(self, number: int, recorded: RecordedLosses) -> dict[str, torch.Tensor]:
        """One step's losses. The gradients are set."""
        kind = self._size.kind_of(number, self._rng)
        strength = 1.0 if self._rng.random() < _FULL_STRENGTH else self._rng.uniform(*_STRENGTHS)
        self._batches.renew_in_turn(kind, number)
        sigmas = self._distillation.sigmas
        rows = self._size.rows_of(kind.shape)
        own = 0 if kind.image else rows // 2
        clips, prompts = self._batches.draw(kind, rows - own)
        level = self._batches.integers(rows - own, _STAGE2_INDEX if kind.refined else 0, len(DISTILLED_SIGMAS) - 1)
        noise = self._batches.noise(clips)
        held = None
        if kind.image:
            held = self._batches.held(rows)
            latents = self._held_noised(kind, clips, noise, sigmas[level], held)
        else:
            latents = noised(clips, noise, sigmas[level])
        if own:
            if kind not in self._rollouts:
                self._rollouts[kind] = Rollouts(self._batches, kind, own, sigmas)
            states = self._rollouts[kind].states
            latents = latents.map(lambda a, b: torch.cat((a, b)), states.latents)
            level, prompts = torch.cat((level, states.level)), torch.cat((prompts, states.prompts))
        inputs = [*latents, level, prompts, torch.tensor(strength, device=level.device)]
        found = recorded(kind, self._distillation.of(kind), *inputs, *([] if held is None else [held]))
        if own and strength == 1:
            nexts = AV(found["video next"], found["audio next"])
            self._rollouts[kind].advance(nexts.map(lambda x: x[rows - own :].clone()))
        return {name: value for name, value in found.items() if value.dim() == 0}

    def _held_noised(
        self, kind: Kind, clips: AV[torch.Tensor], noise: AV[torch.Tensor], sigma: torch.Tensor, held: torch.Tensor
    ) -> AV[torch.Tensor]:
        frame_tokens = kind.shape.latent_height * kind.shape.latent_width
        levels = sigma[:, None] * denoise_mask(held, clips.video.shape[1], frame_tokens)
        return AV(torch.lerp(clips.video, noise.video, levels[..., None]), noised(clips, noise, sigma).audio)


# --- score -------------------------------------------------------------------------------------------------------


def score(folder: Path, device: str, size: TrainingSize) -> dict[str, float]:
    """Fractions of held-out prompts rendered correctly.

    "distilled": with the LoRA at 1, without guidance, at the distilled levels. "without": the same without the LoRA.
    "hq": guided, with the LoRA at a quarter.
    """
    whole = folder / "whole.safetensors"
    parts = ("vae", "audio", "transformer")
    rendering.join_parts(whole, *(weights_of(part, folder) for part in parts))
    renderer = rendering.Renderer(whole, folder / "gemma", device, folder / "distilled_lora.safetensors")
    shape = size.scored_shape
    found: dict[str, float] = {}
    for name, pipeline, count, changes in (
        ("distilled", "distilled", size.scored, {"distilled_lora_strength_stage_1": 1.0}),
        ("without", "distilled", size.scored, {"distilled_lora_strength_stage_1": 0.0}),
        ("hq", "hq", max(1, size.scored // 3), {
            "distilled_lora_strength_stage_1": _HQ_STRENGTH, "num_inference_steps": size.scored_steps,
        }),
    ):  # fmt: skip
        scores = rendering.score_prompts(renderer, pipeline, shape, count, folder / f"clips-{name}.png", **changes)
        found |= {f"{name} {key}": value for key, value in scores.items()}
    return found
