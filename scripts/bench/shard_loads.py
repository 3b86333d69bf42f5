"""Timed loads of a rank's shard from one file, of one rank alone or of a whole gang at once. For scripts/bench_load.py.

The ranks of a gang are processes, each on a card of its own. Nothing but a barrier connects them.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import start_processes

from ltx_ray.checkpoints.safetensors import TensorInfo, read_header
from ltx_ray.parallel.collectives import RankGroup
from ltx_ray.parallel.loading import load_shard
from scripts.bench import random_transformer

#: Seconds that a rank waits for the others, whose loads may come from a slow disk.
_BARRIER_SECONDS = 500.0


@dataclass(frozen=True)
class Load:
    """One load of a shard.

    `begin` and `end` are seconds of a clock that all processes share. `shard` has its bytes, `host` and `device` the
    peak bytes of memory beyond it. `disk` has the bytes that the process had read from a disk; None where the kernel
    does not count them.
    """

    begin: float
    end: float
    shard: int
    host: int
    device: int
    disk: int | None

    @property
    def seconds(self) -> float:
        return self.end - self.begin


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


def _disk_bytes() -> int | None:
    """Bytes that this process has had read from disks so far."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def drop_from_page_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def plain_read(path: Path, cold: bool = False) -> float:
    """Seconds of reading the file from beginning to end with one thread. `cold`: none of it from the page cache."""
    if cold:
        drop_from_page_cache(path)
    buffer = memoryview(bytearray(16 * 2**20))
    began = time.monotonic()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.monotonic() - began


def load(
    layers: int,
    infos: Mapping[str, TensorInfo],
    group: RankGroup,
    device: torch.device,
    before: Callable[[], object] | None = None,
) -> Load:
    """Load one shard. `before` is called when all is ready, right before the clock starts."""
    on_cuda = device.type == "cuda"
    model = random_transformer.build(layers, group)
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with HostPeak() as peak:
        if before is not None:
            before()
        disk, begin = _disk_bytes(), time.monotonic()
        load_shard(model, infos, group, dtype=torch.bfloat16, device=device)
        if on_cuda:
            torch.cuda.synchronize(device)
        end, disk_now = time.monotonic(), _disk_bytes()
    shard = sum(p.numel() * p.element_size() for p in model.parameters())
    extra = torch.cuda.max_memory_allocated(device) - shard if on_cuda else 0
    read = disk_now - disk if disk is not None and disk_now is not None else None
    return Load(begin, end, shard, peak.bytes - (0 if on_cuda else shard), extra, read)


# --- a gang ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GangLoad:
    """One load of all shards at once."""

    ranks: Sequence[Load]

    @property
    def seconds(self) -> float:
        """From the first rank's begin to the last one's end: what a gang waits."""
        return max(rank.end for rank in self.ranks) - min(rank.begin for rank in self.ranks)

    @property
    def shards(self) -> int:
        """Bytes of all shards together. Tensors that every rank holds whole count once for each rank."""
        return sum(rank.shard for rank in self.ranks)

    @property
    def disk(self) -> int | None:
        """Bytes that the ranks together had read from disks; None where the kernel does not count them."""
        counts = [rank.disk for rank in self.ranks if rank.disk is not None]
        return sum(counts) if len(counts) == len(self.ranks) else None


def load_gang(path: Path, layers: int, ranks: int, device: str, cold: bool, repeat: int) -> list[GangLoad]:
    """Load the shards of a gang of tp `ranks` `repeat` times, each time on all ranks at once.

    `device` is "cuda", of which rank n has card n, or "cpu". `cold`: the file is dropped from the page cache each time.
    """
    context = mp.get_context("spawn")
    # The action runs in one of the ranks, when all are ready and before any may go on.
    action = functools.partial(drop_from_page_cache, path) if cold else None
    barrier = context.Barrier(ranks, action, _BARRIER_SECONDS)
    results = context.SimpleQueue()
    start_processes(_run_rank, (path, layers, ranks, device, repeat, barrier, results), ranks, start_method="spawn")
    found = dict(results.get() for _ in range(ranks))
    return [GangLoad([found[rank][number] for rank in range(ranks)]) for number in range(repeat)]


def _run_rank(
    rank: int, path: Path, layers: int, ranks: int, device: str, repeat: int, barrier: Barrier, results: Any
) -> None:
    card = torch.device(device if device == "cpu" else f"{device}:{rank}")
    if card.type == "cuda":
        torch.cuda.set_device(card)
        torch.cuda.synchronize(card)  # creates the context, which is no part of loading
    infos = read_header(path).tensors
    loads = [load(layers, infos, RankGroup(rank, ranks), card, barrier.wait) for _ in range(repeat)]
    results.put((rank, loads))
