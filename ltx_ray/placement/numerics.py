"""The numerics of a run: what a user asked for, checked, and resolved for the GPUs of the cluster. No torch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection
from functools import lru_cache

from ltx_ray.checkpoints.transformer_config import TransformerConfig
from ltx_ray.config import FA3_MODULES, GPU_ATTENTION, Numerics, RequestedNumerics, takes_heads, widest_heads
from ltx_ray.placement.sizing import ParallelConfig
from ltx_ray.presets import PIPELINES
from ltx_ray.records import RenderRequest, canonical_json, plain
from ltx_ray.sampling.passes import needs_perturbed

#: Legal values of `RequestedNumerics`, by field.
NUMERICS_CHOICES = {
    "dtype": ("bfloat16", "float32"),
    "precision": ("bf16", "fp8"),
    "noise_device": ("model", "cpu"),
    "device": ("auto", "cuda", "cpu"),
    "attention": ("auto", "fa3", "cudnn", "flash", "sdpa"),
    "compile": ("auto", "fused", "off"),
}
#: Ray's names of the GPUs that FlashAttention-3 is written for.
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")
#: Ray's names of GPUs whose tensor cores do not support e4m3, and of those that do not support bfloat16 either.
WITHOUT_FP8 = ("A100", "A100-40G", "A100-80G", "A10", "A10G", "A30", "A40", "T4", "V100", "P100")
_WITHOUT_BF16 = ("T4", "V100", "P100")
#: fp8 products take widths that are multiples of this, and of any other width rows cannot be loaded as vectors.
_WIDTH_MULTIPLE = 16


def has_fa3() -> bool:
    """Whether FlashAttention-3 is installed here; it is not imported."""
    return any(importlib.util.find_spec(name) for name in FA3_MODULES)


def check(requested: RequestedNumerics) -> None:
    """Raise ValueError for options that exclude each other on every device."""
    if requested.precision == "fp8":
        if requested.dtype != "bfloat16":
            raise ValueError(f"--precision: 'fp8' with --dtype {requested.dtype}, legal: --dtype bfloat16")
        if requested.compile == "off":
            raise ValueError("--compile: 'off' with --precision fp8, legal: auto or fused")
    if requested.attention in GPU_ATTENTION:
        if requested.compile == "off":
            raise ValueError(f"--attention: {requested.attention!r} with --compile off, legal: auto or sdpa")
        if requested.dtype == "float32":
            raise ValueError(f"--attention: {requested.attention!r} with --dtype float32, legal: auto or sdpa")


def check_widths(requested: RequestedNumerics, parallel: ParallelConfig, transformer: TransformerConfig) -> None:
    """Raise ValueError for what no GPU does at the transformer's widths."""
    if requested.attention in GPU_ATTENTION or requested.device == "cuda":
        _check_widths_on_gpu(requested, parallel, (), transformer)


def resolve(
    requested: RequestedNumerics,
    parallel: ParallelConfig,
    device: str,
    gpu_models: Collection[str],
    fa3: bool,
    transformer: TransformerConfig | None = None,
) -> Numerics:
    """`requested` on `device` ("cuda" or "cpu"), with every "auto" replaced by the fastest that is supported there.

    `gpu_models`: Ray's names of the cluster's GPUs, empty when they are unknown. `fa3`: whether FlashAttention-3 is
    installed. `transformer`: the model that is to be run; None for one of the released widths. Raises ValueError when
    the device does not support what was asked for, or not at these widths.
    """
    on_gpu = device == "cuda"
    if requested.attention in GPU_ATTENTION and not on_gpu:
        raise ValueError(f"--attention: {requested.attention!r} without a GPU, legal: auto or sdpa")
    if on_gpu and requested.precision == "fp8" and (old := [name for name in gpu_models if name in WITHOUT_FP8]):
        raise ValueError(
            f"--precision: 'fp8' on {old[0]}, legal: bf16, or GPUs that support fp8 (Ada, Hopper and later)"
        )
    if on_gpu and requested.attention in GPU_ATTENTION and (old := [n for n in gpu_models if n in _WITHOUT_BF16]):
        raise ValueError(
            f"--attention: {requested.attention!r} on {old[0]}, legal: auto or sdpa, or GPUs with bfloat16"
        )
    if on_gpu:
        _check_widths_on_gpu(requested, parallel, gpu_models, transformer)
    compiled = _resolve_compile(requested, parallel, on_gpu, gpu_models, transformer)
    fused = compiled == "fused"
    return Numerics(
        dtype=requested.dtype,
        precision=requested.precision,
        noise_device=requested.noise_device,
        device=device,
        attention=_resolve_attention(requested, fused and on_gpu, gpu_models, fa3, transformer),
        # One call with two guidance passes is 1 to 4 % faster than two calls (docs/benchmarks.md).
        guidance_batching=2 if fused and parallel.guidance_parallel == 1 else 1,
        compile=compiled,
        tp=parallel.tp,
        stage2_tp=parallel.tp_of_stage2,
        guidance_parallel=parallel.guidance_parallel,
        sequence_parallel=parallel.sequence_parallel,
        stage1_sequence_parallel=parallel.stage1_sequence_parallel,
    )


def numerics_json(numerics: Numerics) -> str:
    """The numerics of a run as JSON. Those of runs that older versions could make have the fields of these versions."""
    fields = plain(numerics)
    if numerics.stage1_sequence_parallel == 1:
        del fields["stage1_sequence_parallel"]
    return canonical_json(fields)


def numerics_of_row(numerics: str, request: RenderRequest) -> str:
    """The numerics of a run (JSON) as a row of its own has them.

    `stg_prefix`: the perturbed pass of guidance took over the first blocks of the conditional one.
    """
    if PIPELINES[request.pipeline].distilled or not any(map(needs_perturbed, request.guidance)):
        return numerics
    return _with_stg_prefix(numerics)


@lru_cache(8)
def _with_stg_prefix(numerics: str) -> str:
    return canonical_json({**json.loads(numerics), "stg_prefix": True})


def _check_widths_on_gpu(
    requested: RequestedNumerics,
    parallel: ParallelConfig,
    gpu_models: Collection[str],
    transformer: TransformerConfig | None,
) -> None:
    # Where the models are unknown, the replicas find out.
    hopper = not gpu_models or all_hopper(gpu_models)
    if not takes_heads(requested.attention, _head_dims(transformer), hopper):
        heads, where = " and ".join(map(str, _head_dims(transformer))), " or ".join(gpu_models)
        multiple, widest = GPU_ATTENTION[requested.attention][0], widest_heads(requested.attention, hopper)
        raise ValueError(
            f"--attention: {requested.attention!r}{where and f' on {where}'} with heads of {heads} channels, legal: "
            f"auto or sdpa, or a model whose heads have up to {widest} channels, in multiples of {multiple}"
        )
    if requested.precision == "fp8" and (odd := _odd_widths(transformer, parallel)):
        raise ValueError(
            f"--precision: 'fp8' with {odd}, legal: bf16, or a model whose widths are multiples of {_WIDTH_MULTIPLE}"
        )


def _resolve_compile(
    requested: RequestedNumerics,
    parallel: ParallelConfig,
    on_gpu: bool,
    gpu_models: Collection[str],
    transformer: TransformerConfig | None,
) -> str:
    if requested.compile != "auto":
        return requested.compile
    if requested.precision == "fp8":
        return "fused"
    with_bf16 = not any(name in _WITHOUT_BF16 for name in gpu_models)
    supported = on_gpu and with_bf16 and requested.dtype == "bfloat16"
    # The fused path is right at any width, and no faster where rows cannot be loaded as vectors.
    wanted = not _odd_widths(transformer, parallel) or requested.attention in GPU_ATTENTION
    return "fused" if supported and wanted else "off"


def _resolve_attention(
    requested: RequestedNumerics,
    fused_on_gpu: bool,
    gpu_models: Collection[str],
    fa3: bool,
    transformer: TransformerConfig | None,
) -> str:
    if requested.attention != "auto":
        return requested.attention
    if not fused_on_gpu or requested.dtype != "bfloat16":
        return "sdpa"
    hopper = all_hopper(gpu_models)
    fastest = ("fa3", "cudnn") if hopper and fa3 else ("cudnn",)
    return next((name for name in fastest if takes_heads(name, _head_dims(transformer), hopper)), "sdpa")


def all_hopper(gpu_models: Collection[str]) -> bool:
    """Whether all of these GPUs are of the generation that FlashAttention-3 is written for; some have to be known."""
    return bool(gpu_models) and all(name in _HOPPER for name in gpu_models)


def _head_dims(transformer: TransformerConfig | None) -> tuple[int, ...]:
    """Widths of the heads of the video's attention, and of all other attention. The released ones need no check."""
    return () if transformer is None else (transformer.video.head_dim, transformer.audio.head_dim)


def _odd_widths(transformer: TransformerConfig | None, parallel: ParallelConfig) -> str:
    """The streams of whose width, which is that of their text too, a rank's part is no multiple of 16; "" for none."""
    if transformer is None:
        return ""
    streams, ranks = {"video": transformer.video, "audio": transformer.audio}, {parallel.tp, parallel.tp_of_stage2}
    odd = [
        f"{name} {stream.dim} wide" + (f" on {n} ranks" if n > 1 else "")
        for name, stream in streams.items()
        for n in sorted(ranks)
        if stream.dim // n % _WIDTH_MULTIPLE
    ]
    return " and ".join(odd)
