"""What engines have in common: where they run, and in which dtype.

An engine is a class `(spec: EngineSpec, rank: Rank)` with `load()` and `run(stage, item, *inputs)`. What
the driver should know of the last run beside its result stands in `info`; `switches` and
`switch_seconds` count LoRA merges, where there are any. A class may bring its own `join`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


#: How a lack of memory reads where torch does not raise its OutOfMemoryError: on a CPU, in the CUDA driver, in
#: cuDNN, and when none of cuDNN's algorithms finds room for its workspace.
_NO_MEMORY = (
    "DefaultCPUAllocator", "not enough memory", "CUDA error: out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED",
    "unable to find an engine",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory did not suffice, the device's or the host's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


@dataclass(frozen=True)
class Rank:
    """This process within its gang, and the device it computes on."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"


def resolve_dtype(name: str) -> torch.dtype:
    """`bfloat16` or `float32` as torch has it."""
    import torch

    assert name in ("bfloat16", "float32"), name
    return getattr(torch, name)


def join(device: str, rank: int, world: int, rendezvous: tuple[str, int] | None, timeout: float) -> str:
    """Make this process a rank of its gang and return the device it computes on.

    `device` is "cpu" or "cuda"; `rendezvous` is (host, port) on rank 0's node, None for a gang of one;
    `timeout` in seconds. Raises RuntimeError when the GPU that was asked for is not there.
    """
    import torch
    import torch.distributed as dist

    if device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("a GPU was promised to this rank, but torch sees none")
        torch.cuda.set_device(0)
        # float32 means float32: the default would run convolutions in TF32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        backend, place = "nccl", "cuda:0"
    else:
        # one thread a rank: the bits of a sum depend on how many threads share it
        torch.set_num_threads(1)
        backend, place = "gloo", "cpu"
    if rendezvous is not None:
        host, port = rendezvous
        dist.init_process_group(
            backend,
            init_method=f"tcp://{host}:{port}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
    return place
