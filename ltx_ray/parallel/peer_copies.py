"""Exchanges among the GPUs of one node that read each other's memory, made by the cards' copy engines.

Products and attention of a pass hold all multiprocessors of a GPU until they end. What runs beside them must need none:
ranks tell each other by writes and waits of the CUDA stream's own, and fetch with copy engines. NCCL's kernels, and any
barrier that is a kernel, begin only when the product beside them has ended. Sums are taken in the order of the ranks.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from ltx_ray.parallel.alignment import aligned
from ltx_ray.parallel.collectives import Pending, ProcessGroup, Transport, one_by_one
from ltx_ray.parallel.head_exchange import HeadPlaces, HeadShape, Write
from ltx_ray.parallel.stream_operations import StreamOperations

T = TypeVar("T")
U = TypeVar("U")

#: Sums of more bytes are left to the process group. Those of the fused path are small.
_MAX_SUM_BYTES = 2**20
_LEAST_SLOT = 2**22
_FLAG_BYTES = 4
_log = logging.getLogger(__name__)


#: Slots of a rank, which exchanges use in turns. With more of them, fewer exchanges wait for slower ranks.
SLOTS = 3


class Slots(Protocol):
    """SLOTS places in the memory of each rank of a group, which all its ranks can read."""

    def reserve(self, nbytes: int) -> None:
        """Make every slot at least this large. All ranks of the group call this together."""

    def of(self, rank: int, slot: int) -> torch.Tensor:
        """The slot of a rank (nbytes,) uint8."""

    def barrier(self, number: int) -> None:
        """What is launched from now on waits until every rank has come here.

        `number`: that of the slot that has been filled, or SLOTS. The same number is not used twice in a row.
        """


@dataclass(eq=False)
class PeerCopies:
    """A Transport of `size` ranks, of which this is `rank`. What is rare, or large and to be summed, goes by `others`.

    A rank lays what the others want into a slot, waits until all have done so, and fetches its parts from theirs. That
    all have come to an exchange also says that they have read what was laid out for the one before.
    """

    rank: int
    size: int
    slots: Slots
    others: Transport
    copies: CopyStream
    _turn: int = field(default=0, init=False)
    #: By slot, the moment from which its last exchange has had all ranks.
    _met: list[torch.cuda.Event | None] = field(default_factory=lambda: [None] * SLOTS, init=False)

    def begin(self) -> None:
        self.copies.after_current()
        with self.copies.running():
            self.slots.barrier(SLOTS)
        self._turn, self._met = 0, [self.copies.event()] * SLOTS

    def sum_(self, tensor: torch.Tensor) -> Pending[torch.Tensor]:
        if tensor.nbytes > _MAX_SUM_BYTES:
            return self.others.sum_(tensor)
        received = [torch.empty_like(tensor) for _ in range(self.size - 1)]

        def fetch(of: Callable[[int], list[torch.Tensor]]) -> list[torch.Tensor]:
            return self._received(tensor, received, partial(_nth, of, 0))

        return _Sum(self._exchange([tensor], None, fetch), self.copies, tensor)

    def min_(self, tensor: torch.Tensor) -> Pending[torch.Tensor]:
        return self.others.min_(tensor)

    def broadcast_(self, tensor: torch.Tensor, source: int) -> Pending[torch.Tensor]:
        return self.others.broadcast_(tensor, source)

    def gather(self, shards: Sequence[torch.Tensor]) -> Pending[list[torch.Tensor]]:
        whole = [shard.new_empty((self.size * shard.shape[0], *shard.shape[1:])) for shard in shards]
        for target, own in zip(whole, shards, strict=True):
            target.chunk(self.size)[self.rank].copy_(own)

        def fetch(of: Callable[[int], list[torch.Tensor]]) -> list[torch.Tensor]:
            for rank in self._others():
                for target, part in zip(whole, of(rank), strict=True):
                    target.chunk(self.size)[rank].copy_(part)
            return whole

        return self._exchange(shards, None, fetch)

    def reduce_scatter(self, tensors: Sequence[torch.Tensor]) -> list[Pending[torch.Tensor]]:
        parts = [tensor.chunk(self.size) for tensor in tensors]
        own = [by_rank[self.rank] for by_rank in parts]
        received = [[torch.empty_like(part) for _ in range(self.size - 1)] for part in own]

        def fetch(of: Callable[[int], list[torch.Tensor]]) -> list[list[torch.Tensor]]:
            first = self.rank * len(own)
            return [
                self._received(part, received[number], partial(_nth, of, first + number))
                for number, part in enumerate(own)
            ]

        outgoing = [by_rank[rank] for rank in range(self.size) for by_rank in parts]
        fetched = one_by_one(self._exchange(outgoing, len(own), fetch), len(own))
        return [_Sum(of_ranks, self.copies) for of_ranks in fetched]

    def all_to_all(
        self, tensors: Sequence[torch.Tensor], into: Sequence[torch.Tensor] | None = None
    ) -> Pending[list[torch.Tensor]]:
        received = [tensor.new_empty(tensor.shape) for tensor in tensors] if into is None else list(into)
        for place, tensor in zip(received, tensors, strict=True):
            place[self.rank].copy_(tensor[self.rank])

        def fetch(of: Callable[[int], list[torch.Tensor]]) -> list[torch.Tensor]:
            first = self.rank * len(tensors)
            for rank in self._others():
                for place, part in zip(received, of(rank)[first : first + len(tensors)], strict=True):
                    place[rank].copy_(part)
            return received

        return self._exchange([tensor[rank] for rank in range(self.size) for tensor in tensors], len(tensors), fetch)

    def exchange_heads(self, shape: HeadShape, like: torch.Tensor, write: Write) -> list[Pending[list[torch.Tensor]]]:
        received = like.new_empty((*shape[:3], self.size, *shape[3:]))
        slot = self._next_slot((self.size - 1) * math.prod(shape) * like.element_size())

        def laid_out(rank: int) -> torch.Tensor:
            """What a rank has for the others, of which it is not one itself."""
            whole = self.slots.of(rank, slot).view(like.dtype)
            return whole[: (self.size - 1) * math.prod(shape)].view(self.size - 1, *shape)

        own = laid_out(self.rank)
        write(HeadPlaces(own[: self.rank], received[:, :, :, self.rank], own[self.rank :]))
        pending = []
        self._meet(slot)
        with self.copies.running():
            for group in range(shape.groups):
                for rank in self._others():
                    theirs = laid_out(rank)[self.rank - (self.rank > rank), group]
                    # Copy engines copy what is contiguous on both sides.
                    for part, batch in itertools.product(range(shape.parts), range(shape.batch)):
                        received[group, part, batch, rank].copy_(theirs[part, batch])
                pending.append(Pending(list(received[group]), [self.copies.mark(received)]))
        return pending

    def _others(self) -> list[int]:
        """The other ranks, from the next one on: at any time each rank is read by one other."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def _received(
        self, own: torch.Tensor, places: list[torch.Tensor], of: Callable[[int], torch.Tensor]
    ) -> list[torch.Tensor]:
        """What each rank has for this one, in their order; that of the others is copied to `places`."""
        by_rank = [own] * self.size
        for rank, place in zip(self._others(), places, strict=True):
            by_rank[rank] = place.copy_(of(rank))
        return by_rank

    def _exchange(
        self,
        tensors: Sequence[torch.Tensor],
        by_rank: int | None,
        fetch: Callable[[Callable[[int], list[torch.Tensor]]], T],
    ) -> Pending[T]:
        """Lay `tensors` out, and `fetch` from what the ranks have laid out.

        With `by_rank`, so many of the tensors are for each rank in turn, and a rank keeps its own to itself. Until the
        result is waited for, it holds what is copied from and to.
        """
        sizes = [tensor.nbytes for tensor in tensors]
        slot = self._next_slot(sum(aligned(size) for size in sizes))

        def laid_out(rank: int) -> list[torch.Tensor]:
            whole, at, views = self.slots.of(rank, slot), 0, []
            for number, tensor in enumerate(tensors):
                views.append(whole[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
                if by_rank is None or number // by_rank != rank:
                    at += aligned(tensor.nbytes)
            return views

        for number, (place, tensor) in enumerate(zip(laid_out(self.rank), tensors, strict=True)):
            if by_rank is None or number // by_rank != self.rank:
                place.copy_(tensor)
        self._meet(slot)
        with self.copies.running():
            result = fetch(laid_out)
        return Pending(result, [self.copies.mark((tensors, result))])

    def _next_slot(self, nbytes: int) -> int:
        """The number of a slot of `nbytes` at least, which what is launched from now on may fill."""
        self.slots.reserve(nbytes)
        slot, self._turn = self._turn, (self._turn + 1) % SLOTS
        # All have read the slot when they have come to the exchange after its last one.
        self.copies.current_waits(self._met[(slot + 1) % SLOTS])
        return slot

    def _meet(self, slot: int) -> None:
        """The copies from now on wait until every rank has filled its slot."""
        self.copies.after_current()
        with self.copies.running():
            self.slots.barrier(slot)
            self._met[slot] = self.copies.event()


class _Sum(Pending[torch.Tensor]):
    """The sum of what `fetched` has of each rank, taken in the CUDA stream that first waits for it.

    It goes into `target`, which may be one of the parts, or else into new memory.
    """

    def __init__(self, fetched: Pending[list[torch.Tensor]], copies: CopyStream, target: torch.Tensor | None = None):
        self._fetched, self._copies, self._target = fetched, copies, target
        self._total: torch.Tensor | None = None
        self._taken: torch.cuda.Event | None = None

    def wait(self) -> torch.Tensor:
        if self._total is None:
            parts = self._fetched.wait()
            self._total = _sum_into(torch.empty_like(parts[0]) if self._target is None else self._target, parts)
            self._taken = self._copies.end_of_current()
        self._copies.current_waits(self._taken)
        return self._total


def _nth(of: Callable[[int], list[torch.Tensor]], number: int, rank: int) -> torch.Tensor:
    return of(rank)[number]


def _sum_into(target: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum in the parts' order, rounded to their dtype after each addition. `target` may be one of them."""
    total = parts[0]
    for part in parts[1:-1]:
        total = total + part
    return torch.add(total, parts[-1], out=target)


class CopyStream:
    """The CUDA stream of the exchanges. On a CPU all this does nothing."""

    def __init__(self, device: torch.device):
        # Its small kernels go before the tiles of a product that is under way.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def after_current(self) -> None:
        """Copies wait for what has been launched so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def current_waits(self, event: torch.cuda.Event | None) -> None:
        """What is launched from now on waits for `event`."""
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def event(self) -> torch.cuda.Event | None:
        """The end of what has been given to the stream."""
        return None if self._stream is None else self._stream.record_event()

    def end_of_current(self) -> torch.cuda.Event | None:
        """The end of what has been launched so far."""
        return None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()

    def running(self) -> AbstractContextManager:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def mark(self, used: object) -> _Mark:
        """The end of an exchange that uses tensors of another CUDA stream, to which their memory may return."""
        return _Mark(self.event(), used)


@dataclass(frozen=True)
class _Mark:
    """The end of an exchange, and what must not be freed before the CUDA streams that read its result have waited."""

    event: torch.cuda.Event | None
    used: object

    def wait(self) -> None:
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


class SymmetricSlots:
    """Slots in PyTorch's symmetric memory.

    Raises RuntimeError where the ranks cannot read each other's memory, or have no stream operations.
    """

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup, device: torch.device):
        # A rank may see no card but its own, which every rank then calls number 0.
        os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        self._rank, self._size, self._group, self._device = rank, size, group, device
        self._nbytes = 0
        #: Captured graphs read the slots that there were.
        self._kept: list[Any] = []
        self._handle: Any = None
        StreamOperations.check()
        self.reserve(_LEAST_SLOT)

    def reserve(self, nbytes: int) -> None:
        if nbytes <= self._nbytes:
            return
        assert not torch.cuda.is_current_stream_capturing(), "an exchange is larger in a graph than before its capture"
        # PyTorch has no public name for it yet.
        import torch.distributed._symmetric_memory as symmetric

        # Doubled at least, so that all those that are kept are no more than the last.
        self._nbytes = max(nbytes, 2 * self._nbytes)
        flags = (SLOTS + 1) * self._size
        memory = symmetric.empty(SLOTS * self._nbytes + _FLAG_BYTES * flags, dtype=torch.uint8, device=self._device)
        memory[-_FLAG_BYTES * flags :].zero_()
        torch.cuda.synchronize(self._device)
        self._handle = symmetric.rendezvous(memory, self._group)
        # No rank writes a flag before all have cleared theirs.
        dist.barrier(self._group)
        self._kept.append((memory, self._handle))
        whole = [
            self._handle.get_buffer(rank, (memory.numel(),), torch.uint8, storage_offset=0)
            for rank in range(self._size)
        ]
        self._by_rank = [[x[n * self._nbytes :][: self._nbytes] for n in range(SLOTS)] for x in whole]
        self._flags = [x.data_ptr() + SLOTS * self._nbytes for x in whole]
        self._barriers = [self._barrier(number) for number in range(SLOTS + 1)]

    def of(self, rank: int, slot: int) -> torch.Tensor:
        return self._by_rank[rank][slot]

    def barrier(self, number: int) -> None:
        self._barriers[number].launch(torch.cuda.current_stream().cuda_stream)

    def _barrier(self, number: int) -> StreamOperations:
        others = [rank for rank in range(self._size) if rank != self._rank]
        told = [self._flag(rank, number, self._rank) for rank in others]
        return StreamOperations.tell_and_wait(told, [self._flag(self._rank, number, rank) for rank in others])

    def _flag(self, rank: int, number: int, of: int) -> int:
        """The address of the flag by which rank `of` tells `rank` that it has come to barrier `number`."""
        return self._flags[rank] + _FLAG_BYTES * (number * self._size + of)


def fastest_transport(rank: int, size: int, processes: ProcessGroup) -> Transport:
    """PeerCopies where the ranks of NCCL's group are on one node and can read each other's memory, else `processes`.

    All ranks of the group call this together and come to the same.
    """
    group = processes.group or dist.group.WORLD
    if group is None or not torch.cuda.is_available() or dist.get_backend(group) != "nccl":
        return processes
    device = torch.device("cuda", torch.cuda.current_device())
    hosts: list[Any] = [None] * size
    dist.all_gather_object(hosts, socket.gethostname(), group)
    if len(set(hosts)) > 1:
        return processes
    slots = None
    try:
        slots = SymmetricSlots(rank, size, group, device)
    except (RuntimeError, AttributeError, ImportError) as error:
        _log.info("exchanges go by NCCL, as the ranks cannot read each other's memory: %s", error)
    able = torch.tensor([slots is not None], dtype=torch.int32, device=device)
    if not int(processes.min_(able).wait()) or slots is None:
        return processes
    return PeerCopies(rank, size, slots, processes, CopyStream(device))
