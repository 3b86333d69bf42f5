"""The diffusion engine: one rank of a replica that renders stage 1 and stage 2.

Every rank of a gang runs the same call on the same inputs; rank 0's result counts. Source of the
order of things: `ti2vid_two_stages_hq.py` and `blocks.py` of the reference v1.2.0.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ltx_ray.checkpoints.checkpoint import open_checkpoint
from ltx_ray.checkpoints.digests import cache_root
from ltx_ray.checkpoints.lora import open_lora
from ltx_ray.config import EngineSpec
from ltx_ray.engine import codec, components
from ltx_ray.engine.base import Rank, resolve_dtype
from ltx_ray.engine.initial_state import ImageConditioning, LatentState, begin, latent_sizes
from ltx_ray.model.fused import FusedTransformer
from ltx_ray.model.graphs import GraphedTransformer
from ltx_ray.model.packing import pack
from ltx_ray.model.transformer import NO_PERTURBATION, Modality, Perturbation, Transformer
from ltx_ray.parallel.layers import TPGroup
from ltx_ray.parallel.loading import load_shard
from ltx_ray.parallel.lora import LoraMerger, LoraSetting
from ltx_ray.parallel.mesh import make_mesh
from ltx_ray.presets import PIPELINES, STAGE_2_SIGMAS
from ltx_ray.records import (
    AV,
    Conditions,
    EngineFacts,
    Guidance,
    ImageLatents,
    NoiseLedger,
    PromptContext,
    ReplicaError,
    RowError,
    StageLatents,
    WorkItem,
    canonical_json,
)
from ltx_ray.sampling.euler import sample_euler
from ltx_ray.sampling.guidance import PAIR, PAIRED, GuidedDenoiser, RunPass, make_all, make_pair
from ltx_ray.sampling.noise import ClipNoise, SamplerNoise, check_drawable
from ltx_ray.sampling.passes import wants_perturbed
from ltx_ray.sampling.res2s import Denoise, sample_res2s
from ltx_ray.sampling.sigmas import shifted_sigmas
from ltx_ray.shapes import AUDIO_BINS, AUDIO_CHANNELS, ClipShape
from ltx_ray.stages import Stage

SAMPLERS: dict[str, Callable[..., AV[torch.Tensor]]] = {"res_2s": sample_res2s, "euler": sample_euler}


#: Device memory that stays free: for the activations of a large clip, and for text and decode on a shared card.
_ACTIVATION_BYTES = 16 * 2**30
_NEIGHBOUR_BYTES = 40 * 2**30
_log = logging.getLogger(__name__)


class DiffusionEngine:
    """Holds this rank's shard of the DiT, with LoRAs merged at the stage's strengths."""

    def __init__(self, spec: EngineSpec, rank: Rank):
        self.spec, self.rank = spec, rank
        self.device = torch.device(rank.device)
        self.dtype = resolve_dtype(spec.numerics.dtype)
        self.switches, self.switch_seconds = 0, 0.0
        self._merged = self._near = False
        self.facts = EngineFacts()

    def load(self) -> None:
        """Read this rank's slices; the LoRA is merged when the first call says at which strength."""
        # built once for all processes, and for all nodes where the cache is shared
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache_root() / "triton"))
        model = self.spec.model.local()
        checkpoint = open_checkpoint(model.checkpoint_path)
        layout = self.spec.layout
        self.mesh = make_mesh(self.rank.rank, self.rank.world, layout.tp)
        # Ranks with the same shard split the work of one stage, and each does all of the other's.
        self._guidance_parallel = layout.guidance_parallel > 1
        self._sequence_parallel = layout.sequence_parallel > 1
        tp = self.mesh.tp
        with torch.device("meta"):
            self.transformer = Transformer(checkpoint.transformer, tp)
        fused = self.spec.numerics.compile == "fused"
        if fused:
            pack(self.transformer, self.device, self.dtype, self.spec.numerics.precision)
        load_shard(self.transformer, checkpoint.tensors, tp, dtype=self.dtype, device=self.device)
        self._dit = self._fused_dit() if fused else self.transformer
        self._lora_names = [lora.name for lora in model.loras]
        paths = [lora.path for lora in model.loras] + ([model.distilled_lora] if model.distilled_lora else [])
        self._has_distilled = model.distilled_lora is not None
        loras = [open_lora(path).fit(checkpoint.linear_layers, checkpoint.path) for path in paths]
        self.merger = LoraMerger(self.transformer, checkpoint.tensors, loras, tp, self.mesh.wide)
        if layout.alternates:
            self._keep_near()  # otherwise at the first switch, which may never come
        self.facts = self._facts()
        if Stage.STAGE2 in layout.roles:
            self.upsampler = components.load_upsampler(model.spatial_upsampler_path, self.dtype, self.device)
            mean, std = components.latent_stats(model.checkpoint_path, "video")
            self.latent_stats = mean.to(self.device, self.dtype), std.to(self.device, self.dtype)

    def _fused_dit(self) -> FusedTransformer | GraphedTransformer:
        """Raises RuntimeError when this replica cannot compute as the run's numerics say."""
        dit = FusedTransformer(self.transformer, self.spec.numerics.attention)
        if self.device.type != "cuda":
            return dit
        dit.warm_up()
        return GraphedTransformer(dit)

    @torch.inference_mode()
    def run(self, stage: Stage, item: WorkItem, conditions: Conditions, *latents: StageLatents) -> StageLatents | None:
        """Render `stage` of `item`, stage 2 from the `latents` of stage 1.

        Returns the stage's latents on rank 0, None elsewhere. Raises RowError when they are not finite.
        """
        result = self._stage1(item, conditions) if stage == Stage.STAGE1 else self._stage2(item, conditions, *latents)
        for name, tensor in zip(("video", "audio"), result.latents, strict=True):
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise RowError(f"{bad} of {tensor.numel()} {name} latents are not finite")
        numerics = canonical_json(self.spec.numerics)
        stored = bool(latents) and latents[0].numerics not in ("", numerics)
        self.facts = self._facts(noise_ledger=result.ledger, stage_1_numerics=latents[0].numerics if stored else None)
        if self.rank.rank != 0:
            return None
        return StageLatents(result.latents.map(lambda t: t.cpu()), result.ledger, numerics)

    def _facts(self, **of_call: Any) -> EngineFacts:
        return EngineFacts(
            device_name=_device_name(self.device),
            clean_weights=self.merger.clean_weights,
            lora_factors=self.merger.lora_factors,
            **of_call,
        )

    def _stage1(self, item: WorkItem, conditions: Conditions) -> StageLatents:
        request, pipeline = item.request, PIPELINES[item.request.pipeline]
        self._merge(item, request.distilled_lora_strength_stage_1)
        shape = request.shape.half()
        noise = ClipNoise(self._new_ledger(request.seed), self.device)
        zeros = latent_sizes(shape).map(lambda size: torch.zeros(size, dtype=self.dtype, device=self.device))
        images = [self._placed(image, image.stage_1) for image in conditions.images]
        start = begin(shape, "stage_1", noise, _pack(zeros), 1.0, images)
        run_pass = self._passes(item, start, conditions)

        def run_guided(name: str, latents: AV, sigma: torch.Tensor, enabled: AV[bool]) -> AV[torch.Tensor]:
            # the reference copies the latents for its passes, and the copy is contiguous
            return run_pass(name, latents.map(lambda t: t.contiguous()), sigma, enabled)

        guidance = request.guidance.map(self._within_model)
        alone = make_pair if self.spec.numerics.guidance_batching > 1 else make_all
        share = self._share_passes if self._guidance_parallel else alone
        denoise = _unguided(run_pass) if pipeline.distilled else GuidedDenoiser(run_guided, guidance, share)
        if pipeline.sigmas is not None:
            sigmas = torch.tensor(pipeline.sigmas)
        else:
            sigmas = shifted_sigmas(request.num_inference_steps, pipeline.schedule_tokens or shape.video_tokens)
        latents = self._sample(pipeline.sampler, denoise, start, sigmas, noise.ledger)
        return StageLatents(_unpack(latents, shape), noise.ledger)

    def _stage2(self, item: WorkItem, conditions: Conditions, before: StageLatents) -> StageLatents:
        check_drawable(before.ledger, _device_name(self.device))
        request, pipeline = item.request, PIPELINES[item.request.pipeline]
        self._merge(item, request.distilled_lora_strength_stage_2)
        shape = request.shape
        noise = ClipNoise(before.ledger, self.device)
        video, audio = before.latents.map(lambda t: t.to(self.device, self.dtype))
        upscaled = codec.upsample_latents(self.upsampler, *self.latent_stats, video)
        packed = _pack(AV(upscaled, audio))
        images = [self._placed(image, image.stage_2) for image in conditions.images]
        start = begin(shape, "stage_2", noise, packed, STAGE_2_SIGMAS[0], images)
        spread = self.mesh.wide if self._sequence_parallel else TPGroup()
        denoise = _unguided(self._passes(item, start, replace(conditions, negative=None), spread))
        latents = self._sample(pipeline.sampler, denoise, start, torch.tensor(STAGE_2_SIGMAS), noise.ledger)
        return StageLatents(_unpack(latents, shape), noise.ledger)

    def _placed(self, image: ImageLatents, latent: torch.Tensor) -> ImageConditioning:
        return ImageConditioning(image.frame_idx, image.strength, latent.to(self.device, self.dtype))

    def _sample(
        self, sampler: str, denoise: Denoise, start: LatentState, sigmas: torch.Tensor, ledger: NoiseLedger
    ) -> AV[torch.Tensor]:
        noise = SamplerNoise(ledger.device)
        return start.trim(SAMPLERS[sampler](denoise, start.latents, sigmas, noise, start.blend))

    def _share_passes(
        self, names: tuple[str, ...], make: Callable[[str], AV[torch.Tensor]], like: AV[torch.Tensor]
    ) -> dict[str, AV[torch.Tensor]]:
        """Passes in turns over the ranks that hold the same shard, and every result to every one of them."""
        wide = self.mesh.wide
        own = {name: make(name) for name in names[wide.rank :: wide.size]}

        def sent(name: str, number: int) -> AV[torch.Tensor]:
            result = own[name].map(torch.Tensor.contiguous) if name in own else like.map(_empty_like)
            return result.map(lambda x: wide.broadcast_(x, number % wide.size))

        return {name: sent(name, number) for number, name in enumerate(names)}

    def _passes(
        self,
        item: WorkItem,
        start: LatentState,
        conditions: Conditions,
        spread: TPGroup = TPGroup(),  # noqa: B008 (frozen)
    ) -> RunPass:
        """The model as (pass name, latents, sigma, enabled) -> x0; `spread` shares the tokens out."""
        ropes = self._dit.ropes(start.positions, self.dtype)

        def on_device(prompt: PromptContext) -> AV[torch.Tensor]:
            return prompt.context.map(lambda t: t.to(self.device, self.dtype))

        contexts = {"cond": on_device(conditions.positive)}
        if conditions.negative is not None:
            contexts["uncond"] = on_device(conditions.negative)
            if self.spec.numerics.guidance_batching > 1:
                both = (contexts[name] for name in PAIR)
                contexts[PAIRED] = next(both).map(lambda a, b: torch.cat((a, b)), *both)
        guidance = item.request.guidance
        blocks = guidance.map(lambda g: frozenset(g.stg_blocks) if wants_perturbed(g) else frozenset())
        perturbations = {"perturbed": Perturbation(values_only=blocks), "isolated": Perturbation(isolated=True)}
        fused = self._dit is not self.transformer
        noise_levels = _NoiseLevels(start, self.device, by_level=fused)
        # ranks that share the tokens out compute with the plain path
        options = () if fused else (spread,)

        def run_pass(name: str, latents: AV, sigma: torch.Tensor, enabled: AV[bool]) -> AV[torch.Tensor]:
            level, levels, timesteps = noise_levels.at(sigma)
            context = contexts.get(name, contexts["cond"])

            def entering(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor, tables: tuple, on: bool, of: Any):
                # a graph reads contiguous copies, and what comes before it must round alike
                x = x.contiguous() if fused else x
                return Modality(x.expand(len(c), -1, -1), level, t, c, *tables, enabled=on, level_of=of)

            def denoised(x: torch.Tensor, v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                return (x.float() - v.float() * t.float()[..., None]).to(x.dtype)

            inputs = latents.map(entering, timesteps, context, ropes, enabled, noise_levels.of_token)
            velocities = self._dit(inputs, perturbations.get(name, NO_PERTURBATION), *options)
            return latents.map(denoised, velocities, levels)

        return run_pass

    def _within_model(self, g: Guidance) -> Guidance:
        layers = self.transformer.config.num_layers
        return replace(g, stg_blocks=tuple(block for block in g.stg_blocks if block < layers))

    def _merge(self, item: WorkItem, distilled_strength: float) -> None:
        by_name = {use.name: use.strength for use in item.request.loras}
        uses = [(i, by_name[name]) for i, name in enumerate(self._lora_names) if name in by_name]
        if self._has_distilled:
            uses.append((len(self._lora_names), distilled_strength))
        began, first = time.perf_counter(), not self._merged
        try:
            setting = LoraSetting(tuple(uses))
            # buffers are filled by threads, which know nothing of the inference mode that they would belong to
            with torch.inference_mode(False), torch.no_grad():
                if not first and not self._near and self.merger.would_change(setting):
                    self._keep_near()  # this replica does switch
                switched = self.merger.switch(setting)
            if switched and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except Exception as error:
            # nobody can say what the weights hold now
            raise ReplicaError(f"{type(error).__name__}: {error}") from error
        if switched:
            # the first merge belongs to loading
            self.switches += not first
            self.switch_seconds += 0.0 if first else time.perf_counter() - began
        self._merged = True

    def _keep_near(self) -> None:
        """Keep what a switch needs where it is fast; the rest of the device is for activations and neighbours."""
        self._near = True
        self.merger.keep(reserve=_ACTIVATION_BYTES + (_NEIGHBOUR_BYTES if self.spec.layout.shared_card else 0))
        _log.info(
            "rank %d: clean weights: %s, LoRA factors: %s",
            self.rank.rank, self.merger.clean_weights, self.merger.lora_factors,
        )  # fmt: skip

    def _new_ledger(self, seed: int) -> NoiseLedger:
        device = torch.device("cpu") if self.spec.numerics.noise_device == "cpu" else self.device
        return NoiseLedger(seed, device.type, _device_name(device))


class _NoiseLevels:
    """The noise levels of a stage's calls: made once a call for all its passes, and without a wait for the device."""

    def __init__(self, start: LatentState, device: torch.device, by_level: bool):
        self._start, self._device = start, device
        self._last: tuple[torch.Tensor, tuple[torch.Tensor, AV[torch.Tensor], AV[torch.Tensor]]] | None = None
        #: Which of the levels a token has, where the model is given those and not one for every token.
        self.of_token: AV[torch.Tensor | None] = AV(None, None)
        if by_level and start.mask is not None:
            self._parts, index = torch.unique(start.mask[0, :, 0], return_inverse=True)
            self.of_token = AV(index.int(), None)

    def at(self, sigma: torch.Tensor) -> tuple[torch.Tensor, AV[torch.Tensor], AV[torch.Tensor]]:
        """The call's level (1,), that of every token (1, T) or (1, 1), and the timesteps that the model is given."""
        if self._last is None or self._last[0] is not sigma:
            level = torch.full((1,), sigma.item(), dtype=sigma.dtype, device=self._device)
            levels = self._start.timesteps(level)
            by_level = levels
            if self.of_token.video is not None:
                by_level = AV(self._parts[None] * level, levels.audio)
            self._last = sigma, (level, levels, by_level)
        return self._last[1]


def _unguided(run_pass: RunPass) -> Denoise:
    """The model alone, on the positive prompt."""

    def denoise(latents: AV[torch.Tensor], sigma: torch.Tensor, step_index: int) -> AV[torch.Tensor]:
        return run_pass("cond", latents, sigma, AV(True, True))

    return denoise


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _pack(latents: AV[torch.Tensor]) -> AV[torch.Tensor]:
    """(1, C, F, H, W) and (1, C, T, F) -> (1, F*H*W, C) and (1, T, C*F), the order in which noise is drawn.

    The video stays a transposed view, as in the reference: on a CPU, bf16 products of another memory
    layout round otherwise.
    """
    return AV(latents.video.flatten(2).transpose(1, 2), latents.audio.transpose(1, 2).flatten(2))


def _unpack(packed: AV[torch.Tensor], shape: ClipShape) -> AV[torch.Tensor]:
    grid = (shape.latent_frames, shape.latent_height, shape.latent_width)
    video = packed.video.transpose(1, 2).unflatten(2, grid).contiguous()
    audio = packed.audio.unflatten(2, (AUDIO_CHANNELS, AUDIO_BINS)).transpose(1, 2).contiguous()
    return AV(video, audio)
