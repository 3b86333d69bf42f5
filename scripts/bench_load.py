#!/usr/bin/env python
"""Benchmark loading a shard against a plain read of the same file and against the bus, in one run.

    scripts/bench_load.py [--layers 48] [--folder /tmp/bench] [--tp 1,2,4,8] [--cold]

Writes, once, a file with the transformer's tensors at the released widths. "plain" reads it from beginning to end with
one thread into one buffer; "bus" copies pinned memory to the device. The target for loading is 0.8 of the lower of the
two. "of the file's read" is the plain reading time of the whole file over the loading time: the wait of a gang, whose
ranks all load at once. With --cold the file is dropped from the page cache before each read.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_ray.checkpoints.safetensors import TensorInfo
from ltx_ray.parallel.collectives import RankGroup
from ltx_ray.parallel.loading import load_shard
from scripts.bench import random_transformer


class HostPeak:
    """A context that records in `bytes` the peak of this process's private and pinned memory above that at entry."""

    def __enter__(self) -> HostPeak:
        self._stop, self._start, self.bytes = threading.Event(), _host_bytes(), 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.bytes = max(self.bytes, _host_bytes() - self._start)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _host_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    # Pages of mapped files belong to the page cache.
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))


def drop_from_page_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def plain_read(path: Path) -> float:
    """Bytes a second of reading the file from beginning to end."""
    buffer = memoryview(bytearray(16 * 2**20))
    began, total = time.perf_counter(), 0
    with open(path, "rb", buffering=0) as file:
        while got := file.readinto(buffer):
            total += got
    return total / (time.perf_counter() - began)


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


@dataclass(frozen=True)
class Load:
    """One loading of a shard: seconds, bytes of the shard, and peak bytes of host and device memory beyond it."""

    seconds: float
    shard: int
    host: int
    device: int


def load(
    path: Path, infos: Mapping[str, TensorInfo], group: RankGroup, arguments: argparse.Namespace, device: torch.device
) -> Load:
    on_cuda = device.type == "cuda"
    if arguments.cold:
        drop_from_page_cache(path)
    model = random_transformer.build(arguments.layers, group)
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with HostPeak() as peak:
        began = time.perf_counter()
        load_shard(model, infos, group, dtype=torch.bfloat16, device=device)
        if on_cuda:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    shard = sum(p.numel() * p.element_size() for p in model.parameters())
    extra = torch.cuda.max_memory_allocated(device) - shard if on_cuda else 0
    return Load(seconds, shard, peak.bytes - (0 if on_cuda else shard), extra)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ltx-ray-bench"))
    parser.add_argument("--tp", default="1,2,4,8", help="sizes of gangs; the shard of rank 0 is loaded")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cold", action="store_true", help="drop the file from the page cache before each read")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    path = arguments.folder / f"transformer-{arguments.layers}.safetensors"
    infos = random_transformer.write_checkpoint(path, arguments.layers)
    size = path.stat().st_size
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, {arguments.layers} layers, {size / 1e9:.1f} GB, {'cold' if arguments.cold else 'warm'}")

    def timed_read() -> float:
        if arguments.cold:
            drop_from_page_cache(path)
        return plain_read(path)

    plain = statistics.median(timed_read() for _ in range(arguments.repeat))
    limit = plain
    print(f"plain read  {plain / 1e9:6.2f} GB/s")
    if device.type == "cuda":
        rate = bus(device)
        limit = min(plain, rate)
        print(f"bus         {rate / 1e9:6.2f} GB/s")
    print("tp  shard GB  seconds   GB/s  of the limit  of the file's read  host MiB  device MiB above the shard")
    for tp in (int(n) for n in arguments.tp.split(",")):
        loads = [load(path, infos, RankGroup(0, tp), arguments, device) for _ in range(arguments.repeat)]
        seconds, shard = statistics.median(each.seconds for each in loads), loads[0].shard
        rate = shard / seconds
        print(
            f"{tp:2}  {shard / 1e9:8.2f}  {seconds:7.2f}  {rate / 1e9:5.2f}  {rate / limit:12.2f}  "
            f"{size / plain / seconds:18.2f}  {max(each.host for each in loads) / 2**20:8.0f}  "
            f"{max(each.device for each in loads) / 2**20:8.0f}"
        )


if __name__ == "__main__":
    main()
