#!/usr/bin/env python
"""Merging and switching a LoRA against the reference's `apply_loras` on the same tensors, in one run.

    scripts/bench_lora.py [--layers 48] [--folder /tmp/bench] [--clean host|device|file]

Random weights and rank-384 factors at real widths. The reference is `ltx_core` as installed (v1.2.0's and
PyPI's 1.0.0 differ); without it the peer is the same three operations a layer, written plainly. Ours is the
product's LoraMerger: "merge" from clean weights in place, "switch" from one strength to another, which copies
the clean weights first. Also prints how many of the merged weights have the reference's bits.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_ray.parallel.layers import RankGroup
from ltx_ray.parallel.loading import load_shard
from ltx_ray.parallel.lora import LoraMerger, LoraSetting
from ltx_ray.parallel.weight_cache import FreeMemory
from scripts.bench import random_transformer

MIB = 2**20


def reference(weights: dict[str, torch.Tensor], factors: dict[str, torch.Tensor], strength: float):
    """The reference's merge of `factors` into `weights`, in place of the old tensors; and its name."""
    device = next(iter(weights.values())).device
    try:
        from ltx_core.loader.fuse_loras import apply_loras
        from ltx_core.loader.primitives import LoraStateDictWithStrength, StateDict
    except ImportError:

        def plainly() -> None:
            for key, weight in weights.items():
                a, b = (factors[f"{key[:-7]}.lora_{s}.weight"].to(device, non_blocking=True) for s in "AB")
                weights[key] = torch.matmul(b * strength, a).add_(weight)

        return plainly, "the reference's operations"
    clean = StateDict(weights, device, 0, {torch.bfloat16})
    lora = LoraStateDictWithStrength(StateDict(factors, device, 0, {torch.bfloat16}), strength)
    return lambda: apply_loras(clean, [lora], destination_sd=clean), "ltx_core.apply_loras"


def clock(call, device: torch.device) -> float:
    """Milliseconds of one call, with the device idle before and after."""
    _wait(device)
    began = time.perf_counter()
    call()
    _wait(device)
    return (time.perf_counter() - began) * 1e3


def median(call, device: torch.device, repeat: int) -> float:
    return sorted(clock(call, device) for _ in range(repeat))[repeat // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_memory(call, device: torch.device) -> float:
    """MiB that a call takes beyond what was there."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


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

    model = random_transformer.build(layers)
    load_shard(model, infos, RankGroup(), dtype=torch.bfloat16, device=device)
    keys = [f"{module}.weight" for module in pairs]
    in_file = {i.key: i for pair in pairs.values() for i in (pair.a.tensor, pair.b.tensor)}
    factors = {key: torch.empty(info.shape, dtype=torch.bfloat16, device=device) for key, info in in_file.items()}
    from ltx_ray.parallel.loading import ShardRead, read_shards

    for _ in read_shards([ShardRead(info, None, factors[key]) for key, info in in_file.items()], RankGroup()):
        pass

    # the reference first: its results are compared with ours and thrown away
    weights = {key: model.get_parameter(key).data for key in keys}
    del model  # the reference replaces tensors, and the old ones must go
    some = keys[: 34 * 2] + keys[-34:]
    clean = {key: weights[key].clone() for key in some}
    call, peer = reference(weights, factors, 0.5)
    first = clock(call, device)
    expected = {key: weights[key].clone() for key in some}
    on_device = median(call, device, repeat)
    pageable = {key: value.cpu() for key, value in factors.items()}
    call, _ = reference(weights, pageable, 0.5)
    from_host = median(call, device, 3)
    print(
        f"{peer}: {on_device:.1f} ms with factors on the device (first time {first:.0f}), {from_host:.0f} ms from host"
    )
    del weights, factors, pageable, call

    if device.type == "cuda":
        torch.cuda.empty_cache()
    model = random_transformer.build(layers)
    load_shard(model, infos, RankGroup(), dtype=torch.bfloat16, device=device)
    for where in ("device", "host"):
        merger = LoraMerger(model, infos, [pairs], RankGroup())
        began = time.perf_counter()
        merger.cache_sources(0, FreeMemory(0, 0), clean=arguments.clean, factors=where)
        _wait(device)
        print(f"factors on {where}, clean weights on {arguments.clean}: kept in {time.perf_counter() - began:.1f} s")
        merger.switch_to(LoraSetting(((0, 0.5),)))
        if where == "device":
            same = sum(int((model.get_parameter(k) == expected[k]).sum()) for k in some)
            total = sum(expected[k].numel() for k in some)
            worst = max(
                float(
                    (model.get_parameter(k).float() - expected[k].float()).abs().max() / expected[k].float().abs().max()
                )
                for k in some
            )
            print(
                f"  bits as the reference's: {same / total:.6%} of {total / 1e6:.0f} million weights, worst {worst:.1e}"
            )
        strengths = iter([0.25, 0.5] * 100)

        def switch(merger=merger, strengths=strengths) -> None:
            assert merger.switch_to(LoraSetting(((0, next(strengths)),)))

        extra = extra_memory(switch, device)
        switched = median(switch, device, repeat)

        def copy(merger=merger) -> None:
            merger.switch_to(LoraSetting())

        copied, merged = [], []
        for _ in range(repeat):
            copied.append(clock(copy, device))
            merged.append(clock(switch, device))
        copied, merged = sorted(copied)[repeat // 2], sorted(merged)[repeat // 2]
        peer_ms = on_device if where == "device" else from_host
        print(
            f"  merge {merged:.1f} ms = {merged / peer_ms:.2f} x the reference; clean copy {copied:.1f} ms; switch "
            f"{switched:.1f} ms, above the copy {(switched - copied) / peer_ms:.2f} x; extra memory {extra:.1f} MiB"
        )
        merger.switch_to(LoraSetting())
        if where == "device":
            exact = all(torch.equal(model.get_parameter(k), clean[k]) for k in some)
            print(f"  back at strength 0 the weights are the file's: {exact}")
        del merger
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
