"""The numerics of a run: what a user asked for, checked, and resolved for the GPUs of the cluster. No torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection

from ltx_ray.config import FA3_MODULES, Numerics, RequestedNumerics
from ltx_ray.placement.sizing import ParallelConfig

#: Legal values of `RequestedNumerics`, by field.
NUMERICS_CHOICES = {
    "dtype": ("bfloat16", "float32"),
    "precision": ("bf16", "fp8"),
    "noise_device": ("model", "cpu"),
    "device": ("auto", "cuda", "cpu"),
    "attention": ("auto", "fa3", "cudnn", "flash", "sdpa"),
    "compile": ("auto", "fused", "off"),
}
#: Attention backends that run on GPUs only, in bfloat16, and that the fused path alone uses.
_GPU_ATTENTION = ("fa3", "cudnn", "flash")
#: Ray's names of the GPUs that FlashAttention-3 is written for.
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")
#: Ray's names of GPUs whose tensor cores do not support e4m3, and of those that do not support bfloat16 either.
WITHOUT_FP8 = ("A100", "A100-40G", "A100-80G", "A10", "A10G", "A30", "A40", "T4", "V100", "P100")
_WITHOUT_BF16 = ("T4", "V100", "P100")


def has_fa3() -> bool:
    """Whether FlashAttention-3 is installed here; it is not imported. Replicas have the same environment."""
    return any(importlib.util.find_spec(name) for name in FA3_MODULES)


def check(requested: RequestedNumerics, parallel: ParallelConfig) -> None:
    """Raise ValueError for options that exclude each other on every device."""
    divided = _dividing_option(parallel)
    if requested.precision == "fp8":
        if requested.dtype != "bfloat16":
            raise ValueError(f"--precision: 'fp8' with --dtype {requested.dtype}, legal: --dtype bfloat16")
        if requested.compile == "off":
            raise ValueError("--compile: 'off' with --precision fp8, legal: auto or fused")
        if divided:
            raise ValueError(f"--precision: 'fp8' with {divided}, legal: replicas of one rank for each set of weights")
    if requested.compile == "fused" and divided:
        raise ValueError(f"--compile: 'fused' with {divided}, legal: auto or off")
    if requested.attention in _GPU_ATTENTION:
        if requested.compile == "off" or divided:
            why = divided or "--compile off"
            raise ValueError(f"--attention: {requested.attention!r} with {why}, legal: auto or sdpa")
        if requested.dtype == "float32":
            raise ValueError(f"--attention: {requested.attention!r} with --dtype float32, legal: auto or sdpa")


def resolve(
    requested: RequestedNumerics, parallel: ParallelConfig, device: str, gpu_models: Collection[str], fa3: bool
) -> Numerics:
    """`requested` on `device` ("cuda" or "cpu"), with every "auto" replaced by the fastest that is supported there.

    `gpu_models`: Ray's names of the cluster's GPUs, empty when they are unknown. `fa3`: whether FlashAttention-3 is
    installed. Raises ValueError when the device does not support what was asked for.
    """
    on_gpu = device == "cuda"
    if requested.attention in _GPU_ATTENTION and not on_gpu:
        raise ValueError(f"--attention: {requested.attention!r} without a GPU, legal: auto or sdpa")
    if on_gpu and requested.precision == "fp8" and (old := [name for name in gpu_models if name in WITHOUT_FP8]):
        raise ValueError(
            f"--precision: 'fp8' on {old[0]}, legal: bf16, or GPUs that support fp8 (Ada, Hopper and later)"
        )
    compiled = _resolve_compile(requested, parallel, on_gpu, gpu_models)
    fused = compiled == "fused"
    return Numerics(
        dtype=requested.dtype,
        precision=requested.precision,
        noise_device=requested.noise_device,
        device=device,
        attention=_resolve_attention(requested, fused and on_gpu, gpu_models, fa3),
        # One call with two guidance passes is 1 to 4 % faster than two calls (docs/benchmarks.md).
        guidance_batching=2 if fused and parallel.guidance_parallel == 1 else 1,
        compile=compiled,
        tp=parallel.tp,
        stage2_tp=parallel.tp_of_stage2,
        guidance_parallel=parallel.guidance_parallel,
        sequence_parallel=parallel.sequence_parallel,
    )


def _resolve_compile(
    requested: RequestedNumerics, parallel: ParallelConfig, on_gpu: bool, gpu_models: Collection[str]
) -> str:
    if requested.compile != "auto":
        return requested.compile
    if requested.precision == "fp8":
        return "fused"
    with_bf16 = not any(name in _WITHOUT_BF16 for name in gpu_models)
    supported = on_gpu and with_bf16 and requested.dtype == "bfloat16" and not _dividing_option(parallel)
    return "fused" if supported else "off"


def _resolve_attention(requested: RequestedNumerics, fused_on_gpu: bool, gpu_models: Collection[str], fa3: bool) -> str:
    if requested.attention != "auto":
        return requested.attention
    if not fused_on_gpu or requested.dtype != "bfloat16":
        return "sdpa"
    hopper = bool(gpu_models) and all(name in _HOPPER for name in gpu_models)
    return "fa3" if hopper and fa3 else "cudnn"


def _dividing_option(parallel: ParallelConfig) -> str:
    """The option that divides weights or tokens among ranks, which the fused path does not support; "" for none."""
    for option, ranks in (
        ("--tp", parallel.tp),
        ("--stage2-tp", parallel.tp_of_stage2),
        ("--sequence-parallel", parallel.sequence_parallel),
    ):
        if ranks > 1:
            return f"{option} {ranks}"
    return ""
