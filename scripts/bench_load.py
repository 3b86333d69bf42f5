#!/usr/bin/env python
"""Benchmark loading a shard against a plain read of the same file and against the bus, in one run.

    scripts/bench_load.py [--layers 48] [--folder /tmp/bench] [--tp 1,2,4,8] [--cold] [--repeat 3] [--json FILE]
    scripts/bench_load.py --ranks 2 [--layers 48] [--folder /tmp/bench] [--cold] [--repeat 3] [--json FILE]

Writes, once, a file with the transformer's tensors at the released widths. "plain" reads it from beginning to end with
one thread into one buffer; "bus" copies pinned memory to the device. The target for loading is 0.8 of the lower of the
two. "of the file's read" is the plain reading time of the whole file over the loading time: the wait of a gang, whose
ranks all load at once. With --cold the file is dropped from the page cache before each read.

Without --ranks, rank 0 of each size of gang loads alone. With --ranks N, a gang of tp N loads: N processes, each with a
card of its own (or all on the CPU, with --device cpu), begin at the same moment to load their shards. Its seconds run
until the slowest rank is done. "from the disk" are the bytes that all ranks together had read from a disk
(/proc/self/io), over the size of the file: 1 when each page is read once. They say something with --cold only.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_ray.parallel.collectives import RankGroup
from scripts.bench import random_transformer
from scripts.bench.shard_loads import GangLoad, drop_from_page_cache, load, load_gang, plain_read

_SIZES = (1, 2, 4, 8)


def bus(device: torch.device) -> float:
    """Bytes a second of copying pinned host memory to the device."""
    source = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(2**30, dtype=torch.uint8, device=device)
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(8):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(device)
    return 8 * 2**30 / (time.perf_counter() - began)


def alone(a: argparse.Namespace, path: Path, plain: float) -> dict[str, Any]:
    """Load rank 0's shard of each size of gang, and print a line for each. `plain`: seconds of a plain read."""
    size, device = path.stat().st_size, torch.device(a.device)
    infos = random_transformer.write_checkpoint(path, a.layers)
    limit, figures = size / plain, dict[str, Any]()
    if device.type == "cuda":
        figures["bus_bytes_per_second"] = bus(device)
        limit = min(limit, figures["bus_bytes_per_second"])
        print(f"bus         {figures['bus_bytes_per_second'] / 1e9:6.2f} GB/s")
    print("tp  shard GB  seconds   GB/s  of the limit  of the file's read  host MiB  device MiB above the shard")
    before = functools.partial(drop_from_page_cache, path) if a.cold else None
    for tp in a.tp:
        loads = [load(a.layers, infos, RankGroup(0, tp), device, before) for _ in range(a.repeat)]
        seconds, shard = median(each.seconds for each in loads), loads[0].shard
        rate = shard / seconds
        print(
            f"{tp:2}  {shard / 1e9:8.2f}  {seconds:7.2f}  {rate / 1e9:5.2f}  {rate / limit:12.2f}  "
            f"{plain / seconds:18.2f}  {max(each.host for each in loads) / 2**20:8.0f}  "
            f"{max(each.device for each in loads) / 2**20:8.0f}"
        )
        figures[f"tp {tp}"] = {"seconds": seconds, "loads": [asdict(each) for each in loads]}
    return figures


def gang_figures(loads: list[GangLoad], plain: float, size: int) -> dict[str, Any]:
    """Figures of a gang's loads: medians over the repetitions. `plain`: seconds of a plain read of `size` bytes."""
    seconds = median(each.seconds for each in loads)
    disks = [each.disk for each in loads if each.disk is not None]
    return {
        "seconds": seconds,
        "plain_seconds": plain,
        "plain_over_gang": plain / seconds,
        "shards_over_file": loads[0].shards / size,
        "disk_over_file": median(disks) / size if len(disks) == len(loads) else None,
    }


def together(a: argparse.Namespace, path: Path, plain: float) -> dict[str, Any]:
    """Load all shards of a gang at once, and print a line for each repetition and their medians."""
    size = path.stat().st_size
    loads = load_gang(path, a.layers, a.ranks, a.device, a.cold, a.repeat)
    figures = gang_figures(loads, plain, size)
    print("seconds of the gang   of each rank   from the disk over the file")
    for each in loads:
        ranks = "  ".join(f"{rank.seconds:.2f}" for rank in each.ranks)
        print(f"{each.seconds:19.2f}   {ranks}   {_ratio(each.disk and each.disk / size)}")
    print(
        f"{a.ranks} ranks at once: {figures['seconds']:.2f} s, {size / figures['seconds'] / 1e9:.2f} GB/s of the file; "
        f"a plain read takes {plain:.2f} s, {figures['plain_over_gang']:.2f} times as long"
    )
    print(
        f"all shards over the file {figures['shards_over_file']:.2f}, "
        f"read from the disk over the file {_ratio(figures['disk_over_file'])}"
    )
    return figures | {"loads": [[asdict(rank) for rank in each.ranks] for each in loads]}


def _ratio(value: float | None) -> str:
    return "not counted here" if value is None else f"{value:.2f}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ltx-ray-bench"))
    parser.add_argument("--tp", help="sizes of gangs of which rank 0 loads its shard alone (default: 1,2,4,8)")
    parser.add_argument("--ranks", type=int, help="load all shards of a gang of this size at once: 1, 2, 4 or 8")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cold", action="store_true", help="drop the file from the page cache before each read")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the figures")
    a = parser.parse_args()
    if a.ranks is not None and a.tp is not None:
        parser.error("--ranks and --tp exclude each other")
    if a.ranks is not None and a.ranks not in _SIZES:
        parser.error(f"--ranks: {a.ranks}, legal: {', '.join(map(str, _SIZES))}")
    if a.ranks and a.device == "cuda" and a.ranks > torch.cuda.device_count():
        parser.error(f"--ranks: {a.ranks}, but torch finds {torch.cuda.device_count()} GPUs")
    if a.repeat < 1:
        parser.error(f"--repeat: {a.repeat}, legal: 1 and more")
    if a.json and not a.json.parent.is_dir():
        parser.error(f"--json: {a.json}, the folder does not exist")
    a.tp = [int(n) for n in a.tp.split(",")] if a.tp else list(_SIZES)
    return a


def main() -> None:
    a = parse()
    path = a.folder / f"transformer-{a.layers}.safetensors"
    random_transformer.write_checkpoint(path, a.layers)
    size = path.stat().st_size
    name = torch.cuda.get_device_name() if a.device == "cuda" else "CPU"
    print(f"{name}, {a.layers} layers, {size / 1e9:.1f} GB, {'cold' if a.cold else 'warm'}")
    if not a.cold:
        plain_read(path)  # brings the file into the page cache
    plain = median(plain_read(path, a.cold) for _ in range(a.repeat))
    print(f"plain read  {size / plain / 1e9:6.2f} GB/s")
    figures = together(a, path, plain) if a.ranks else alone(a, path, plain)
    if a.json:
        about = {"device": name, "layers": a.layers, "ranks": a.ranks, "file_bytes": size, "cold": a.cold}
        a.json.write_text(json.dumps(about | {"plain_seconds": plain} | figures, indent=1))


if __name__ == "__main__":
    main()
