#!/usr/bin/env python
"""Benchmark merging and switching a LoRA against the reference's `apply_loras` on the same tensors, in one run.

    scripts/bench_lora.py [--layers 48] [--folder /tmp/bench] [--clean host|device|file]

Weights and rank-384 factors are random, at the released widths. The reference is the installed `ltx_core` (v1.2.0 and
PyPI's 1.0.0 differ); without it, the peer is the same three operations for each layer. Ours is the product's
LoraMerger: "merge" starts from clean weights in place; "switch" goes from one strength to another and copies the clean
weights first. Also prints how many merged weights agree with the reference's bit for bit.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_ray.checkpoints.lora import LoraPair
from ltx_ray.model.transformer import Transformer
from ltx_ray.parallel.collectives import RankGroup
from ltx_ray.parallel.loading import ShardRead, load_shard, read_shards
from ltx_ray.parallel.lora import LoraMerger, LoraSetting
from ltx_ray.parallel.weight_cache import FreeMemory
from scripts.bench import random_transformer

MIB = 2**20
Call = Callable[[], object]


def reference(weights: dict[str, torch.Tensor], factors: dict[str, torch.Tensor], strength: float) -> tuple[Call, str]:
    """A call that merges `factors` into `weights` as the reference does, which replaces the tensors; and its name."""
    device = next(iter(weights.values())).device
    try:
        from ltx_core.loader.fuse_loras import apply_loras
        from ltx_core.loader.primitives import LoraStateDictWithStrength, StateDict
    except ImportError:

        def merge() -> None:
            for key, weight in weights.items():
                a, b = (factors[f"{key[:-7]}.lora_{s}.weight"].to(device, non_blocking=True) for s in "AB")
                weights[key] = torch.matmul(b * strength, a).add_(weight)

        return merge, "the reference's operations"
    clean = StateDict(weights, device, 0, {torch.bfloat16})
    lora = LoraStateDictWithStrength(StateDict(factors, device, 0, {torch.bfloat16}), strength)
    return lambda: apply_loras(clean, [lora], destination_sd=clean), "ltx_core.apply_loras"


def clock(call: Call, device: torch.device) -> float:
    """Milliseconds of one call, with the device idle before and after it."""
    _wait(device)
    began = time.perf_counter()
    call()
    _wait(device)
    return (time.perf_counter() - began) * 1e3


def median(call: Call, device: torch.device, repeat: int) -> float:
    return sorted(clock(call, device) for _ in range(repeat))[repeat // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_memory(call: Call, device: torch.device) -> float:
    """MiB that a call allocates beyond what is allocated already."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


@dataclass(frozen=True)
class Peer:
    """The reference's milliseconds with factors on the device and in host memory, and weights to compare with."""

    on_device: float
    from_host: float
    #: Some weights before and after one merge at strength 0.5.
    clean: dict[str, torch.Tensor]
    merged: dict[str, torch.Tensor]


def measure_reference(model: Transformer, pairs: Mapping[str, LoraPair], repeat: int) -> Peer:
    """Time the reference's merge into the weights of `model`, which it replaces."""
    keys = [f"{module}.weight" for module in pairs]
    weights = {key: model.get_parameter(key).data for key in keys}
    device = weights[keys[0]].device
    in_file = {info.key: info for pair in pairs.values() for info in (pair.a.tensor, pair.b.tensor)}
    factors = {key: torch.empty(info.shape, dtype=torch.bfloat16, device=device) for key, info in in_file.items()}
    for _ in read_shards([ShardRead(info, None, factors[key]) for key, info in in_file.items()], RankGroup()):
        pass
    for weight in weights:  # else the model would keep the tensors that the reference replaces
        model.get_parameter(weight).data = torch.empty(0, dtype=torch.bfloat16, device=device)
    sample = keys[: 34 * 2] + keys[-34:]
    clean = {key: weights[key].clone() for key in sample}
    call, name = reference(weights, factors, 0.5)
    first = clock(call, device)
    merged = {key: weights[key].clone() for key in sample}
    on_device = median(call, device, repeat)
    call, _ = reference(weights, {key: value.cpu() for key, value in factors.items()}, 0.5)
    from_host = median(call, device, 3)
    print(
        f"{name}: {on_device:.1f} ms with factors on the device (first time {first:.0f}), {from_host:.0f} ms from host"
    )
    return Peer(on_device, from_host, clean, merged)


def print_agreement(model: Transformer, merged: Mapping[str, torch.Tensor]) -> None:
    same = sum(int((model.get_parameter(key) == weight).sum()) for key, weight in merged.items())
    total = sum(weight.numel() for weight in merged.values())
    worst = max(
        float((model.get_parameter(key).float() - weight.float()).abs().max() / weight.float().abs().max())
        for key, weight in merged.items()
    )
    print(f"  bits as the reference's: {same / total:.6%} of {total / 1e6:.0f} million weights, worst {worst:.1e}")


def measure_ours(model: Transformer, merger: LoraMerger, device: torch.device, peer_ms: float, repeat: int) -> None:
    """Time merging from clean weights, copying these, and switching between two strengths."""
    strengths = itertools.cycle((0.25, 0.5))

    def switch() -> None:
        assert merger.switch_to(LoraSetting(((0, next(strengths)),)))

    def restore() -> None:
        merger.switch_to(LoraSetting())

    extra, switched = extra_memory(switch, device), median(switch, device, repeat)
    copies, merges = [], []
    for _ in range(repeat):
        copies.append(clock(restore, device))
        merges.append(clock(switch, device))
    copied, merged = statistics.median(copies), statistics.median(merges)
    print(
        f"  merge {merged:.1f} ms = {merged / peer_ms:.2f} x the reference; clean copy {copied:.1f} ms; switch "
        f"{switched:.1f} ms, above the copy {(switched - copied) / peer_ms:.2f} x; extra memory {extra:.1f} MiB"
    )
    restore()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ltx-ray-bench"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clean", default="host", choices=("host", "device", "file"))
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    device, layers, repeat = torch.device(arguments.device), arguments.layers, arguments.repeat
    infos = random_transformer.write_checkpoint(arguments.folder / f"transformer-{layers}.safetensors", layers)
    pairs = random_transformer.write_lora(arguments.folder / f"lora-{layers}.safetensors", layers)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, {layers} layers, {len(pairs)} linear layers, rank {random_transformer.LORA_RANK}, bfloat16")

    def load() -> Transformer:
        model = random_transformer.build(layers)
        load_shard(model, infos, RankGroup(), dtype=torch.bfloat16, device=device)
        return model

    # The reference comes first: only a sample of its results stays in memory.
    peer = measure_reference(load(), pairs, repeat)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    model = load()
    for where in ("device", "host"):
        merger = LoraMerger(model, infos, [pairs], RankGroup())
        began = time.perf_counter()
        merger.cache_sources(0, FreeMemory(0, 0), clean=arguments.clean, factors=where)
        merger.take_over(wait=True)
        _wait(device)
        print(f"factors on {where}, clean weights on {arguments.clean}: kept in {time.perf_counter() - began:.1f} s")
        merger.switch_to(LoraSetting(((0, 0.5),)))
        if where == "device":
            print_agreement(model, peer.merged)
        measure_ours(model, merger, device, peer.on_device if where == "device" else peer.from_host, repeat)
        if where == "device":
            exact = all(torch.equal(model.get_parameter(key), weight) for key, weight in peer.clean.items())
            print(f"  back at strength 0 the weights are the file's: {exact}")
        del merger
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
