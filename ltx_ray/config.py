"""Settings of a run: model files, numerics, limits and selection, and the specs of its pools and engines."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from ltx_ray.shapes import ClipShape
from ltx_ray.stages import Stage

#: Threads of x264. The bytes that it encodes depend on their number, so it is fixed.
ENCODER_THREADS = 8
#: Modules that provide FlashAttention-3: that of the package fa3-fwd, and that of a build from source.
FA3_MODULES = ("fa3_fwd_interface", "flash_attn_interface")
#: Attention backends that run on GPUs only, and the head widths that they take: multiples of the first number up to the
#: second. Source: `hopper/flash_api.cpp` of FlashAttention, and `sdp_utils.cpp` of PyTorch, which pads heads for flash.
GPU_ATTENTION = {"fa3": (8, 256), "cudnn": (8, 128), "flash": (1, 256)}
#: The widest heads that cudnn takes on Hopper GPUs.
_CUDNN_ON_HOPPER = 256


def widest_heads(attention: str, hopper: bool) -> int:
    """Channels of the widest heads that a backend of GPU_ATTENTION takes. `hopper`: on GPUs of that generation."""
    return _CUDNN_ON_HOPPER if attention == "cudnn" and hopper else GPU_ATTENTION[attention][1]


def takes_heads(attention: str, head_dims: Collection[int], hopper: bool) -> bool:
    """Whether a backend takes heads of all of these widths."""
    if attention not in GPU_ATTENTION:
        return True
    multiple, widest = GPU_ATTENTION[attention][0], widest_heads(attention, hopper)
    return all(dim <= widest and dim % multiple == 0 for dim in head_dims)


@dataclass(frozen=True)
class LoraSpec:
    """A user LoRA declared with --lora: `name` is the file's stem, `strength` the default of rows."""

    name: str
    path: str
    strength: float = 1.0


@dataclass(frozen=True)
class RemoteFile:
    """A file of the model below a URI, as the driver has read it: its path from there ("" for the URI itself), bytes,
    the store's version of it, and its digest (`checkpoints.digests.file_digest`)."""

    relative: str
    size: int
    version: str
    digest: str


@dataclass(frozen=True)
class ModelFiles:
    """Paths and URIs of the model's files.

    `provider` names a function (`module:function`) that makes the files available on a node and returns their paths
    there by field name. It is called on every node that needs the files.
    """

    checkpoint_path: str
    gemma_root: str
    spatial_upsampler_path: str
    distilled_lora: str | None = None
    loras: tuple[LoraSpec, ...] = ()
    #: Whether the checkpoint is the distilled one, which serves only the distilled pipeline.
    distilled: bool = False
    provider: str | None = None
    #: The files below each path that is a URI, once the driver has looked (`checkpoints.node_cache.pinned`).
    remote: tuple[tuple[str, tuple[RemoteFile, ...]], ...] = ()
    #: Bytes that a node keeps of such files at most; None for no bound.
    cache_bytes: int | None = None

    def in_place(self) -> ModelFiles:
        """The same files where they can be looked at: URIs stay, and a provider's files are made on this node."""
        if self.provider is None:
            return self
        module, _, function = self.provider.partition(":")
        paths = getattr(importlib.import_module(module), function)()
        return replace(self, **paths)

    def paths(self) -> tuple[str, ...]:
        """The paths of all files and folders, each once."""
        named = (self.checkpoint_path, self.gemma_root, self.spatial_upsampler_path, self.distilled_lora)
        return tuple(dict.fromkeys(path for path in (*named, *(lora.path for lora in self.loras)) if path))

    def at(self, places: Mapping[str, str]) -> ModelFiles:
        """The same files where those of `places` are at other paths."""

        def place(path: str) -> str:
            return places.get(path, path)

        return replace(
            self,
            checkpoint_path=place(self.checkpoint_path),
            gemma_root=place(self.gemma_root),
            spatial_upsampler_path=place(self.spatial_upsampler_path),
            distilled_lora=self.distilled_lora and place(self.distilled_lora),
            loras=tuple(replace(lora, path=place(lora.path)) for lora in self.loras),
        )


#: How items are identified (docs/dataset.md#schemes). An output that has rows of an older scheme goes on with it.
NEWEST_SCHEME = 2


@dataclass(frozen=True)
class RecipeNumerics:
    """The part of the numerics that belongs to an item's recipe, and so to its item_id."""

    dtype: str = "bfloat16"
    #: Format of the DiT's linear layers: "bf16" or "fp8".
    precision: str = "bf16"
    #: Where noise is drawn: "model" (on the model's own device) or "cpu".
    noise_device: str = "model"


@dataclass(frozen=True)
class RequestedNumerics(RecipeNumerics):
    """How a user wants the arithmetic done. `placement.numerics.resolve` replaces each "auto"."""

    device: str = "auto"
    attention: str = "auto"
    compile: str = "auto"


@dataclass(frozen=True)
class Numerics(RecipeNumerics):
    """How the arithmetic is done: resolved by the driver, once per run, and recorded with every clip."""

    device: str = "cpu"
    attention: str = "sdpa"
    guidance_batching: int = 1
    #: Padded length of a prompt, and the number of prompts in one text batch.
    text_tokens: int = 1024
    text_batch: int = 1
    compile: str = "off"
    #: Ranks that share the weights of a stage-1 replica and of a stage-2 replica.
    tp: int = 1
    stage2_tp: int = 1
    #: Groups of `tp` ranks that share the guidance passes of stage 1, and groups that share the tokens of stage 2.
    guidance_parallel: int = 1
    sequence_parallel: int = 1
    #: Groups of `tp` ranks that share the tokens of a pass of stage 1. JSON leaves it out where it is 1.
    stage1_sequence_parallel: int = 1


@dataclass(frozen=True)
class GangLayout:
    """How the ranks of a gang divide the work of the stages that it serves."""

    roles: tuple[Stage, ...] = ()
    #: Ranks that share one copy of the weights.
    tp: int = 1
    #: Groups of `tp` ranks that share the guidance passes of stage 1, and that share the tokens of stage 2.
    guidance_parallel: int = 1
    sequence_parallel: int = 1
    #: Groups of `tp` ranks that share the tokens of each pass of stage 1.
    stage1_sequence_parallel: int = 1
    #: Whether the gang is certain to alternate between the diffusion stages. It then prepares for switches at once.
    alternates: bool = False
    #: Whether replicas of text and decode run on the same GPUs.
    shared_card: bool = False


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is built from; it is sent to the rank actors."""

    #: Dotted path of the engine class, `module:class`.
    engine: str
    model: ModelFiles
    numerics: Numerics
    output: str
    save_latents: bool = False
    stop_after: str | None = None
    layout: GangLayout = GangLayout()
    #: The size of the first clip, for which a decoder warms up while it waits.
    first_shape: ClipShape | None = None
    #: The scheme of digests of the model's files.
    scheme: int = NEWEST_SCHEME


@dataclass(frozen=True)
class PoolSpec:
    """One pool of replicas."""

    name: str
    #: The stages that its replicas serve, the one that they begin with first.
    roles: tuple[Stage, ...]
    replicas: int
    ranks: int
    engine: EngineSpec
    cpus_per_rank: float = 1.0
    gpus_per_rank: float = 0.0
    #: The driver sizes the pool by what it measures, from one replica up to this many. None: `replicas`, always.
    most: int | None = None
    #: Calls that a replica takes at once. More than one is for engines that are safe for threads.
    calls_at_once: int = 1
    #: Its replicas share cards that have no rank of the DiT, and fill one before they begin another.
    fills_cards: bool = False


@dataclass(frozen=True)
class RunLimits:
    """Limits that the driver enforces. Times in seconds."""

    #: Attempts at a row before it fails.
    max_attempts: int = 3
    #: Items that wait before a stage, for each of its replicas.
    queue_depth: int = 4
    #: Time for a replica to start during which nothing of the model arrives on its node, and for one call of a stage.
    start_timeout: float = 1800.0
    call_timeout: float = 7200.0
    #: Replicas that may load the model at once. None: as many as do not slow each other down.
    load_concurrency: int | None = None
    #: The run drains when a larger fraction of its rows has failed.
    max_failed_fraction: float | None = None
    #: The run drains when calls have used this many GPU hours.
    max_gpu_hours: float | None = None
    #: Time for the decode pool to finish its clips when the run is told to stop.
    grace: float = 20.0


@dataclass(frozen=True)
class Selection:
    """The rows of the manifest that a run takes. None selects every row."""

    #: Take only the first `limit` rows.
    limit: int | None = None
    ids: frozenset[str] | None = None
    #: (I, N): every N-th row, beginning with row I; rows are counted from 0.
    shard: tuple[int, int] | None = None
