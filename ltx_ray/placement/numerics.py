"""How a run computes, chosen once by the driver from what was asked for and from the GPUs that are there. No torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from dataclasses import replace

from ltx_ray.config import FA3_MODULES, Numerics

ATTENTION = ("auto", "fa3", "cudnn", "flash", "sdpa")
COMPILE = ("auto", "fused", "off")
#: Ray's names of the GPUs that FlashAttention-3 is made for.
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")
#: GPUs, by Ray's names, whose tensor cores know no e4m3, and those among them that know no bfloat16 either.
WITHOUT_FP8 = ("A100", "A100-40G", "A100-80G", "A10", "A10G", "A30", "A40", "T4", "V100", "P100")
_WITHOUT_BF16 = ("T4", "V100", "P100")


def has_fa3() -> bool:
    """Whether this Python has FlashAttention-3; imports nothing. The driver's environment stands for the replicas'."""
    return any(importlib.util.find_spec(name) for name in FA3_MODULES)


def check(numerics: Numerics) -> None:
    """Raise ValueError when what was asked for cannot go together, on any device."""
    shared = _ranks_share(numerics)
    if numerics.precision == "fp8":
        if numerics.dtype != "bfloat16":
            raise ValueError(f"--precision: 'fp8' with --dtype {numerics.dtype}, legal: --dtype bfloat16")
        if numerics.compile == "off":
            raise ValueError("--compile: 'off' with --precision fp8, legal: auto or fused")
        if shared:
            raise ValueError(f"--precision: 'fp8' with {shared}, legal: replicas of one rank for each set of weights")
    if numerics.compile == "fused" and shared:
        raise ValueError(f"--compile: 'fused' with {shared}, legal: auto or off")
    if numerics.attention not in ("auto", "sdpa") and (numerics.compile == "off" or shared):
        why = shared or "--compile off"
        raise ValueError(f"--attention: {numerics.attention!r} with {why}, legal: auto or sdpa")
    if numerics.attention in ("fa3", "cudnn", "flash") and numerics.dtype == "float32":
        raise ValueError(f"--attention: {numerics.attention!r} with --dtype float32, legal: auto or sdpa")


def resolve(numerics: Numerics, gpu_models: Collection[str], fa3: bool) -> Numerics:
    """`numerics` for its device, with every "auto" replaced by what is fastest there.

    `gpu_models` are Ray's names of the cluster's GPUs, none when they are not known; `fa3` says whether
    FlashAttention-3 is installed. Raises ValueError when the device cannot do what was asked for.
    """
    on_gpu = numerics.device == "cuda"
    if numerics.attention in ("fa3", "cudnn", "flash") and not on_gpu:
        raise ValueError(f"--attention: {numerics.attention!r} without a GPU, legal: auto or sdpa")
    if on_gpu and numerics.precision == "fp8" and (old := [model for model in gpu_models if model in WITHOUT_FP8]):
        raise ValueError(f"--precision: 'fp8' on {old[0]}, legal: bf16, or GPUs that know fp8 (Ada, Hopper and later)")
    kind = numerics.compile
    if kind == "auto":
        old_cards = any(model in _WITHOUT_BF16 for model in gpu_models)
        able = on_gpu and numerics.dtype == "bfloat16" and not _ranks_share(numerics) and not old_cards
        kind = "fused" if able or numerics.precision == "fp8" else "off"
    attention = numerics.attention
    if attention == "auto":
        hopper = bool(gpu_models) and all(model in _HOPPER for model in gpu_models)
        fast = "fa3" if hopper and fa3 else "cudnn"
        attention = fast if on_gpu and kind == "fused" and numerics.dtype == "bfloat16" else "sdpa"
    # two guidance passes in one call are 1 to 4 % faster than one after the other (docs/benchmarks.md)
    batching = 2 if kind == "fused" and numerics.guidance_parallel == 1 else 1
    return replace(numerics, compile=kind, attention=attention, guidance_batching=batching)


def _ranks_share(numerics: Numerics) -> str:
    """The option by which ranks share weights or tokens, which the fused path does not do; "" for none."""
    for name, value in (
        ("--tp", numerics.tp), ("--stage2-tp", numerics.stage2_tp), ("--sequence-parallel", numerics.sequence_parallel),
    ):  # fmt: skip
        if value > 1:
            return f"{name} {value}"
    return ""
