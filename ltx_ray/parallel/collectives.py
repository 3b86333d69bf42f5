"""Exchanges among the ranks of a gang, behind an interface that more than one transport serves.

`ProcessGroup` is torch.distributed (NCCL on GPUs, gloo on CPUs). `Threads` are ranks within one process and on one
device, to check a division of work where there is one GPU. `Alone` has the shapes of n ranks and no transport, to time
what a rank does itself. Every rank of a group calls the same exchanges in the same order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager

T = TypeVar("T")
U = TypeVar("U")


class Pending(Generic[T]):
    """The result of an exchange that may be under way, whose inputs must stay as they are until `wait`.

    It holds `used`: CUDA streams that do not wait for the exchange must not get the memory of what it reads.
    """

    def __init__(self, result: T, work: Sequence[Any] = (), used: object = None):
        self._result, self._work, self._used = result, work, used

    def wait(self) -> T:
        """The result. On a GPU only what is launched into the current CUDA stream from now on waits for it."""
        for work in self._work:
            work.wait()
        return self._result

    def then(self, change: Callable[[T], U]) -> Pending[U]:
        """What `change` makes of the result, when it is waited for."""
        return _Changed(self, change)


class _Changed(Pending[U]):
    def __init__(self, before: Pending[Any], change: Callable[[Any], U]):
        self._before, self._change = before, change

    def wait(self) -> U:
        return self._change(self._before.wait())


def one_by_one(pending: Pending[list[T]], number: int) -> list[Pending[T]]:
    """Each of the `number` results, to be waited for by itself."""
    return [pending.then(itemgetter(n)) for n in range(number)]


class Transport(Protocol):
    """The exchanges of n ranks. Tensors have the same shapes on every rank, and are contiguous except in all_to_all."""

    def begin(self) -> None:
        """Begin a pass of the model, whose exchanges may be captured in a CUDA graph."""

    def sum_(self, tensor: torch.Tensor) -> Pending[torch.Tensor]:
        """The sum over the ranks, in place."""

    def min_(self, tensor: torch.Tensor) -> Pending[torch.Tensor]:
        """The elementwise minimum over the ranks, in place."""

    def broadcast_(self, tensor: torch.Tensor, source: int) -> Pending[torch.Tensor]:
        """The tensor of rank `source`, in place."""

    def gather(self, shards: Sequence[torch.Tensor]) -> Pending[list[torch.Tensor]]:
        """Each (L, ...) of each rank -> (n * L, ...), by rank, in one exchange."""

    def reduce_scatter(self, tensors: Sequence[torch.Tensor]) -> list[Pending[torch.Tensor]]:
        """Each (n * L, ...) of each rank -> (L, ...): this rank's part of the sum, in one exchange.

        Each part may be waited for in a CUDA stream of its own.
        """

    def all_to_all(
        self, tensors: Sequence[torch.Tensor], into: Sequence[torch.Tensor] | None = None
    ) -> Pending[list[torch.Tensor]]:
        """Each (n, ...), by the rank that is to get it -> (n, ...), by the rank that sent it, in `into` if given."""


@dataclass(frozen=True)
class ProcessGroup:
    """The ranks of a group of torch.distributed; None is the default group."""

    size: int
    group: dist.ProcessGroup | None = None

    def begin(self) -> None:
        pass

    def sum_(self, tensor: torch.Tensor) -> Pending[torch.Tensor]:
        return Pending(tensor, [dist.all_reduce(tensor, group=self.group, async_op=True)])

    def min_(self, tensor: torch.Tensor) -> Pending[torch.Tensor]:
        return Pending(tensor, [dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self.group, async_op=True)])

    def broadcast_(self, tensor: torch.Tensor, source: int) -> Pending[torch.Tensor]:
        return Pending(tensor, [dist.broadcast(tensor, group=self.group, group_src=source, async_op=True)])

    def gather(self, shards: Sequence[torch.Tensor]) -> Pending[list[torch.Tensor]]:
        whole = [shard.new_empty((self.size * shard.shape[0], *shard.shape[1:])) for shard in shards]
        return self._together(dist.all_gather_into_tensor, whole, shards)

    def reduce_scatter(self, tensors: Sequence[torch.Tensor]) -> list[Pending[torch.Tensor]]:
        parts = [tensor.new_empty((tensor.shape[0] // self.size, *tensor.shape[1:])) for tensor in tensors]
        return one_by_one(self._together(dist.reduce_scatter_tensor, parts, tensors), len(parts))

    def _together(
        self, exchange: Callable[..., Any], outputs: list[torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> Pending[list[torch.Tensor]]:
        """One exchange of each input for its output, launched together where the backend can."""
        pairs = list(zip(outputs, inputs, strict=True))
        if len(pairs) > 1 and outputs[0].is_cuda:
            # torch's own FSDP launches its exchanges so. There is no public way.
            with _coalescing_manager(group=self.group, async_ops=True) as launched:
                for output, given in pairs:
                    exchange(output, given, group=self.group)
            return Pending(outputs, [launched], inputs)
        work = [exchange(output, x, group=self.group, async_op=True) for output, x in pairs]
        return Pending(outputs, work, inputs)

    def all_to_all(
        self, tensors: Sequence[torch.Tensor], into: Sequence[torch.Tensor] | None = None
    ) -> Pending[list[torch.Tensor]]:
        given = [tensor.contiguous() for tensor in tensors]
        received = [torch.empty_like(tensor) for tensor in given] if into is None else list(into)
        launched = [
            dist.all_to_all_single(place, tensor, group=self.group, async_op=True)
            for place, tensor in zip(received, given, strict=True)
        ]
        return Pending(received, launched, given)


class Threads:
    """n ranks that are threads of this process and share a device. Sums are taken in the order of the ranks.

    Each rank gets a transport of its own from `rank`. A rank that fails calls `abort`, so that the others do not wait
    for it: their exchanges then raise threading.BrokenBarrierError.
    """

    def __init__(self, size: int):
        self.size = size
        self._barrier = threading.Barrier(size)
        self._slots: list[torch.Tensor | None] = [None] * size

    def rank(self, rank: int) -> Transport:
        return _ThreadRank(self, rank)

    def abort(self) -> None:
        self._barrier.abort()

    def exchange(self, rank: int, tensor: torch.Tensor, result: Callable[[list[torch.Tensor]], T]) -> T:
        """`result` of the tensors of all ranks, which stay as they are until every rank has its result."""
        self._slots[rank] = tensor
        # Ranks may work in CUDA streams of their own.
        _synchronize(tensor)
        self._barrier.wait()
        found = result(cast(list[torch.Tensor], self._slots))
        _synchronize(tensor)
        self._barrier.wait()
        return found


@dataclass(frozen=True)
class _ThreadRank:
    threads: Threads
    rank: int

    def begin(self) -> None:
        pass

    def sum_(self, tensor: torch.Tensor) -> Pending[torch.Tensor]:
        return self._replace(tensor, _sum)

    def min_(self, tensor: torch.Tensor) -> Pending[torch.Tensor]:
        return self._replace(tensor, lambda tensors: torch.stack(tensors).amin(0))

    def broadcast_(self, tensor: torch.Tensor, source: int) -> Pending[torch.Tensor]:
        return self._replace(tensor, lambda tensors: tensors[source].clone())

    def gather(self, shards: Sequence[torch.Tensor]) -> Pending[list[torch.Tensor]]:
        return Pending([self.threads.exchange(self.rank, shard, torch.cat) for shard in shards])

    def reduce_scatter(self, tensors: Sequence[torch.Tensor]) -> list[Pending[torch.Tensor]]:
        def own_part(tensors: list[torch.Tensor]) -> torch.Tensor:
            return _sum([tensor.chunk(self.threads.size)[self.rank] for tensor in tensors])

        return [Pending(self.threads.exchange(self.rank, tensor, own_part)) for tensor in tensors]

    def all_to_all(
        self, tensors: Sequence[torch.Tensor], into: Sequence[torch.Tensor] | None = None
    ) -> Pending[list[torch.Tensor]]:
        def own_parts(of_ranks: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack([tensor[self.rank] for tensor in of_ranks])

        return Pending(_moved([self.threads.exchange(self.rank, tensor, own_parts) for tensor in tensors], into))

    def _replace(
        self, tensor: torch.Tensor, result: Callable[[list[torch.Tensor]], torch.Tensor]
    ) -> Pending[torch.Tensor]:
        return Pending(tensor.copy_(self.threads.exchange(self.rank, tensor, result)))


def _sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum in the tensors' order, rounded to their dtype after each addition."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def _synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


@dataclass
class Alone:
    """One of n ranks without the others: results have the right shapes, and values that no rank has computed.

    `calls` and `nbytes` count the exchanges by name, and the bytes that a rank sends in them.
    """

    size: int
    calls: dict[str, int] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)
    #: What is received, by shape and dtype. It is drawn once and never written, as no time is to be spent on it.
    _received: dict[tuple[torch.Size, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def begin(self) -> None:
        pass

    def sum_(self, tensor: torch.Tensor) -> Pending[torch.Tensor]:
        # A ring sends each part of the tensor twice, to be summed and to be spread.
        return self._count("sum", 2 * self._part(tensor), tensor)

    def min_(self, tensor: torch.Tensor) -> Pending[torch.Tensor]:
        return self._count("min", 2 * self._part(tensor), tensor)

    def broadcast_(self, tensor: torch.Tensor, source: int) -> Pending[torch.Tensor]:
        return self._count("broadcast", tensor.nbytes, tensor)

    def gather(self, shards: Sequence[torch.Tensor]) -> Pending[list[torch.Tensor]]:
        nbytes = sum((self.size - 1) * shard.nbytes for shard in shards)
        shapes = [(self.size * shard.shape[0], *shard.shape[1:]) for shard in shards]
        return self._count("gather", nbytes, [self._drawn(*of) for of in zip(shapes, shards, strict=True)])

    def _drawn(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        key = torch.Size(shape), like.dtype
        if key not in self._received:
            drawn = torch.randn(shape, device=like.device)
            # Rows in fp8 are exchanged as bytes.
            as_bytes = like.dtype == torch.uint8
            values = drawn.to(torch.float8_e4m3fn).view(torch.uint8) if as_bytes else drawn.to(like.dtype)
            self._received[key] = values
        return self._received[key]

    def reduce_scatter(self, tensors: Sequence[torch.Tensor]) -> list[Pending[torch.Tensor]]:
        parts = [tensor[: tensor.shape[0] // self.size] for tensor in tensors]
        return one_by_one(self._count("reduce_scatter", sum(map(self._part, tensors)), parts), len(parts))

    def all_to_all(
        self, tensors: Sequence[torch.Tensor], into: Sequence[torch.Tensor] | None = None
    ) -> Pending[list[torch.Tensor]]:
        nbytes = sum(map(self._part, tensors))
        received = [self._drawn(tensor.shape, tensor) for tensor in tensors]
        return self._count("all_to_all", nbytes, _moved(received, into))

    def _part(self, tensor: torch.Tensor) -> int:
        return tensor.nbytes * (self.size - 1) // self.size

    def _count(self, name: str, nbytes: int, result: T) -> Pending[T]:
        self.calls[name] = self.calls.get(name, 0) + 1
        self.nbytes[name] = self.nbytes.get(name, 0) + nbytes
        return Pending(result)


def _moved(tensors: list[torch.Tensor], into: Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
    if into is None:
        return tensors
    return [place.copy_(tensor) for place, tensor in zip(into, tensors, strict=True)]


@dataclass(frozen=True)
class RankGroup:
    """Ranks that compute together, which of them this process is, and how they reach each other.

    A group of one rank has no transport, and its exchanges do nothing.
    """

    rank: int = 0
    size: int = 1
    transport: Transport | None = None

    @classmethod
    def of_processes(cls, rank: int, size: int, group: dist.ProcessGroup | None = None) -> RankGroup:
        """The ranks of `group` of torch.distributed; None is the default group."""
        return cls(rank, size, ProcessGroup(size, group) if size > 1 else None)

    def begin(self) -> None:
        """Begin a pass of the model."""
        if self.transport is not None:
            self.transport.begin()

    def start_sum(self, tensor: torch.Tensor) -> Pending[torch.Tensor]:
        """Begin to sum `tensor` over the ranks, in place."""
        return self._transport.sum_(tensor) if self.size > 1 else Pending(tensor)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over the ranks, in place."""
        return self.start_sum(tensor).wait()

    def min_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take the elementwise minimum of `tensor` over the ranks, in place."""
        return self._transport.min_(tensor).wait() if self.size > 1 else tensor

    def broadcast_(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Overwrite `tensor` with that of rank `source` of the group."""
        return self._transport.broadcast_(tensor, source).wait() if self.size > 1 else tensor

    def start_gather(self, shards: Sequence[torch.Tensor]) -> Pending[list[torch.Tensor]]:
        """Begin to put each (L, ...) of the ranks together: (n * L, ...), by rank."""
        return self._transport.gather([x.contiguous() for x in shards]) if self.size > 1 else Pending(list(shards))

    def gather(self, shard: torch.Tensor) -> torch.Tensor:
        """(L, ...) of each rank -> (n * L, ...), by rank."""
        (whole,) = self.start_gather([shard]).wait()
        return whole

    def start_reduce_scatter(self, tensors: Sequence[torch.Tensor]) -> list[Pending[torch.Tensor]]:
        """Begin to sum each (n * L, ...) over the ranks, of which each gets its (L, ...)."""
        if self.size == 1:
            return [Pending(tensor) for tensor in tensors]
        return self._transport.reduce_scatter([x.contiguous() for x in tensors])

    def start_all_to_all(
        self, tensors: Sequence[torch.Tensor], into: Sequence[torch.Tensor] | None = None
    ) -> Pending[list[torch.Tensor]]:
        """Begin to exchange each (n, ...), by the rank that is to get it, for (n, ...), by the rank that sent it.

        What is received goes to `into`, contiguous and of the same shapes, if it is given.
        """
        if self.size == 1:
            return Pending(_moved(list(tensors), into))
        return self._transport.all_to_all(tensors, into)

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """(n, ...), by the rank that is to get it -> (n, ...), by the rank that sent it."""
        (received,) = self.start_all_to_all([tensor]).wait()
        return received

    def slice(self, length: int) -> slice:
        """This rank's part of an axis of `length`, which the group's size must divide."""
        assert length % self.size == 0, f"{length} is not divisible over {self.size} ranks"
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    @property
    def _transport(self) -> Transport:
        assert self.transport is not None, f"a group of {self.size} ranks without a transport"
        return self.transport


#: A group of this rank alone.
SINGLE_RANK = RankGroup()
