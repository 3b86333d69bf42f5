"""How much memory a rank of the DiT needs on its GPU, and which rows need more than the GPU has. No torch.

The estimate is a lower bound: what is refused cannot run. What is admitted may still run out of memory, which costs an
attempt. Weights are counted from the files. Activations and decoding are figures of an H100 at LTX-2.3's widths
(docs/gpus.md#memory).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property

from ltx_ray.checkpoints import diffusers_layout
from ltx_ray.checkpoints import transformer_keys as keys
from ltx_ray.checkpoints.checkpoint import Checkpoint, gemma_folders
from ltx_ray.checkpoints.model_paths import is_folder
from ltx_ray.checkpoints.safetensors import TensorInfo, read_header
from ltx_ray.config import ModelFiles, Numerics, PoolSpec
from ltx_ray.manifest.rules import RowProblem
from ltx_ray.placement.numerics import WITHOUT_FP8
from ltx_ray.presets import PIPELINES, SAMPLER_TRAITS
from ltx_ray.records import RenderRequest
from ltx_ray.shapes import TIME_FACTOR, VIDEO_CHANNELS, ClipShape
from ltx_ray.stages import DIFFUSION_STAGES, Stage

GIB = 2**30
#: GiB of a GPU by Ray's name for it, as the driver reports them. A name that stands for several sizes has the largest:
#: a GPU that Ray calls A100 may have 80 GB, and one with 40 GB is also called A100-40G.
_GPU_GIB = {
    "A100": 80.0, "A100-80G": 80.0, "A100-40G": 40.0, "A10": 22.5, "A10G": 22.5, "A30": 24.0, "A40": 45.0,
    "H20": 140.4, "H100": 79.6, "H200": 140.4, "H800": 79.6, "GH200": 140.4, "B200": 180.0, "B300": 270.0,
    "GB200": 186.0, "GB300": 280.0, "L4": 22.5, "L40": 45.0, "L40S": 45.0, "RTX-PRO-6000": 96.0, "T4": 15.0,
    "V100": 32.0, "P100": 16.0,
}  # fmt: skip
#: Memory of every process on a GPU: CUDA's context, workspaces of its libraries, and that of kernels and graphs.
_RESERVE = int(1.5 * GIB)
_CONTEXT_BYTES = GIB // 2
#: Bytes of a GPU that holds the text model and three decoders, or five decoders.
ROOMY_BYTES = 64 * GIB
#: The decode engine with its smallest tiles: 2.5 GiB of weights, 1 GiB of tiles, and the context.
_DECODE_BYTES = 4 * GIB
#: Upper bounds for the decision to share a GPU, which must never be wrong: the text connectors and projections of the
#: released model, the decoder with the tiles that it begins with, and activations of a clip.
_CONNECTOR_BYTES = 6 * GIB
_LARGEST_DECODE_BYTES = 10 * GIB
_SHARED_MARGIN = 6 * GIB
#: Activations and state of an HQ clip, for the choice of a layout.
_CLIP_MARGIN = 4 * GIB
#: Elements of activation for each token at the peak of a pass, as multiples of the stream's width. The fused path has
#: 2.00 GiB at 32,640 tokens and 0.50 GiB at 8,160, the plain path about 7 GiB at 32,640 tokens. Tensor parallelism
#: divides the sharded part: heads, the feed-forward's hidden layer, and in the fused path the stream itself.
_FUSED_WIDTHS, _FUSED_SHARDED_WIDTHS = 2, 6
#: The same for what ranks on one node exchange in the fused path, where they divide tokens or rows: what each lays out
#: for the others, in places that have grown (peer_copies.py), and what it receives.
_EXCHANGED_TOKEN_WIDTHS, _EXCHANGED_ROW_WIDTHS = 12, 4
_PLAIN_WIDTHS, _PLAIN_SHARDED_WIDTHS = 6, 22
#: More widths for each token in the plain path when images give tokens noise levels of their own: their modulations.
_MODULATION_WIDTHS = 14


def _any_of(*names: str) -> str:
    return f"({'|'.join(map(re.escape, names))})"


#: Tensors of a block that tensor parallelism divides.
_SHARDED = re.compile(
    rf"{keys.BLOCKS}\.\d+\.\w+\."
    rf"({_any_of(keys.TO_Q, keys.TO_K, keys.TO_V, keys.TO_GATES, keys.FEED_FORWARD_UP)}\.(weight|bias)"
    rf"|{_any_of(keys.TO_OUT, keys.FEED_FORWARD_DOWN, keys.Q_NORM, keys.K_NORM)}\.weight)"
)
#: Those of them whose output features it divides.
_COLUMN_PARALLEL = re.compile(
    rf"{keys.BLOCKS}\.\d+\.\w+\."
    rf"{_any_of(keys.TO_Q, keys.TO_K, keys.TO_V, keys.TO_GATES, keys.FEED_FORWARD_UP)}\.(weight|bias)"
)
#: Weights that `--precision fp8` stores in one byte an element: those of layers whose input has the rows of the video
#: or of the video's text (model/packing.py).
_IN_FP8 = re.compile(
    rf"{keys.BLOCKS}\.\d+\."
    rf"({_any_of(keys.VIDEO.self_attention, keys.VIDEO.text_attention)}\."
    rf"{_any_of(keys.TO_Q, keys.TO_K, keys.TO_V, keys.TO_GATES, keys.TO_OUT)}"
    rf"|{re.escape(keys.VIDEO.feed_forward)}\.{_any_of(keys.FEED_FORWARD_UP, keys.FEED_FORWARD_DOWN)}"
    rf"|{re.escape(keys.VIDEO.cross_attention)}\.{_any_of(keys.TO_Q, keys.TO_GATES, keys.TO_OUT)}"
    rf"|{re.escape(keys.AUDIO.cross_attention)}\.{_any_of(keys.TO_K, keys.TO_V)})\.weight"
)


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, by the name that messages use, and its memory in bytes."""

    name: str
    nbytes: int


def known_gpus(models: Collection[str]) -> list[Gpu]:
    """The models (Ray's names) whose memory is known, the smallest first."""
    known = {Gpu(name, int(_GPU_GIB[name] * GIB)) for name in models if name in _GPU_GIB}
    return sorted(known, key=lambda gpu: (gpu.nbytes, gpu.name))


@dataclass(frozen=True)
class RankMemory:
    """What decides how much memory a rank of a pool needs."""

    stages: tuple[Stage, ...]
    #: Shards of the weights, and groups of ranks that share the tokens of stage 2 and of stage 1.
    tp: int = 1
    sequence_parallel: int = 1
    stage1_sequence_parallel: int = 1
    element_bytes: int = 2
    fp8: bool = False
    fused: bool = False
    #: Bytes of the replicas of text and decode on the same GPU.
    colocated_bytes: int = 0


class MemoryBudget:
    """The memory of a run's GPUs against what its ranks and its rows need."""

    def __init__(
        self, checkpoint: Checkpoint, model: ModelFiles, pools: Iterable[PoolSpec], numerics: Numerics, gpu: Gpu
    ):
        """`model`: paths on this node. `gpu`: the largest that a rank may get, so that a refusal is always right."""
        self.gpu = gpu
        self._checkpoint, self._model, self._numerics = checkpoint, model, numerics
        self.element_bytes = 4 if numerics.dtype == "float32" else 2
        self._weight_bytes = cache(self._count_weight_bytes)
        pools = [pool for pool in pools if set(DIFFUSION_STAGES) & set(pool.roles)]
        ranks = sum(pool.replicas * pool.ranks for pool in pools)
        #: A rank of each pool of the DiT.
        self.ranks = [self._rank(pool, only_rank=ranks == 1) for pool in pools]

    def _rank(self, pool: PoolSpec, only_rank: bool) -> RankMemory:
        layout, numerics = pool.engine.layout, self._numerics
        colocated = 0
        if layout.shared_card:
            # Of several ranks, none is certain to have both on its GPU.
            colocated = (sum if only_rank else max)((self.text_bytes + _CONTEXT_BYTES, _DECODE_BYTES))
        return RankMemory(
            stages=tuple(role for role in pool.roles if role in DIFFUSION_STAGES),
            tp=layout.tp,
            sequence_parallel=layout.sequence_parallel,
            stage1_sequence_parallel=layout.stage1_sequence_parallel,
            element_bytes=self.element_bytes,
            fp8=numerics.precision == "fp8",
            fused=numerics.compile == "fused",
            colocated_bytes=colocated,
        )

    # --- judgements ------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise ValueError when the GPU does not hold what a rank has in memory before any row."""
        for rank in self.ranks:
            need = self.resident_bytes(rank)
            if not self._fits(need):
                colocated = ", with text and decode beside them," if rank.colocated_bytes else ""
                raise ValueError(
                    f"{self.gpu.name}: the weights{colocated} need {_gib(need)} GiB of a GPU, and it has "
                    f"{_gib(self.gpu.nbytes)} GiB; "
                    f"legal: {self._remedies(rank, lambda other: self._fits(self.resident_bytes(other)))}"
                )

    def problem(self, request: RenderRequest) -> RowProblem | None:
        """Why no replica of the run can render `request`; None when the estimate says that one can."""
        rank = max(self.ranks, key=lambda rank: self.peak_bytes(rank, request))
        need, shape = self.peak_bytes(rank, request), request.shape
        if self._fits(need):
            return None
        size = f"{shape.height}x{shape.width}"
        have = f"{self.gpu.name} has {_gib(self.gpu.nbytes)}"
        why = f"{size}x{shape.num_frames} needs {_gib(need)} GiB of a GPU, and {have}"
        remedies = self._remedies(rank, lambda other: self._fits(self.peak_bytes(other, request)))
        frames = self._most_frames(request)
        if frames is None:
            return RowProblem("height", shape.height, f"a smaller size than {size} ({why}), or {remedies}")
        return RowProblem("num_frames", shape.num_frames, f"at most {frames} at {size} ({why}), or {remedies}")

    def _fits(self, nbytes: int) -> bool:
        return nbytes <= self.gpu.nbytes

    def _most_frames(self, request: RenderRequest) -> int | None:
        """The most 8k + 1 frames that fit at the size of `request`, which does not fit; None when no frame does."""

        def fits(groups: int) -> bool:
            shorter = replace(request, num_frames=TIME_FACTOR * groups + 1)
            return all(self._fits(self.peak_bytes(rank, shorter)) for rank in self.ranks)

        if not fits(0):
            return None
        low, high = 0, request.shape.latent_frames - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return TIME_FACTOR * low + 1

    def _remedies(self, rank: RankMemory, fits: Callable[[RankMemory], bool]) -> str:
        """The options of which each alone would make `rank` fit, and a larger GPU."""
        options = []
        if rank.colocated_bytes and fits(replace(rank, colocated_bytes=0)):
            options.append("text and decode on another GPU (--share-cards off where there are several)")
        fp8_possible = self.gpu.name not in WITHOUT_FP8 and rank.element_bytes == 2 and not rank.fp8
        if fp8_possible and fits(replace(rank, fp8=True, fused=True)):
            options.append("--precision fp8")
        heads = self._checkpoint.transformer.video.heads
        for tp in (n for n in range(rank.tp + 1, heads + 1) if heads % n == 0):
            if fits(replace(rank, tp=tp)):
                of_stage2 = self._numerics.tp != self._numerics.stage2_tp and rank.stages == (Stage.STAGE2,)
                options.append(f"{'--stage2-tp' if of_stage2 else '--tp'} {tp}")
                break
        return " or ".join([", ".join(options), "a larger GPU"] if options else ["a larger GPU"])

    # --- bytes -----------------------------------------------------------------------------------

    def resident_bytes(self, rank: RankMemory) -> int:
        """Bytes that are taken on the GPU of `rank` before any row."""
        upsampler = self._upsampler_bytes if Stage.STAGE2 in rank.stages else 0
        return self._weight_bytes(rank.tp, rank.fp8) + upsampler + rank.colocated_bytes + _RESERVE

    def peak_bytes(self, rank: RankMemory, request: RenderRequest) -> int:
        """Bytes on the GPU of `rank` at the peak of that of its stages which needs the most."""
        return self.resident_bytes(rank) + max(self.clip_bytes(rank, stage, request) for stage in rank.stages)

    def clip_bytes(self, rank: RankMemory, stage: Stage, request: RenderRequest) -> int:
        """Bytes that `stage` of `request` takes beyond the resident ones."""
        shape = request.shape.half() if stage == Stage.STAGE1 else request.shape
        config = self._checkpoint.transformer
        video_tokens, audio_tokens = _video_tokens(shape, request), shape.audio_latents
        sharing = rank.stage1_sequence_parallel if stage == Stage.STAGE1 else rank.sequence_parallel
        own_tokens = math.ceil(video_tokens / sharing)
        whole, sharded = (
            (_FUSED_WIDTHS, _FUSED_SHARDED_WIDTHS) if rank.fused else (_PLAIN_WIDTHS, _PLAIN_SHARDED_WIDTHS)
        )
        widths = whole + sharded / rank.tp
        if rank.fused:
            widths += (_EXCHANGED_TOKEN_WIDTHS if sharing > 1 else 0) + (_EXCHANGED_ROW_WIDTHS if rank.tp > 1 else 0)
        activations = widths * (own_tokens * config.video.dim + audio_tokens * config.audio.dim)
        if request.images and not rank.fused:
            activations += _MODULATION_WIDTHS * own_tokens * config.video.dim
        # Rotary tables: cos and sin, each for half of the channels, within the stream and across the streams.
        cross_dim = config.audio.context_dim
        rotary = video_tokens * (config.video.dim + cross_dim) + audio_tokens * (config.audio.dim + cross_dim)
        # The prompt and the negative prompt.
        contexts = 2 * self._numerics.text_tokens * (config.video.context_dim + config.audio.context_dim)
        latent_elements = (video_tokens + audio_tokens) * VIDEO_CHANNELS
        sampler_state = latent_elements * SAMPLER_TRAITS[PIPELINES[request.pipeline].sampler].state_bytes
        return int(rank.element_bytes * (activations + rotary / rank.tp + contexts) + sampler_state)

    def _count_weight_bytes(self, tp: int, fp8: bool) -> int:
        return transformer_bytes(self._checkpoint.tensors, tp, self.element_bytes, fp8)

    @cached_property
    def _upsampler_bytes(self) -> int:
        path = self._model.spatial_upsampler_path
        tensors = diffusers_layout.read_upsampler(path).tensors if is_folder(path) else read_header(path).tensors
        return self.element_bytes * _elements(tensors)

    @cached_property
    def text_bytes(self) -> int:
        """Bytes of Gemma's text model."""
        folder = gemma_folders(self._model.gemma_root)[0]
        tensors = diffusers_layout.read_weights(folder, "model.safetensors")
        text = {name: info for name, info in tensors.items() if "vision" not in name and "projector" not in name}
        return self.element_bytes * _elements(text)


def checked_budget(
    checkpoint: Checkpoint, model: ModelFiles, pools: Iterable[PoolSpec], numerics: Numerics, gpu: Gpu | None
) -> MemoryBudget | None:
    """The memory that rows are compared with; None where it is not known. Raises ValueError for too small GPUs."""
    if gpu is None:
        return None
    budget = MemoryBudget(checkpoint, model, pools, numerics, gpu)
    budget.check()
    return budget


def can_share(checkpoint: Checkpoint, model: ModelFiles, numerics: Numerics, gpu: Gpu) -> bool:
    """Whether `gpu` certainly holds a rank of the DiT and a replica of text or decode, for clips of the HQ size."""
    budget = MemoryBudget(checkpoint, model, (), numerics, gpu)
    rank = RankMemory(
        stages=DIFFUSION_STAGES,
        tp=min(numerics.tp, numerics.stage2_tp),
        element_bytes=budget.element_bytes,
        fp8=numerics.precision == "fp8",
        fused=numerics.compile == "fused",
        colocated_bytes=max(budget.text_bytes + _CONNECTOR_BYTES, _LARGEST_DECODE_BYTES) + _CONTEXT_BYTES,
    )
    return budget.resident_bytes(rank) + _SHARED_MARGIN <= gpu.nbytes


def holds_rank(checkpoint: Checkpoint, model: ModelFiles, numerics: Numerics, gpu: Gpu, tp: int) -> bool:
    """Whether `gpu` holds a rank of a DiT on `tp` tensor-parallel ranks and the activations of an HQ clip."""
    budget = MemoryBudget(checkpoint, model, (), numerics, gpu)
    fp8, fused = numerics.precision == "fp8", numerics.compile == "fused"
    rank = RankMemory(DIFFUSION_STAGES, tp, element_bytes=budget.element_bytes, fp8=fp8, fused=fused)
    return budget.resident_bytes(rank) + _CLIP_MARGIN <= gpu.nbytes


def transformer_bytes(tensors: Mapping[str, TensorInfo], tp: int, element_bytes: int, fp8: bool) -> int:
    """Bytes of a rank's shard of the transformer: `element_bytes` an element, or one where `fp8` applies."""
    total = 0
    for name, info in tensors.items():
        count = math.prod(info.shape)
        own = count // tp if tp > 1 and _SHARDED.fullmatch(name) else count
        if fp8 and _IN_FP8.fullmatch(name):
            outputs = info.shape[0] // (tp if _COLUMN_PARALLEL.fullmatch(name) else 1)
            total += own + 4 * outputs  # A float32 scale for every output feature.
        else:
            total += element_bytes * own
    return total


def _video_tokens(shape: ClipShape, request: RenderRequest) -> int:
    """Packed length of a stage's video latent, to which images at later frames are appended."""
    keyframes = sum(image.frame_idx != 0 for image in request.images)
    return shape.video_tokens + keyframes * shape.latent_height * shape.latent_width


def _elements(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(math.prod(info.shape) for info in tensors.values())


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f}"
