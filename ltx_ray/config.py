"""Everything about a run that does not change pixels, and the spec that engines are built from."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

from ltx_ray.stages import Stage

#: FlashAttention-3 by the modules that have it: the package fa3-fwd, and a build from its source.
FA3_MODULES = ("fa3_fwd_interface", "flash_attn_interface")


@dataclass(frozen=True)
class LoraSpec:
    """A user LoRA declared with --lora: `name` is the file's stem, `strength` the default of rows."""

    name: str
    path: str
    strength: float = 1.0


@dataclass(frozen=True)
class ModelFiles:
    """Where the model's files are. `provider` names a function (`module:function`) that makes them
    available on a node and returns the paths there; it is called wherever the files are needed."""

    checkpoint_path: str
    gemma_root: str
    spatial_upsampler_path: str
    distilled_lora: str | None = None
    loras: tuple[LoraSpec, ...] = ()
    #: Whether the checkpoint is the distilled one, which serves the distilled pipeline alone.
    distilled: bool = False
    provider: str | None = None

    def local(self) -> ModelFiles:
        """The same files as paths on this node."""
        if self.provider is None:
            return self
        module, _, function = self.provider.partition(":")
        paths = getattr(importlib.import_module(module), function)()
        return replace(self, **paths)


@dataclass(frozen=True)
class Numerics:
    """How the arithmetic is done, resolved once a run by the driver and recorded with every clip."""

    dtype: str = "bfloat16"
    precision: str = "bf16"
    noise_device: str = "model"
    device: str = "cpu"
    attention: str = "sdpa"
    guidance_batching: int = 1
    text_tokens: int = 1024
    text_batch: int = 1
    compile: str = "off"
    #: Ranks that share a stage-1 replica's weights, those of stage 2, those that share its guidance passes,
    #: and those that share stage 2's tokens.
    tp: int = 1
    stage2_tp: int = 1
    guidance_parallel: int = 1
    sequence_parallel: int = 1


@dataclass(frozen=True)
class GangLayout:
    """How the ranks of a gang divide the work of the stages that it serves."""

    roles: tuple[Stage, ...] = ()
    #: Ranks that share one copy of the weights.
    tp: int = 1
    #: Groups of `tp` ranks that share the guidance passes of stage 1, and that share the tokens of stage 2.
    guidance_parallel: int = 1
    sequence_parallel: int = 1
    #: Whether the gang is certain to alternate between the diffusion stages, so that it prepares for switches at once.
    alternates: bool = False
    #: Whether text and decode have ranks on the same cards.
    shared_card: bool = False


@dataclass(frozen=True)
class EngineSpec:
    """What a pool's engine is made of; travels to the rank actors."""

    engine: str
    model: ModelFiles
    numerics: Numerics
    output: str
    save_latents: bool = False
    stop_after: str | None = None
    layout: GangLayout = GangLayout()


@dataclass(frozen=True)
class PoolSpec:
    """One pool: `roles` lists the stages its replicas serve (two when stages share replicas)."""

    name: str
    roles: tuple[Stage, ...]
    replicas: int
    ranks: int
    engine: EngineSpec
    cpus_per_rank: float = 1.0
    gpus_per_rank: float = 0.0


@dataclass(frozen=True)
class RunLimits:
    """Bounds the driver keeps. Times in seconds."""

    max_attempts: int = 3
    queue_depth: int = 4
    start_timeout: float = 1800.0
    call_timeout: float = 7200.0
    max_failed_fraction: float | None = None
    max_gpu_hours: float | None = None
    #: What the decode pool has to finish its clips when the run is told to stop.
    grace: float = 20.0


@dataclass(frozen=True)
class Selection:
    """Which rows of the manifest this run takes."""

    limit: int | None = None
    ids: frozenset[str] | None = None
    shard: tuple[int, int] | None = None
