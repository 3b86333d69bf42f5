"""What a rank of the DiT needs of its GPU, and which rows leave it too little. No torch.

An estimate from below: what is refused cannot run, and what is let through may still run out of memory, which costs an
attempt as it always does. Activations and tiles are figures of an H100 at LTX-2.3's widths; the rest is counted.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property

from ltx_ray.checkpoints import diffusers_layout
from ltx_ray.checkpoints.checkpoint import Checkpoint, gemma_folders
from ltx_ray.checkpoints.safetensors import TensorInfo, read_header
from ltx_ray.config import ModelFiles, Numerics, PoolSpec
from ltx_ray.manifest.rules import RowProblem
from ltx_ray.placement.numerics import WITHOUT_FP8
from ltx_ray.presets import PIPELINES
from ltx_ray.records import RenderRequest
from ltx_ray.shapes import TIME_FACTOR, VIDEO_CHANNELS, ClipShape
from ltx_ray.stages import DIFFUSION_STAGES, Stage

GIB = 2**30
#: GiB of a GPU by Ray's name of it, as its driver reports them. Where a name stands for several sizes, the largest:
#: a card that is called A100 may have 80 GB, one that is also called A100-40G has not.
_GPU_GIB = {
    "A100": 80.0, "A100-80G": 80.0, "A100-40G": 40.0, "A10": 22.5, "A10G": 22.5, "A30": 24.0, "A40": 45.0,
    "H20": 140.4, "H100": 79.6, "H200": 140.4, "H800": 79.6, "GH200": 140.4, "B200": 180.0, "B300": 270.0,
    "GB200": 186.0, "GB300": 280.0, "L4": 22.5, "L40": 45.0, "L40S": 45.0, "RTX-PRO-6000": 96.0, "T4": 15.0,
    "V100": 32.0, "P100": 16.0,
}  # fmt: skip
#: Of every process that uses a GPU: CUDA's context, workspaces of its libraries, and what kernels and graphs take.
_RESERVE = int(1.5 * GIB)
#: The decode engine in its smallest tiles: 2.5 GiB of weights, 1 GiB of tiles, the context.
_DECODE_BYTES = 4 * GIB
_CONTEXT_BYTES = GIB // 2
#: For the decision to share a card, which has to be right for certain: the text connectors and projections of the
#: released model, the decoder in the tiles that it begins with, and activations of a clip with room to spare.
_CONNECTOR_BYTES = 6 * GIB
_WHOLE_DECODE_BYTES = 10 * GIB
_SHARED_MARGIN = 6 * GIB
#: Activations at the peak of a pass, in widths of the stream a token: 2.00 GiB at 32,640 tokens and 0.50 at 8,160
#: in the fused path, about 7 GiB in the plain one, where ranks divide the heads and the feed-forward's hidden part.
_FUSED_WIDTHS, _WHOLE_WIDTHS, _SHARDED_WIDTHS = 8, 6, 22
#: What the plain path holds besides for each token when images give it a noise level of its own: its modulations.
_MODULATION_WIDTHS = 14
#: Bytes a latent channel of a token that a sampler keeps while the model runs.
_SAMPLER_BYTES = {"res_2s": 6 * 8, "euler": 3 * 4}
#: Parts of a block that the ranks of a gang divide.
_SHARDED = re.compile(
    r"transformer_blocks\.\d+\.(\w+\.(to_q|to_k|to_v|to_gate_logits|net\.0\.proj)\.(weight|bias)"
    r"|\w+\.(to_out\.0|net\.2|q_norm|k_norm)\.weight)"
)
#: Layers that --precision fp8 holds in one byte: those over the video's rows and over the text of the video
#: (model/packing.py).
_IN_FP8 = re.compile(
    r"transformer_blocks\.\d+\.(attn[12]\.to_\w+(\.0)?|ff\.net\.(0\.proj|2)"
    r"|audio_to_video_attn\.(to_q|to_gate_logits|to_out\.0)|video_to_audio_attn\.to_[kv])\.weight"
)


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, by the name that messages call it."""

    name: str
    nbytes: int


def known_gpus(models: Collection[str]) -> list[Gpu]:
    """Those of these models (Ray's names) whose memory is known, the smallest first."""
    known = {Gpu(name, int(_GPU_GIB[name] * GIB)) for name in models if name in _GPU_GIB}
    return sorted(known, key=lambda gpu: (gpu.nbytes, gpu.name))


@dataclass(frozen=True)
class RankMemory:
    """What decides how much a rank of a pool needs: the stages it serves, in how many shards the weights are, among how
    many ranks stage 2 shares its tokens out, its arithmetic, and the bytes of text and decode on the same GPU."""

    stages: tuple[Stage, ...]
    tp: int = 1
    token_ranks: int = 1
    item_bytes: int = 2
    fp8: bool = False
    fused: bool = False
    beside: int = 0

    @property
    def divided(self) -> bool:
        return self.tp > 1 or self.token_ranks > 1


class MemoryBudget:
    """The memory of a run's GPUs, held against the run and against its rows."""

    def __init__(
        self, checkpoint: Checkpoint, model: ModelFiles, pools: Iterable[PoolSpec], numerics: Numerics, gpu: Gpu
    ):
        """`model` as paths on this node, `gpu` the largest that a rank may get: what that has no room for has none."""
        self.gpu = gpu
        self._checkpoint, self._model, self._numerics = checkpoint, model, numerics
        self.item_bytes = 4 if numerics.dtype == "float32" else 2
        self._shards = cache(self._shard_bytes)
        pools = [pool for pool in pools if set(DIFFUSION_STAGES) & set(pool.roles)]
        ranks = sum(pool.replicas * pool.ranks for pool in pools)
        self.ranks = [self._rank(pool, ranks) for pool in pools]

    def _rank(self, pool: PoolSpec, ranks: int) -> RankMemory:
        layout, numerics = pool.engine.layout, self._numerics
        beside = 0
        if layout.shared_card:
            # on several cards, nobody knows whether both are on one
            both = self.text_bytes + _CONTEXT_BYTES, _DECODE_BYTES
            beside = sum(both) if ranks == 1 else max(both)
        return RankMemory(
            stages=tuple(role for role in pool.roles if role in DIFFUSION_STAGES),
            tp=layout.tp,
            token_ranks=layout.sequence_parallel,
            item_bytes=self.item_bytes,
            fp8=numerics.precision == "fp8",
            fused=numerics.compile == "fused",
            beside=beside,
        )

    # --- judgements ------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise ValueError when the GPU cannot hold what is there before any row."""
        for rank in self.ranks:
            if not self._fits(self.standing(rank)):
                beside = ", with text and decode beside them," if rank.beside else ""
                raise ValueError(
                    f"{self.gpu.name}: the weights{beside} need {_gib(self.standing(rank))} GiB of a GPU, and it has "
                    f"{_gib(self.gpu.nbytes)} GiB; "
                    f"legal: {self._ways_out(rank, lambda other: self._fits(self.standing(other)))}"
                )

    def problem(self, request: RenderRequest) -> RowProblem | None:
        """Why no replica of the run can render `request`; None when it seems to fit."""
        rank = max(self.ranks, key=lambda rank: self.needed(rank, request))
        need, shape = self.needed(rank, request), request.shape
        if self._fits(need):
            return None
        size = f"{shape.height}x{shape.width}"
        have = f"{self.gpu.name} has {_gib(self.gpu.nbytes)}"
        why = f"{size}x{shape.num_frames} needs {_gib(need)} GiB of a GPU, and {have}"
        ways = self._ways_out(rank, lambda other: self._fits(self.needed(other, request)))
        frames = self._most_frames(request)
        if frames is None:
            return RowProblem("height", shape.height, f"a smaller size than {size} ({why}), or {ways}")
        return RowProblem("num_frames", shape.num_frames, f"at most {frames} at {size} ({why}), or {ways}")

    def _fits(self, nbytes: int) -> bool:
        return nbytes <= self.gpu.nbytes

    def _most_frames(self, request: RenderRequest) -> int | None:
        """The largest 8k + 1 frames that fit at the size of `request`, which does not; None when not even one does."""

        def fits(groups: int) -> bool:
            shorter = replace(request, num_frames=TIME_FACTOR * groups + 1)
            return all(self._fits(self.needed(rank, shorter)) for rank in self.ranks)

        if not fits(0):
            return None
        low, high = 0, request.shape.latent_frames - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return TIME_FACTOR * low + 1

    def _ways_out(self, rank: RankMemory, fits: Callable[[RankMemory], bool]) -> str:
        """What of the run's options would help, each by itself."""
        ways = []
        if rank.beside and fits(replace(rank, beside=0)):
            ways.append("text and decode on another GPU (--share-cards off where there are several)")
        whole = not any(other.divided for other in self.ranks)
        able = self.gpu.name not in WITHOUT_FP8
        if able and not rank.fp8 and whole and rank.item_bytes == 2 and fits(replace(rank, fp8=True, fused=True)):
            ways.append("--precision fp8")
        heads = self._checkpoint.transformer.video.heads
        for tp in (n for n in range(rank.tp + 1, heads + 1) if heads % n == 0):
            if fits(replace(rank, tp=tp, fp8=False, fused=False)):
                apart = self._numerics.tp != self._numerics.stage2_tp
                option = "--stage2-tp" if apart and rank.stages == (Stage.STAGE2,) else "--tp"
                ways.append(f"{option} {tp}{' instead of --precision fp8' if rank.fp8 else ''}")
                break
        return " or ".join([", ".join(ways), "a larger GPU"] if ways else ["a larger GPU"])

    # --- bytes -----------------------------------------------------------------------------------

    def standing(self, rank: RankMemory) -> int:
        """Bytes that are taken on the GPU of `rank` before any row."""
        upsampler = self._upsampler_bytes if Stage.STAGE2 in rank.stages else 0
        return self._shards(rank.tp, rank.fp8) + upsampler + rank.beside + _RESERVE

    def needed(self, rank: RankMemory, request: RenderRequest) -> int:
        """Bytes on the GPU of `rank` at the peak of the hungrier of its stages."""
        return self.standing(rank) + max(self.clip(rank, stage, request) for stage in rank.stages)

    def clip(self, rank: RankMemory, stage: Stage, request: RenderRequest) -> int:
        """Bytes that `stage` of `request` takes beyond what is always there."""
        shape = request.shape.half() if stage == Stage.STAGE1 else request.shape
        streams = self._checkpoint.transformer
        video, audio = _video_tokens(shape, request), shape.audio_latents
        own = math.ceil(video / rank.token_ranks) if stage == Stage.STAGE2 else video
        widths: float = _FUSED_WIDTHS if rank.fused else _WHOLE_WIDTHS + _SHARDED_WIDTHS / rank.tp
        activations = widths * (own * streams.video.dim + audio * streams.audio.dim)
        if request.images and not rank.fused:
            activations += _MODULATION_WIDTHS * own * streams.video.dim
        # cos and sin, each for half of a head's channels: of a stream, and of the bridge between them
        tables = video * (streams.video.dim + streams.audio.context_dim) + audio * 2 * streams.audio.dim
        # of the prompt and of the negative one
        contexts = 2 * self._numerics.text_tokens * (streams.video.context_dim + streams.audio.context_dim)
        state = (video + audio) * VIDEO_CHANNELS * _SAMPLER_BYTES[PIPELINES[request.pipeline].sampler]
        return int(rank.item_bytes * (activations + tables / rank.tp + contexts) + state)

    def _shard_bytes(self, tp: int, fp8: bool) -> int:
        return transformer_bytes(self._checkpoint.tensors, tp, self.item_bytes, fp8)

    @cached_property
    def _upsampler_bytes(self) -> int:
        path = self._model.spatial_upsampler_path
        tensors = diffusers_layout.read_upsampler(path).tensors if os.path.isdir(path) else read_header(path).tensors
        return self.item_bytes * _elements(tensors)

    @cached_property
    def text_bytes(self) -> int:
        """Of Gemma's text model."""
        folder = gemma_folders(self._model.gemma_root)[0]
        tensors = diffusers_layout.read_weights(folder, "model.safetensors")
        text = {name: info for name, info in tensors.items() if "vision" not in name and "projector" not in name}
        return self.item_bytes * _elements(text)


def can_share(checkpoint: Checkpoint, model: ModelFiles, numerics: Numerics, gpu: Gpu) -> bool:
    """Whether a rank of the DiT finds room beside either of text and decode for certain, for clips of the HQ size."""
    room = MemoryBudget(checkpoint, model, (), numerics, gpu)
    rank = RankMemory(
        stages=DIFFUSION_STAGES,
        tp=min(numerics.tp, numerics.stage2_tp),
        item_bytes=room.item_bytes,
        fp8=numerics.precision == "fp8",
        fused=numerics.compile == "fused",
        beside=max(room.text_bytes + _CONNECTOR_BYTES, _WHOLE_DECODE_BYTES) + _CONTEXT_BYTES,
    )
    return room.standing(rank) + _SHARED_MARGIN <= gpu.nbytes


def transformer_bytes(tensors: Mapping[str, TensorInfo], tp: int, item_bytes: int, fp8: bool) -> int:
    """What a rank's shard of the transformer takes at `item_bytes` a number, or at one byte where `fp8` is used."""
    total = 0
    for name, info in tensors.items():
        count = math.prod(info.shape)
        if fp8 and _IN_FP8.fullmatch(name):
            total += count + 4 * info.shape[0]  # a float32 scale for every output feature
        else:
            total += item_bytes * (count // tp if tp > 1 and _SHARDED.fullmatch(name) else count)
    return total


def _video_tokens(shape: ClipShape, request: RenderRequest) -> int:
    """Packed length of a stage's video latent; images at later frames are appended to it."""
    keyframes = sum(image.frame_idx != 0 for image in request.images)
    return shape.video_tokens + keyframes * shape.latent_height * shape.latent_width


def _elements(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(math.prod(info.shape) for info in tensors.values())


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f}"
