"""Where the tensors that LoRA merging reads are cached: on the device, in host memory, over the gang, or in the file.

Every switch of LoRAs reads the clean weights and the LoRA factors. The location is chosen from the free memory: the
closer to the device, the faster the switch.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ltx_ray.checkpoints.safetensors import TensorInfo
from ltx_ray.parallel.alignment import aligned
from ltx_ray.parallel.collectives import SINGLE_RANK, RankGroup
from ltx_ray.parallel.host_copy import HostCopy, HostMemory, HostTensor
from ltx_ray.parallel.loading import TORCH_DTYPES, ShardRead, read_shards, shard_shape, with_context

GIB = 2**30
#: Bytes of a batch of tensors that is read from a file on its way to the device.
_BATCH_BYTES = 128 * 2**20
#: Device buffers of the ring through which tensors come from host memory, and how large the ring may grow.
_RING_BUFFERS = 3
_RING_BYTES = 64 * 2**20

#: "gang": each rank keeps its share on the device and broadcasts it to its peers.
Location = Literal["file", "host", "device", "gang"]


@dataclass(frozen=True)
class FreeMemory:
    """Free bytes on this rank's device, and this rank's share of the free bytes of its node."""

    device: int
    host: int

    @classmethod
    def measure(cls, device: torch.device) -> FreeMemory:
        """What is free now; nothing on a CPU, where the file is in host memory already."""
        if device.type != "cuda":
            return cls(0, 0)
        free, _ = torch.cuda.mem_get_info(device)
        cards = len(glob.glob("/proc/driver/nvidia/gpus/*")) or torch.cuda.device_count()
        return cls(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device),
                   _free_host_bytes() // max(1, cards))  # fmt: skip


def choose_location(nbytes: int, memory: FreeMemory, reserve: int) -> Location:
    """Where to cache `nbytes`: "device" or "host" when they fit there, otherwise "file".

    `reserve` bytes of the device stay free for activations and for other processes on it, and a third of the host's
    memory stays free.
    """
    if nbytes + reserve <= memory.device:
        return "device"
    return "host" if nbytes <= memory.host * 2 // 3 else "file"


def _free_host_bytes() -> int:
    """Free bytes of this machine, or of the container when its limit is lower."""
    table = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(table["MemAvailable"].split()[0]) * 1024
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text()) - int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return free  # There is no limit, or none that can be read.
    return max(0, min(free, limit - used))


@dataclass(frozen=True)
class ShardSource:
    """A tensor in its file, and the axis along which ranks divide it (None: every rank has all of it).

    `keeps_dtype`: it is not converted to the dtype of the cache.
    """

    info: TensorInfo
    shard_dim: int | None
    keeps_dtype: bool = False

    def read_into(self, target: torch.Tensor) -> ShardRead:
        return ShardRead(self.info, self.shard_dim, target)


class WeightCache:
    """This rank's slices of named tensors, cached in one `location`. They start in their files.

    `dtype` is what they are converted to (None: each file's own). `peers` are ranks that hold the same slices, so that
    each can cache a share of them for all.
    """

    def __init__(
        self,
        sources: Mapping[str, ShardSource],
        tp: RankGroup,
        device: torch.device,
        dtype: torch.dtype | None = None,
        peers: RankGroup = SINGLE_RANK,
    ):
        self._sources, self._tp, self._device, self._dtype, self._peers = sources, tp, device, dtype, peers
        self.location: Location = "file"
        self._cached: Mapping[str, torch.Tensor] = {}
        #: The copy to host memory that is under way, and the memory of one that is done.
        self._copy: HostCopy | None = None
        self._memory: HostMemory | None = None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of this rank's slice."""
        source = self._sources[name]
        return shard_shape(source.info, source.shard_dim, self._tp)

    def nbytes(self, name: str) -> int:
        """Bytes of this rank's slice."""
        return math.prod(self.shape(name)) * self._dtype_of(name).itemsize

    @property
    def total_bytes(self) -> int:
        """Bytes of all slices of this rank."""
        return sum(self.nbytes(name) for name in self._sources)

    def move_to(self, location: Location, values: Mapping[str, torch.Tensor] | None = None) -> None:
        """Cache everything in `location` from now on, copied from `values` or else read from the files.

        Raises RuntimeError, OutOfMemoryError included, naming the tensor for which there was no memory. For host memory
        see `copy_to_host`.
        """
        assert location != "host"
        if location == self.location:
            return
        cached = self._allocate(location)
        if values is None:
            for _ in read_shards([self._sources[name].read_into(t) for name, t in cached.items()], self._tp):
                pass
        else:
            for name, tensor in cached.items():
                tensor.copy_(values[name], non_blocking=True)
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
        self._cached, self._memory, self.location = cached, None, location

    def copy_to_host(self, after: WeightCache | None = None) -> None:
        """Begin to read everything into pinned host memory, in the background.

        `location` stays what it is until `take_over` finds the copy done. `after`: a cache whose copy goes first.
        """
        if self.location == "host" or self._copy is not None:
            return
        tensors = [HostTensor(n, self.shape(n), self._dtype_of(n), self.nbytes(n)) for n in self._sources]
        self._copy = HostCopy(tensors, self._read_all, self._device, after._copy if after is not None else None)

    def _read_all(self, targets: Mapping[str, torch.Tensor]) -> None:
        for _ in read_shards([self._sources[name].read_into(target) for name, target in targets.items()], self._tp):
            pass

    def take_over(self, wait: bool = False) -> float | None:
        """Use the copy in host memory from now on, if there is one that is done; `wait`: until it is.

        Returns the seconds that it took when this call took it over. Raises HostCopyFailed; the tensors then stay where
        they are.
        """
        copy = self._copy
        if copy is None or not (wait or copy.done):
            return None
        self._copy = None
        self._memory = copy.result()
        self._cached, self.location = self._memory.tensors, "host"
        return copy.seconds

    def _allocate(self, location: Location) -> dict[str, torch.Tensor]:
        cached: dict[str, torch.Tensor] = {}
        for number, name in enumerate(self._sources if location != "file" else ()):
            if location == "gang" and number % self._peers.size != self._peers.rank:
                continue
            try:
                cached[name] = torch.empty(self.shape(name), dtype=self._dtype_of(name), device=self._device)
            except RuntimeError as error:
                info = self._sources[name].info
                raise with_context(error, f"{info.path}: {info.key}, kept on {location}") from error
        return cached

    def fetch_into(
        self, names: Sequence[str], targets: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor on the device) for `names` in order.

        A tensor cached on the device is yielded itself and must not be written. Any other is copied into its target.
        """
        if self.location == "device":
            yield from ((name, self._cached[name]) for name in names)
        elif self.location == "gang":
            owners = {name: number % self._peers.size for number, name in enumerate(self._sources)}
            for name in names:
                if name in self._cached:
                    targets[name].copy_(self._cached[name])
                tensor = targets[name]
                # Not every backend of torch.distributed knows the dtypes of fp8.
                self._peers.broadcast_(tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor, owners[name])
                yield name, targets[name]
        elif self.location == "host" and self._device.type == "cuda":
            main, side = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
            side.wait_stream(main)
            for name in names:
                with torch.cuda.stream(side):
                    targets[name].copy_(self._cached[name], non_blocking=True)
                main.wait_event(side.record_event())
                yield name, targets[name]
        elif self.location == "host":
            for name in names:
                targets[name].copy_(self._cached[name])
                yield name, targets[name]
        else:
            yield from self._read_files(names, targets)

    def fetch(self, groups: Sequence[Sequence[str]]) -> Iterator[list[torch.Tensor]]:
        """The tensors of each group on the device, group by group. A group is valid until the next one is requested."""
        if self.location == "device":
            for names in groups:
                yield [self._cached[name] for name in names]
        elif self.location == "gang":
            for names in groups:
                yield [tensor for _, tensor in self.fetch_into(names, self._empty(names))]
        elif self.location == "host" and self._device.type == "cuda":
            yield from self._copy_through_ring(groups)
        elif self.location == "host":
            for names in groups:
                yield [self._cached[name] for name in names]
        else:
            for batch in self._batches(groups):
                all_names = [name for names in batch for name in names]
                tensors = self._empty(all_names)
                for _ in self._read_files(all_names, tensors):
                    pass
                for names in batch:
                    yield [tensors[name] for name in names]

    def _empty(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return {n: torch.empty(self.shape(n), dtype=self._dtype_of(n), device=self._device) for n in names}

    def _read_files(
        self, names: Sequence[str], targets: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        reads = [self._sources[name].read_into(targets[name]) for name in names]
        arrived: set[int] = set()
        following = 0
        for index in read_shards(reads, self._tp):
            arrived.add(index)
            while following in arrived:
                yield names[following], targets[names[following]]
                following += 1
        assert following == len(names), f"{len(names) - following} tensors have no elements"

    def _batches(self, groups: Sequence[Sequence[str]]) -> Iterator[list[Sequence[str]]]:
        batch: list[Sequence[str]] = []
        size = 0
        for names in groups:
            group_bytes = sum(self.nbytes(name) for name in names)
            if batch and size + group_bytes > _BATCH_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(names)
            size += group_bytes
        if batch:
            yield batch

    def _copy_through_ring(self, groups: Sequence[Sequence[str]]) -> Iterator[list[torch.Tensor]]:
        """Groups from pinned memory, copied while earlier ones are in use, through a fixed ring of device buffers."""
        main, side = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        buffer_bytes = max((sum(aligned(self.nbytes(n)) for n in names) for names in groups), default=0)
        # Several LoRAs of a high rank make large groups. Two buffers then keep the ring small.
        count = _RING_BUFFERS if _RING_BUFFERS * buffer_bytes <= _RING_BYTES else 2
        buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, device=self._device) for _ in range(count)]
        side.wait_stream(main)
        copied: list[tuple[list[torch.Tensor], torch.cuda.Event]] = []
        used: list[torch.cuda.Event | None] = [None] * count

        def send(number: int) -> None:
            buffer, offset, tensors = buffers[number % count], 0, []
            last_use = used[number % count]
            if last_use is not None:
                side.wait_event(last_use)
            with torch.cuda.stream(side):
                for name in groups[number]:
                    size = self.nbytes(name)
                    tensor = buffer[offset : offset + size].view(self._dtype_of(name)).view(self.shape(name))
                    tensor.copy_(self._cached[name], non_blocking=True)
                    tensors.append(tensor)
                    offset += aligned(size)
            copied.append((tensors, side.record_event()))

        for number in range(min(count - 1, len(groups))):
            send(number)
        for number in range(len(groups)):
            tensors, event = copied.pop(0)
            main.wait_event(event)
            yield tensors
            used[number % count] = main.record_event()
            if number + count - 1 < len(groups):
                send(number + count - 1)
        side.synchronize()

    def _dtype_of(self, name: str) -> torch.dtype:
        source = self._sources[name]
        if self._dtype is None or source.keeps_dtype:
            return TORCH_DTYPES[source.info.dtype]
        return self._dtype
