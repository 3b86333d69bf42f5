"""What engines share: their place in a gang, their dtype, and what their errors mean.

An engine is a class `(spec: EngineSpec, rank: Rank)` with `load()` and `run(stage, item, *inputs)`. Its `facts` are an
EngineFacts of the last of these calls. One whose results depend on its device has `evidence()`, an Evidence of what it
computes with once it has loaded. One with `begin_warm_up()` does in the background, from then on, what makes its first
call faster. `switches` and `switch_seconds` count LoRA merges, in engines that merge. A class may have a `join_gang` of
its own.
"""

from __future__ import annotations

import contextlib
import operator
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from ltx_ray.parallel.rendezvous import Rendezvous
from ltx_ray.records import ErrorKind, RenderError

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store


#: What messages say about a lack of memory where torch raises no OutOfMemoryError: on a CPU, in the CUDA driver, in
#: cuDNN, and when the memory suffices for the workspace of none of cuDNN's algorithms.
_NO_MEMORY = (
    "DefaultCPUAllocator", "not enough memory", "CUDA error: out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED",
    "unable to find an engine",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of the device or of the host did not suffice."""
    if isinstance(error, (MemoryError, *_torch_errors("OutOfMemoryError"))):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def error_kind(error: BaseException) -> ErrorKind:
    """What an exception of an engine says of the row and of the replica."""
    if isinstance(error, RenderError):
        return error.kind
    if is_out_of_memory(error):
        return ErrorKind.PROCESS
    if isinstance(error, _torch_errors("AcceleratorError")):
        return ErrorKind.DEVICE
    if isinstance(error, _torch_errors("distributed.DistBackendError", "distributed.DistNetworkError")):
        return ErrorKind.PROCESS
    return ErrorKind.INFRASTRUCTURE if isinstance(error, OSError) else ErrorKind.UNKNOWN


def _torch_errors(*names: str) -> tuple[type[BaseException], ...]:
    """Those of torch's exception classes that exist; none in a process that has not imported torch."""
    torch = sys.modules.get("torch")
    if torch is None:
        return ()
    found = []
    for name in names:
        with contextlib.suppress(AttributeError):
            found.append(operator.attrgetter(name)(torch))
    return tuple(found)


class PartSeconds:
    """The seconds of the parts of some work, by name. Threads may measure different parts at once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the seconds of the block to those of `part`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(part, time.perf_counter() - began)

    def add(self, part: str, seconds: float) -> None:
        self.seconds[part] = round(self.seconds.get(part, 0.0) + seconds, 3)

    def take(self) -> dict[str, float]:
        """What has been measured since this was called last."""
        seconds, self.seconds = self.seconds, {}
        return seconds


@dataclass(frozen=True)
class Rank:
    """This process within its gang, and the device that it computes on."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"


def resolve_dtype(name: str) -> torch.dtype:
    """The torch dtype called `bfloat16` or `float32`."""
    import torch

    assert name in ("bfloat16", "float32"), name
    return getattr(torch, name)


def join_gang(device: str, rank: int, world: int, rendezvous: Rendezvous | None, timeout: float) -> str:
    """Make this process a rank of its gang, and return the device that it computes on.

    `device` is "cpu" or "cuda"; `rendezvous` is None for a gang of one; `timeout` is in seconds. Raises RuntimeError
    when there is no GPU although one was requested.
    """
    import torch
    import torch.distributed as dist

    store = open_store(rendezvous, world, timeout) if rendezvous is not None else None
    if device == "cuda":
        if store is not None:
            _see_cards_of_gang(store, rank, world)
        if not torch.cuda.is_available():
            raise RuntimeError("a GPU was promised to this rank, but torch sees none")
        torch.cuda.set_device(0)
        # By default, float32 convolutions would be computed in TF32.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        backend, device_name = "nccl", "cuda:0"
    else:
        # The bits of a sum depend on how many threads share it.
        torch.set_num_threads(1)
        backend, device_name = "gloo", "cpu"
    if store is not None:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    return device_name


def open_store(rendezvous: Rendezvous, world: int, timeout: float) -> Store:
    """The store that the ranks share from the rendezvous on. Returns once all have come.

    The rank with the listener serves it. Raises torch's DistNetworkError or DistStoreError after `timeout` seconds.
    """
    import torch.distributed as dist

    listener = rendezvous.listener
    return dist.TCPStore(  # type: ignore[attr-defined]
        rendezvous.host,
        rendezvous.port,
        world,
        is_master=listener is not None,
        timeout=timedelta(seconds=timeout),
        # The store closes it.
        master_listen_fd=None if listener is None else listener.detach(),
    )


def _see_cards_of_gang(store: Store, rank: int, world: int) -> None:
    """Let this rank see the cards of the others on its node, behind its own, which stays number 0.

    It computes on its own only. But what CUDA takes for memory of another card, it copies with copy engines.
    """
    own = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    store.set(f"card of {rank}", f"{socket.gethostname()} {own}")
    cards = [store.get(f"card of {r}").decode().partition(" ") for r in range(world)]
    if all(node == cards[rank][0] and card and "," not in card for node, _, card in cards):
        others = dict.fromkeys(card for _, _, card in cards if card != own)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join((own, *others))
