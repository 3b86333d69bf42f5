"""The diffusion engine: one rank of a replica that renders stage 1 and stage 2.

All ranks of a gang run the same call on the same inputs, and the result of rank 0 counts. The order of operations is
that of docs/ltx-2.3.md#pipelines; `ltx_pipelines/ti2vid_two_stages_hq.py` and `ltx_pipelines/utils/blocks.py` of the
reference v1.2.0.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from ltx_ray.checkpoints.checkpoint import Checkpoint, open_checkpoint
from ltx_ray.checkpoints.digests import cache_root
from ltx_ray.checkpoints.lora import open_lora
from ltx_ray.checkpoints.node_cache import on_this_node
from ltx_ray.config import EngineSpec, ModelFiles
from ltx_ray.dataset.package_versions import FA3, TRITON
from ltx_ray.engine import codec, components
from ltx_ray.engine.base import PartSeconds, Rank, resolve_dtype
from ltx_ray.engine.evidence import KNOWN_SHAPE, FileDigests, evidence, known_conditions, known_latents
from ltx_ray.engine.initial_state import ImageConditioning, LatentState, noised_state
from ltx_ray.engine.negative_context import with_negative
from ltx_ray.engine.patchify import latent_sizes, patchify, unpatchify
from ltx_ray.engine.stage_model import Dit, StageModel, pass_contexts, pass_perturbations, run_divided
from ltx_ray.model.fused import FusedTransformer, check_node
from ltx_ray.model.graphs import GraphedTransformer
from ltx_ray.model.packing import pack_linears
from ltx_ray.model.transformer import Perturbation, Transformer
from ltx_ray.parallel.collectives import SINGLE_RANK, RankGroup
from ltx_ray.parallel.loading import load_shard
from ltx_ray.parallel.lora import LoraMerger, LoraSetting
from ltx_ray.parallel.mesh import Mesh, make_mesh
from ltx_ray.placement.numerics import numerics_json, numerics_of_row
from ltx_ray.presets import PIPELINES, STAGE2_SIGMAS
from ltx_ray.records import (
    AV,
    Conditions,
    EngineFacts,
    Evidence,
    Guidance,
    ModelError,
    NoiseLedger,
    NotFinite,
    ReplicaError,
    StageLatents,
    WorkItem,
)
from ltx_ray.sampling.guidance import GuidedDenoiser, run_batched, run_one_by_one
from ltx_ray.sampling.noise import ClipNoise, SamplerNoise, check_noise_device
from ltx_ray.sampling.sampler import Denoise
from ltx_ray.sampling.samplers import SAMPLERS
from ltx_ray.sampling.sigmas import shifted_sigmas
from ltx_ray.stages import Stage

#: Device memory that caches leave free: for the activations of a large clip, and for text and decode on a shared card.
_ACTIVATION_BYTES = 16 * 2**30
_SHARED_CARD_BYTES = 40 * 2**30
_log = logging.getLogger(__name__)


class DiffusionEngine:
    """Holds this rank's shard of the transformer, with LoRAs merged at the strengths of a stage."""

    def __init__(self, spec: EngineSpec, rank: Rank):
        self.spec, self.rank = spec, rank
        self.device = torch.device(rank.device)
        self.dtype = resolve_dtype(spec.numerics.dtype)
        self.switches, self.switch_seconds = 0, 0.0
        self._has_merged = self._sources_cached = False
        self._parts = PartSeconds()
        self.mesh = Mesh()
        self.facts = EngineFacts()

    def load(self) -> None:
        """Read this rank's slices. LoRAs are merged by the first call, which says at which strengths.

        Raises ValueError for files that do not fit, UnfitNode when this node cannot compute as the run's numerics say.
        """
        # Kernels are compiled once for all processes, and for all nodes where the cache is shared.
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache_root() / "triton"))
        model, layout = on_this_node(self.spec.model), self.spec.layout
        upsampler = ("spatial_upsampler_path",) if Stage.STAGE2 in layout.roles else ()
        self._files = FileDigests(self.spec, "checkpoint_path", "distilled_lora", "loras", *upsampler)
        checkpoint = open_checkpoint(model.checkpoint_path)
        passes, tokens = layout.guidance_parallel, layout.stage1_sequence_parallel
        self.mesh = make_mesh(self.rank.rank, self.rank.world, layout.tp, passes, tokens)
        with ThreadPoolExecutor(2) as beside:
            # Compiling kernels, reading the transformer and importing diffusers, whose module the upsampler is, take
            # seconds each.
            checked = beside.submit(self._check_node, checkpoint)
            transformer = beside.submit(self._load_transformer, checkpoint, checked)
            try:
                if Stage.STAGE2 in layout.roles:
                    with self._parts.measure("upsampler"):
                        self._load_upsampler(model)
                transformer.result()
            except Exception:
                checked.result()  # On an unfit node, this is why anything else has failed.
                raise
        with self._parts.measure("loras"):
            self._load_loras(model, checkpoint)
        if self.spec.layout.alternates:
            self._cache_merge_sources()  # Other replicas do so at their first switch, which may never come.
        self.facts = self._facts(start_seconds=self._parts.take())

    def _load_upsampler(self, model: ModelFiles) -> None:
        self.upsampler = components.load_upsampler(model.spatial_upsampler_path, self.dtype, self.device)
        mean, std = components.latent_stats(model.checkpoint_path, "video")
        self.latent_stats = mean.to(self.device, self.dtype), std.to(self.device, self.dtype)
        if self.device.type == "cuda":
            self._upsampled_known()  # Loads cuDNN.

    @torch.inference_mode()
    def _upsampled_known(self) -> torch.Tensor:
        video = known_latents().video.to(self.device, self.dtype)
        return codec.upsample_latents(self.upsampler, *self.latent_stats, video)

    @torch.inference_mode()
    def evidence(self) -> Evidence:
        """What this rank computes with, and what a pass over a clip of few tokens gives with the clean weights.

        The pass is no graph and takes no LoRA, so that it leaves nothing behind. Raises ReplicaError when its results
        are not finite.
        """
        shape, config = KNOWN_SHAPE, self.transformer.config
        contexts = pass_contexts(
            known_conditions(AV(config.video, config.audio).map(lambda stream: stream.context_dim)),
            self.device, self.dtype, batched=False,
        )  # fmt: skip
        noise = ClipNoise(NoiseLedger(0, "cpu", "cpu"), self.device)
        zeros = latent_sizes(shape).map(lambda size: torch.zeros(size, dtype=self.dtype, device=self.device))
        state = noised_state(shape, "known answer", noise, patchify(zeros), 1.0)
        model = StageModel(self._plain_dit, state, contexts, {}, self.dtype)
        answers = {"transformer": model.denoise(state.latents, torch.tensor(1.0), 0)}
        if Stage.STAGE2 in self.spec.layout.roles:
            upsampled = self._upsampled_known()
            answers["upsampler"] = AV(upsampled, upsampled[:0])
        numerics = self.spec.numerics
        kernels = (*(TRITON if numerics.compile == "fused" else ()), *(FA3 if numerics.attention == "fa3" else ()))
        return evidence(self._files, self.device, answers, kernels)

    def _check_node(self, checkpoint: Checkpoint) -> None:
        if self.spec.numerics.compile == "fused":
            with self._parts.measure("check"):
                check_node(checkpoint.transformer, self.spec.numerics.attention, self.device)

    def _load_transformer(self, checkpoint: Checkpoint, checked: Future[None]) -> None:
        tp, numerics = self.mesh.tp, self.spec.numerics
        fused = numerics.compile == "fused"
        with self._parts.measure("build"):
            with torch.device("meta"):
                self.transformer = Transformer(checkpoint.transformer, tp)
            if fused:
                pack_linears(self.transformer, self.device, self.dtype, numerics.precision)

        def stop_on_an_unfit_node() -> None:
            if checked.done():
                checked.result()

        with self._parts.measure("read"):
            load_shard(
                self.transformer, checkpoint.tensors, tp,
                dtype=self.dtype, device=self.device, proceed=stop_on_an_unfit_node,
            )  # fmt: skip
        checked.result()
        #: What passes run on, and the same without graphs.
        self._dit: Dit = self.transformer
        self._plain_dit: Dit = self.transformer
        if fused:
            self._plain_dit = self._dit = dit = FusedTransformer(self.transformer, numerics.attention)
            if self.device.type == "cuda":
                with self._parts.measure("warm"):
                    dit.warm_up()
                self._dit = GraphedTransformer(dit)

    def _load_loras(self, model: ModelFiles, checkpoint: Checkpoint) -> None:
        self._lora_names = [lora.name for lora in model.loras]
        self._has_distilled = model.distilled_lora is not None
        paths = [lora.path for lora in model.loras] + ([model.distilled_lora] if model.distilled_lora else [])
        loras = [open_lora(path).fit(checkpoint.linear_layers, checkpoint.path) for path in paths]
        self.merger = LoraMerger(self.transformer, checkpoint.tensors, loras, self.mesh.tp, self.mesh.peers)

    @torch.inference_mode()
    def run(
        self, stage: Stage, item: WorkItem, conditions: Conditions, other: StageLatents | bytes | None = None
    ) -> StageLatents | None:
        """Render `stage` of `item`.

        `other`: of stage 1, the context of the negative prompt where it travels apart; of stage 2, the latents of stage
        1. Returns the stage's latents on rank 0 and None elsewhere. Raises NotFinite when they are not finite,
        WrongDevice when this device cannot repeat the noise of stage 1, ReplicaError when merging LoRAs failed.
        """
        before = other if isinstance(other, StageLatents) else None
        if before is None:
            assert stage == Stage.STAGE1 and not isinstance(other, StageLatents), stage
            result = self._stage1(item, with_negative(conditions, other))
        else:
            result = self._stage2(item, conditions, before)
        self._check_ranks_agree(stage, result)
        for name, tensor in zip(("video", "audio"), result.latents, strict=True):
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise NotFinite(f"{bad} of {tensor.numel()} {name} latents are not finite")
        numerics = numerics_of_row(numerics_json(self.spec.numerics), item.request)
        device_name = _device_name(self.device)
        self.facts = self._facts(
            noise_ledger=result.ledger,
            stage1_numerics=before.other_numerics(numerics, device_name) if before is not None else None,
            start_seconds=self._parts.take() or None,
        )
        if self.rank.rank != 0:
            return None
        return StageLatents(result.latents.map(lambda t: t.cpu()), result.ledger, numerics, device_name)

    def _check_ranks_agree(self, stage: Stage, result: StageLatents) -> None:
        """Raise ReplicaError where ranks that divide the work of `stage` have not come to the same latents."""
        # Peers that do not divide a stage repeat it, and only the first of them counts.
        divided = [self.mesh.passes, self.mesh.tokens] if stage == Stage.STAGE1 else [self._stage2_tokens]
        groups = [self.mesh.tp, *divided]
        if all(group.size == 1 for group in groups):
            return
        checksum = _checksum(result.latents)
        # The least of the ranks' numbers and of their negatives are those of every rank if and only if all are equal.
        extremes = torch.cat((checksum, -checksum))
        for group in groups:
            extremes = group.min_(extremes)
        if not torch.equal(extremes[:2], -extremes[2:]):
            raise ReplicaError(f"the ranks of the gang came to different latents in {stage}, so one computes wrongly")

    def _facts(self, **of_call: Any) -> EngineFacts:
        return EngineFacts(
            device_name=_device_name(self.device),
            clean_weights=self.merger.clean_weights,
            lora_factors=self.merger.lora_factors,
            **of_call,
        )

    # --- the stages ------------------------------------------------------------------------------

    def _stage1(self, item: WorkItem, conditions: Conditions) -> StageLatents:
        """Guided denoising from pure noise, at half of the height and width."""
        request, pipeline = item.request, PIPELINES[item.request.pipeline]
        self._merge_loras(item, request.distilled_lora_strength_stage_1)
        shape = request.shape.half()
        noise = ClipNoise(self._new_ledger(request.seed), self.device)
        zeros = latent_sizes(shape).map(lambda size: torch.zeros(size, dtype=self.dtype, device=self.device))
        images = [self._conditioning(image.frame_idx, image.strength, image.stage1) for image in conditions.images]
        state = noised_state(shape, "stage_1", noise, patchify(zeros), 1.0, images)
        if pipeline.distilled:
            denoise: Denoise = self._stage_model(state, conditions, self.mesh.tokens).denoise
        else:
            guidance = request.guidance.map(self._known_blocks)
            model = self._stage_model(state, conditions, self.mesh.tokens, pass_perturbations(guidance))
            denoise = self._guided(model, guidance)
        if pipeline.sigmas is not None:
            sigmas = torch.tensor(pipeline.sigmas)
        else:
            sigmas = shifted_sigmas(request.num_inference_steps, pipeline.schedule_tokens or shape.video_tokens)
        latents = self._sample(pipeline.sampler, denoise, state, sigmas, noise.ledger)
        return StageLatents(unpatchify(latents, shape), noise.ledger)

    def _stage2(self, item: WorkItem, conditions: Conditions, stage1: StageLatents) -> StageLatents:
        """Denoising without guidance, from upsampled latents of stage 1 that are noised again."""
        check_noise_device(stage1.ledger, _device_name(self.device))
        request, pipeline = item.request, PIPELINES[item.request.pipeline]
        self._merge_loras(item, request.distilled_lora_strength_stage_2)
        shape = request.shape
        noise = ClipNoise(stage1.ledger, self.device)
        video, audio = stage1.latents.map(lambda t: t.to(self.device, self.dtype))
        upsampled = codec.upsample_latents(self.upsampler, *self.latent_stats, video)
        images = [self._conditioning(image.frame_idx, image.strength, image.stage2) for image in conditions.images]
        state = noised_state(shape, "stage_2", noise, patchify(AV(upsampled, audio)), STAGE2_SIGMAS[0], images)
        model = self._stage_model(state, replace(conditions, negative=None), self._stage2_tokens)
        sigmas = torch.tensor(STAGE2_SIGMAS)
        latents = self._sample(pipeline.sampler, model.denoise, state, sigmas, noise.ledger)
        return StageLatents(unpatchify(latents, shape), noise.ledger)

    @property
    def _stage2_tokens(self) -> RankGroup:
        """The ranks that share the tokens of stage 2."""
        return self.mesh.peers if self.spec.layout.sequence_parallel > 1 else SINGLE_RANK

    def _new_ledger(self, seed: int) -> NoiseLedger:
        device = torch.device("cpu") if self.spec.numerics.noise_device == "cpu" else self.device
        return NoiseLedger(seed, device.type, _device_name(device))

    def _conditioning(self, frame_idx: int, strength: float, latent: torch.Tensor) -> ImageConditioning:
        return ImageConditioning(frame_idx, strength, latent.to(self.device, self.dtype))

    def _stage_model(
        self,
        state: LatentState,
        conditions: Conditions,
        sequence_group: RankGroup,
        perturbations: Mapping[str, Perturbation] = {},
    ) -> StageModel:
        contexts = pass_contexts(conditions, self.device, self.dtype, self._batches_guidance)
        return StageModel(self._dit, state, contexts, perturbations, self.dtype, sequence_group)

    def _sample(
        self, sampler: str, denoise: Denoise, state: LatentState, sigmas: torch.Tensor, ledger: NoiseLedger
    ) -> AV[torch.Tensor]:
        noise = SamplerNoise(ledger.device)
        return state.without_keyframes(SAMPLERS[sampler](denoise, state.latents, sigmas, noise, state.blend_clean))

    # --- guidance --------------------------------------------------------------------------------

    @property
    def _batches_guidance(self) -> bool:
        return self.spec.numerics.guidance_batching > 1

    def _guided(self, model: StageModel, guidance: AV[Guidance]) -> GuidedDenoiser:
        if self.mesh.passes.size > 1:
            run_passes = run_divided(self.mesh.passes)
        else:
            run_passes = run_batched if self._batches_guidance else run_one_by_one
        return GuidedDenoiser(model.run_pass, guidance, run_passes)

    def _known_blocks(self, g: Guidance) -> Guidance:
        """`g` without STG blocks that the model does not have."""
        layers = self.transformer.config.num_layers
        return replace(g, stg_blocks=tuple(block for block in g.stg_blocks if block < layers))

    # --- LoRAs -----------------------------------------------------------------------------------

    def _merge_loras(self, item: WorkItem, distilled_strength: float) -> None:
        """Bring the weights to the item's LoRAs. The first merge belongs to loading and counts as no switch.

        Raises ModelError when a LoRA cannot be used, and ReplicaError when merging fails otherwise, because the state
        of the weights is then unknown.
        """
        setting = self._lora_setting(item, distilled_strength)
        began, first = time.perf_counter(), not self._has_merged
        try:
            # Threads of the loader write into tensors that are made here, and threads do not inherit inference mode.
            with torch.inference_mode(False), torch.no_grad():
                if not first and not self._sources_cached and self.merger.would_change(setting):
                    self._cache_merge_sources()
                if (pinned := self.merger.take_over()) is not None:
                    self._parts.add("pin", pinned)
                    self._log_sources()
                switched = self.merger.switch_to(setting)
                self.merger.check_finite()
            if switched and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except ModelError:
            raise
        except Exception as error:
            raise ReplicaError(f"{type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - began
        if first:
            self._parts.add("merge", seconds)
        elif switched:
            self.switches += 1
            self.switch_seconds += seconds
        self._has_merged = True

    def _lora_setting(self, item: WorkItem, distilled_strength: float) -> LoraSetting:
        by_name = {use.name: use.strength for use in item.request.loras}
        strengths = [(index, by_name[name]) for index, name in enumerate(self._lora_names) if name in by_name]
        # The distilled LoRA is the last, so at strength 0 it changes nothing, not even how others are rounded.
        if self._has_distilled and distilled_strength:
            strengths.append((len(self._lora_names), distilled_strength))
        return LoraSetting(tuple(strengths))

    def _cache_merge_sources(self) -> None:
        """Cache what a switch reads as close to the device as its memory allows."""
        self._sources_cached = True
        shared_card = self.spec.layout.shared_card
        with self._parts.measure("cache"):
            self.merger.cache_sources(reserve=_ACTIVATION_BYTES + (_SHARED_CARD_BYTES if shared_card else 0))
        self._log_sources()

    def _log_sources(self) -> None:
        _log.info(
            "rank %d: clean weights: %s, LoRA factors: %s",
            self.rank.rank, self.merger.clean_weights, self.merger.lora_factors,
        )  # fmt: skip


def _checksum(latents: AV[torch.Tensor]) -> torch.Tensor:
    """Two int64 that any changed bit changes, and that moved values change. Every NaN counts as the same."""
    sums = []
    for x in latents:
        bits = (
            torch.where(x.isnan(), torch.nan, x)
            .contiguous()
            .view(torch.int16 if x.element_size() == 2 else torch.int32)
            .flatten()
            .long()
        )
        places = torch.arange(1, len(bits) + 1, device=x.device) % 65521
        sums.append(torch.stack((bits.sum(), (bits * places).sum())))
    return torch.stack(sums).sum(0)


def _device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
