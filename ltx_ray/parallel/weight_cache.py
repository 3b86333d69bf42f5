"""Where the tensors that merging starts from are kept: on the device, in host memory, or in the file.

The clean weights and the LoRA factors are needed again at every switch. The nearer they are, the
faster the switch; what is near is chosen from the memory that is there.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ltx_ray.checkpoints.safetensors import TensorInfo
from ltx_ray.parallel.layers import TPGroup
from ltx_ray.parallel.loading import TORCH_DTYPES, Slice, fill, named, shard_shape

GIB = 2**30
#: Bytes of a batch of tensors that is read from a file on its way to the device.
_BATCH_BYTES = 128 * 2**20
#: Host memory is taken and pinned in slabs of this size.
_SLAB_BYTES = GIB
#: Groups of tensors that are under way from host memory at once.
_SLOTS = 3
_RING_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Memory:
    """Free bytes: on this rank's device, and this rank's share of its node's memory."""

    device: int
    host: int

    @classmethod
    def now(cls, device: torch.device) -> Memory:
        if device.type != "cuda":
            return cls(0, 0)
        free, _ = torch.cuda.mem_get_info(device)
        cards = len(glob.glob("/proc/driver/nvidia/gpus/*")) or torch.cuda.device_count()
        return cls(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device),
                   _free_host_bytes() // max(1, cards))  # fmt: skip


def choose(nbytes: int, memory: Memory, reserve: int) -> str:
    """Where `nbytes` that every switch needs go: "device", "host" or "file".

    `reserve` bytes of the device stay free for the activations and for whoever shares it; of the host's
    memory, a third does.
    """
    if nbytes + reserve <= memory.device:
        return "device"
    return "host" if nbytes <= memory.host * 2 // 3 else "file"


def _free_host_bytes() -> int:
    """What this machine, or the container, has left."""
    table = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(table["MemAvailable"].split()[0]) * 1024
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text()) - int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return free  # no limit, or none that can be read
    return max(0, min(free, limit - used))


@dataclass(frozen=True)
class Part:
    """A tensor of the store: where it is in its file, and this rank's axis."""

    info: TensorInfo
    shard_dim: int | None


class WeightCache:
    """This rank's slices of named tensors, kept in "file", "host", "device" or spread over the "gang".

    `dtype` is what they are converted to, None for the file's own. With `group`, a gang whose ranks all
    hold the same slices (whole weights), each rank can keep its share on the device for all.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        tp: TPGroup,
        device: torch.device,
        dtype: torch.dtype | None = None,
        group: TPGroup = TPGroup(),  # noqa: B008 (frozen)
    ):
        self._parts, self._tp, self._device, self._dtype, self._group = parts, tp, device, dtype, group
        self.where = "file"
        self._kept: dict[str, torch.Tensor] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        part = self._parts[name]
        return shard_shape(part.info, part.shard_dim, self._tp)

    def nbytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self._dtype_of(name).itemsize

    @property
    def total(self) -> int:
        return sum(self.nbytes(name) for name in self._parts)

    def keep(self, where: str, source: Mapping[str, torch.Tensor] | None = None) -> None:
        """Keep everything in `where` from now on: copied from `source`, or read from the files."""
        assert where in ("file", "host", "device", "gang"), where
        if where == self.where:
            return
        kept: dict[str, torch.Tensor] = {}
        slab = torch.empty(0, dtype=torch.uint8)
        left = sum(-(-self.nbytes(name) // 256) * 256 for name in self._parts)
        for number, name in enumerate(self._parts if where != "file" else ()):
            if where == "gang" and number % self._group.size != self._group.rank:
                continue
            shape, dtype, size = self.shape(name), self._dtype_of(name), self.nbytes(name)
            try:
                if where == "host":
                    # slices start at multiples of 256 bytes, which every copy engine likes
                    taken = -(-size // 256) * 256
                    if slab.numel() < taken:
                        room = min(max(_SLAB_BYTES, taken), left)
                        slab = torch.empty(room, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
                    kept[name], slab, left = slab[:size].view(dtype).view(shape), slab[taken:], left - taken
                else:
                    kept[name] = torch.empty(shape, dtype=dtype, device=self._device)
            except RuntimeError as error:
                raise named(
                    error, f"{self._parts[name].info.path}: {self._parts[name].info.key}, kept on {where}"
                ) from error
        if source is None:
            for _ in fill([Slice(self._parts[n].info, self._parts[n].shard_dim, t) for n, t in kept.items()], self._tp):
                pass
        else:
            for name, tensor in kept.items():
                tensor.copy_(source[name], non_blocking=True)
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
        self._kept, self.where = kept, where

    def fetch_into(self, names: Sequence[str], into: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor on the device) for `names` in order; `into` is where what is elsewhere is copied to.

        What is kept on the device is given as it is: read it only.
        """
        if self.where == "device":
            yield from ((name, self._kept[name]) for name in names)
        elif self.where == "gang":
            owners = {name: number % self._group.size for number, name in enumerate(self._parts)}
            for name in names:
                if name in self._kept:
                    into[name].copy_(self._kept[name])
                self._group.broadcast_(into[name], owners[name])
                yield name, into[name]
        elif self.where == "host" and self._device.type == "cuda":
            main, side = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
            side.wait_stream(main)
            for name in names:
                with torch.cuda.stream(side):
                    into[name].copy_(self._kept[name], non_blocking=True)
                main.wait_event(side.record_event())
                yield name, into[name]
        elif self.where == "host":
            for name in names:
                into[name].copy_(self._kept[name])
                yield name, into[name]
        else:
            yield from self._read(names, into)

    def fetch(self, groups: Sequence[Sequence[str]]) -> Iterator[list[torch.Tensor]]:
        """The tensors of each group on the device, group by group; good until the next group is asked for."""
        if self.where == "device":
            for names in groups:
                yield [self._kept[name] for name in names]
        elif self.where == "gang":
            for names in groups:
                into = {n: torch.empty(self.shape(n), dtype=self._dtype_of(n), device=self._device) for n in names}
                yield [tensor for _, tensor in self.fetch_into(names, into)]
        elif self.where == "host" and self._device.type == "cuda":
            yield from self._ring(groups)
        elif self.where == "host":
            for names in groups:
                yield [self._kept[name] for name in names]
        else:
            for batch in self._batches(groups):
                flat = [name for names in batch for name in names]
                read = {n: torch.empty(self.shape(n), dtype=self._dtype_of(n), device=self._device) for n in flat}
                for _ in self._read(flat, read):
                    pass
                for names in batch:
                    yield [read[name] for name in names]

    def _read(self, names: Sequence[str], into: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        wanted = [Slice(self._parts[name].info, self._parts[name].shard_dim, into[name]) for name in names]
        there, at = set(), 0
        for index in fill(wanted, self._tp):
            there.add(index)
            while at in there:
                yield names[at], into[names[at]]
                at += 1
        assert at == len(names), f"{len(names) - at} tensors have no elements"

    def _batches(self, groups: Sequence[Sequence[str]]) -> Iterator[list[Sequence[str]]]:
        batch: list[Sequence[str]] = []
        size = 0
        for names in groups:
            needed = sum(self.nbytes(name) for name in names)
            if batch and size + needed > _BATCH_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(names)
            size += needed
        if batch:
            yield batch

    def _ring(self, groups: Sequence[Sequence[str]]) -> Iterator[list[torch.Tensor]]:
        """Copies from pinned memory run a few groups ahead of the work, in a fixed ring of device buffers."""
        main, side = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        room = max((sum(-(-self.nbytes(n) // 256) * 256 for n in names) for names in groups), default=0)
        # several LoRAs of a high rank: fewer groups ahead, so that the buffers stay small
        count = _SLOTS if _SLOTS * room <= _RING_BYTES else 2
        slots = [torch.empty(room, dtype=torch.uint8, device=self._device) for _ in range(count)]
        side.wait_stream(main)
        copied: list[tuple[list[torch.Tensor], torch.cuda.Event]] = []
        used: list[torch.cuda.Event | None] = [None] * count

        def send(number: int) -> None:
            slot, at, tensors = slots[number % count], 0, []
            if used[number % count] is not None:
                side.wait_event(used[number % count])
            with torch.cuda.stream(side):
                for name in groups[number]:
                    size = self.nbytes(name)
                    tensor = slot[at : at + size].view(self._dtype_of(name)).view(self.shape(name))
                    tensor.copy_(self._kept[name], non_blocking=True)
                    tensors.append(tensor)
                    at += -(-size // 256) * 256
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
        return self._dtype or TORCH_DTYPES[self._parts[name].info.dtype]
