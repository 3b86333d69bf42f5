"""Tensors copied from their files into pinned host memory, by threads of their own while the device is at work.

Pinning is the slow part, and most of it is one call of the driver for each page. Memory that is filled first, in huge
pages where the system has them, is pinned several times faster than memory that is allocated pinned. Registering it is
legal while another thread captures a CUDA graph in the mode "thread_local" (model/graphs.py).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ltx_ray.parallel.alignment import aligned

#: Host memory is allocated and pinned in slabs of this size. The driver holds its locks while it pins one, and stage 1
#: launches its kernels in between.
SLAB_BYTES = 256 * 2**20
#: Threads that fill and pin slabs. The readers of another replica, Gemma and x264 need cores, too.
_THREADS = 4


class HostCopyFailed(RuntimeError):
    """The host gave no memory, the device's driver refused to pin it, or a file could not be read."""


@dataclass(frozen=True)
class HostTensor:
    """A tensor that is to be copied."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


class HostCopy:
    """Fills and pins host memory in the background.

    `read` fills the tensors that it is given, by name, from their files; several threads call it at once. On a CPU
    nothing is pinned. `after`: another copy that goes first.
    """

    def __init__(
        self,
        tensors: Sequence[HostTensor],
        read: Callable[[Mapping[str, torch.Tensor]], None],
        device: torch.device,
        after: HostCopy | None = None,
    ):
        self._read, self._device, self._after = read, device, after
        self._began, self._ended = time.perf_counter(), 0.0
        self._todo: queue.SimpleQueue[list[HostTensor]] = queue.SimpleQueue()
        slabs = list(_slabs(tensors))
        for slab in slabs:
            self._todo.put(slab)
        self._lock, self._done = threading.Lock(), threading.Event()
        #: Why it failed. The exception itself would keep the memory of its slab.
        self._failure: str | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._memory: list[_Slab] = []
        self._running = max(1, min(_THREADS, os.cpu_count() or 1, len(slabs)))
        for number in range(self._running):
            # A daemon: a process that is told to end does not wait for its memory to be pinned.
            threading.Thread(target=self._work, name=f"host copy {number}", daemon=True).start()

    @property
    def done(self) -> bool:
        """Whether `result` returns or raises at once."""
        return self._done.is_set()

    @property
    def seconds(self) -> float:
        """Seconds from the start to the end of a copy that is done."""
        return self._ended - self._began

    def result(self) -> HostMemory:
        """The copies, once all are there. Raises HostCopyFailed."""
        self._done.wait()
        if self._failure is not None:
            raise HostCopyFailed(self._failure)
        return HostMemory(self._tensors, self._memory)

    def _work(self) -> None:
        try:
            if self._after is not None:
                self._after._done.wait()
            while self._failure is None:
                self._copy(self._todo.get_nowait())
        except queue.Empty:
            pass
        except HostCopyFailed as error:
            self._fail(str(error))
        except BaseException as error:
            self._fail(f"{type(error).__name__}: {error}")
        with self._lock:
            self._running -= 1
            if not self._running:
                if self._failure is not None:
                    # Nobody will ask for these, and others may need the memory.
                    self._tensors, self._memory = {}, []
                self._ended = time.perf_counter()
                self._done.set()

    def _fail(self, reason: str) -> None:
        with self._lock:
            self._failure = self._failure or reason

    def _copy(self, tensors: list[HostTensor]) -> None:
        slab = _Slab(sum(aligned(tensor.nbytes) for tensor in tensors))
        found, start = dict[str, torch.Tensor](), 0
        for tensor in tensors:
            memory = slab.memory[start : start + tensor.nbytes]
            found[tensor.name] = memory.view(tensor.dtype).view(tensor.shape)
            start += aligned(tensor.nbytes)
        self._read(found)
        if self._device.type == "cuda":
            slab.pin(self._device)
        with self._lock:
            self._tensors |= found
            self._memory.append(slab)


@dataclass(frozen=True)
class HostMemory:
    """Tensors on the host, and the slabs that they lie in, which must live as long."""

    tensors: Mapping[str, torch.Tensor]
    slabs: Sequence[_Slab]


class _Slab:
    """Memory of the host's, `memory` (nbytes,) uint8, which is unpinned with this object."""

    def __init__(self, nbytes: int):
        try:
            self._map = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise HostCopyFailed(f"{nbytes} bytes of host memory: {error.strerror}") from error
        with contextlib.suppress(OSError):  # Some kernels have no huge pages.
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.memory = torch.frombuffer(self._map, dtype=torch.uint8)[:nbytes]

    def pin(self, device: torch.device) -> None:
        """Register the memory with CUDA. Raises HostCopyFailed."""
        address, nbytes = self.memory.data_ptr(), len(self._map)
        with torch.cuda.device(device):
            try:
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
            except RuntimeError as error:
                raise HostCopyFailed(f"pinning {nbytes} bytes: {error}") from error
        # The mapping lives until its memory is unregistered. A process that ends leaves this to the driver.
        weakref.finalize(self, _unpin, address, self._map).atexit = False


def _unpin(address: int, mapping: mmap.mmap) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
    del mapping


def _slabs(tensors: Iterable[HostTensor]) -> Iterable[list[HostTensor]]:
    """The tensors in order, in groups of up to SLAB_BYTES or one tensor. No copy may cross the border of a slab."""
    slab: list[HostTensor] = []
    size = 0
    for tensor in tensors:
        if slab and size + aligned(tensor.nbytes) > SLAB_BYTES:
            yield slab
            slab, size = [], 0
        slab.append(tensor)
        size += aligned(tensor.nbytes)
    if slab:
        yield slab
