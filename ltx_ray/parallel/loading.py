"""A rank's shard read straight from safetensors files, at the speed of the disk or of the bus.

A rank reads its own slices and nothing else, in file order and in chunks. On a GPU a few threads read chunks into small
pinned buffers and send each to the device while the next one is read, so host memory stays small however large the
shard is; dtypes are converted on the device. On a CPU bytes are read in place. No state dict ever exists.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from ltx_ray.checkpoints.safetensors import TensorInfo, listed
from ltx_ray.parallel.collectives import RankGroup
from ltx_ray.parallel.fp8 import row_scale_of, write_exactly, write_values
from ltx_ray.parallel.layers import ShardParameter, shard_parameter

#: Bytes of a chunk, and threads that read chunks. Each has two pinned buffers, so a rank pins at most 256 MiB.
CHUNK_BYTES = 16 * 2**20
READER_THREADS = 8
_SCRATCH_BYTES = 2 * 2**20
#: Bytes of unquantized weights that exist at once on their way to fp8.
_QUANTIZED_BATCH_BYTES = 2**30

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class ShardRead:
    """A slice to read: this rank's part of `info` along `shard_dim` (None: all of it), into the contiguous `target`."""

    info: TensorInfo
    shard_dim: int | None
    target: torch.Tensor


def is_prequantized(info: TensorInfo) -> bool:
    """Whether the file holds the tensor in fp8."""
    return info.dtype in ("F8_E4M3", "F8_E5M2")


def scale_of(info: TensorInfo) -> float:
    """The number by which the values of a tensor are to be multiplied."""
    return 1.0 if info.scale is None else info.scale.scalar()


def as_stored(info: TensorInfo) -> TensorInfo:
    """The same tensor without its scale: its values are read as they are in the file."""
    return replace(info, scale=None)


def shard_shape(info: TensorInfo, shard_dim: int | None, tp: RankGroup) -> tuple[int, ...]:
    """Shape of this rank's part of a tensor."""
    shape = list(info.shape)
    if shard_dim is not None:
        part = tp.slice(shape[shard_dim])
        shape[shard_dim] = part.stop - part.start
    return tuple(shape)


def read_shards(reads: Sequence[ShardRead], tp: RankGroup) -> Generator[int, None, None]:
    """Read every slice into its target. Yields the index in `reads` of each as it is complete, in any order.

    All targets lie on one device. On a GPU the current stream waits for what is yielded, so that work queued after it
    sees the values. Raises ValueError for a file that ends too early, and otherwise what reading or copying raised,
    with the file and the tensor in the message.
    """
    order = sorted(range(len(reads)), key=lambda i: (reads[i].info.path, reads[i].info.start))
    chunks = [chunk for i in order for chunk in _chunks(i, reads[i], tp)]
    files = _OpenFiles()
    try:
        if chunks and reads[0].target.is_cuda:
            yield from _read_to_gpu(chunks, len(reads), files, reads[0].target.device)
        else:
            yield from _read_to_host(chunks, len(reads), files)
    finally:
        files.close()


@dataclass(frozen=True)
class _Chunk:
    """Part of a read: `rows` runs of `row_bytes`, `row_stride` bytes apart from byte `offset` on, for a flat `target`.

    `index` is that of the read. `scale`: the values are multiplied by it.
    """

    index: int
    info: TensorInfo
    offset: int
    rows: int
    row_bytes: int
    row_stride: int
    target: torch.Tensor
    scale: float | None = None

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.info.dtype]

    @property
    def converts(self) -> bool:
        return self.target.dtype != self.dtype or self.scale is not None

    def scaled(self, values: torch.Tensor) -> torch.Tensor:
        """`values` times the scale, in float32, where there is one."""
        return values if self.scale is None else values.float().mul_(self.scale)


def _chunks(index: int, read: ShardRead, tp: RankGroup) -> Iterator[_Chunk]:
    info, flat = read.info, read.target.view(-1)
    if info.dtype not in TORCH_DTYPES:
        raise ValueError(f"{info.path}: {info.key} has dtype {info.dtype}; legal: {', '.join(TORCH_DTYPES)}")
    assert tuple(read.target.shape) == shard_shape(info, read.shard_dim, tp), (info.key, read.target.shape)
    itemsize = TORCH_DTYPES[info.dtype].itemsize
    scale = None if info.scale is None else info.scale.scalar()
    if not flat.numel():
        return
    if read.shard_dim is None or read.shard_dim == 0 or tp.size == 1:
        part = tp.slice(info.shape[0]) if read.shard_dim == 0 else slice(0, 0)
        start = info.start + part.start * (info.nbytes // info.shape[0] if info.shape else 0)
        step = CHUNK_BYTES // itemsize
        for at in range(0, flat.numel(), step):
            count = min(step, flat.numel() - at)
            yield _Chunk(index, info, start + at * itemsize, 1, count * itemsize, 0, flat[at : at + count], scale)
        return
    assert read.shard_dim == 1 and len(info.shape) == 2, (info.key, read.shard_dim)
    part = tp.slice(info.shape[1])
    width, row_stride = part.stop - part.start, info.shape[1] * itemsize
    step = max(1, CHUNK_BYTES // (width * itemsize))
    for row in range(0, info.shape[0], step):
        rows = min(step, info.shape[0] - row)
        target = flat[row * width : (row + rows) * width]
        offset = info.start + row * row_stride + part.start * itemsize
        yield _Chunk(index, info, offset, rows, width * itemsize, row_stride, target, scale)


class _OpenFiles:
    """Open files by path. Several threads may read at once."""

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._scratch = threading.local()

    def read(self, chunk: _Chunk, into: torch.Tensor) -> None:
        """Read the bytes of `chunk` into `into` (uint8, on the host)."""
        descriptor, buffer = self._descriptor(chunk.info.path), into.numpy()
        if chunk.rows == 1:
            _read_fully(descriptor, buffer, chunk.offset)
            return
        # The runs are a few KiB long and far apart. The kernel fetches whole pages anyway, and a call or a page fault
        # for each run costs more than reading whole rows, as many as fit in the cache, and copying the columns out.
        buffer = buffer.reshape(chunk.rows, chunk.row_bytes)
        step = max(1, _SCRATCH_BYTES // chunk.row_stride)
        for row in range(0, chunk.rows, step):
            count = min(step, chunk.rows - row)
            # The last row is read up to the end of its run only, which may be the end of the file.
            rows = self._scratch_bytes(count * chunk.row_stride)[: (count - 1) * chunk.row_stride + chunk.row_bytes]
            _read_fully(descriptor, rows, chunk.offset + row * chunk.row_stride)
            runs = np.lib.stride_tricks.as_strided(
                rows, (count, chunk.row_bytes), (chunk.row_stride, 1), writeable=False
            )
            np.copyto(buffer[row : row + count], runs)

    def _scratch_bytes(self, size: int) -> np.ndarray:
        scratch = getattr(self._scratch, "buffer", None)
        if scratch is None or len(scratch) < size:
            scratch = self._scratch.buffer = np.empty(size, dtype=np.uint8)
        return scratch

    def _descriptor(self, path: str) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            return self._descriptors[path]

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def _read_fully(descriptor: int, into: np.ndarray, offset: int) -> None:
    """Fill `into` (contiguous uint8) from byte `offset` of the file on."""
    buffer, done = into.data, 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            raise ValueError(f"the file ends at byte {offset + done}, inside it; fetch it again")
        done += count


def _read_to_host(chunks: list[_Chunk], reads: int, files: _OpenFiles) -> Iterator[int]:
    buffer = torch.empty(0, dtype=torch.uint8)
    remaining = _chunks_per_read(chunks, reads)
    for chunk in chunks:
        with _errors_name_tensor(chunk):
            if not chunk.converts:
                files.read(chunk, chunk.target.view(torch.uint8))
            else:
                if buffer.numel() < chunk.nbytes:
                    buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
                files.read(chunk, buffer[: chunk.nbytes])
                chunk.target.copy_(chunk.scaled(buffer[: chunk.nbytes].view(chunk.dtype)))
        remaining[chunk.index] -= 1
        if not remaining[chunk.index]:
            yield chunk.index


def _read_to_gpu(chunks: list[_Chunk], reads: int, files: _OpenFiles, device: torch.device) -> Iterator[int]:
    todo: queue.SimpleQueue[_Chunk] = queue.SimpleQueue()
    for chunk in chunks:
        todo.put(chunk)
    sent: queue.SimpleQueue[tuple[int, torch.cuda.Event] | BaseException] = queue.SimpleQueue()
    stop = threading.Event()
    # Work queued earlier may still use the targets' memory.
    targets_free = torch.cuda.current_stream(device).record_event()

    def reader() -> None:
        try:
            send_chunks()
        except BaseException as error:
            sent.put(error)  # The consumer raises it in its own thread.

    def send_chunks() -> None:
        stream = torch.cuda.Stream(device)
        stream.wait_event(targets_free)
        buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        copied: list[torch.cuda.Event | None] = [None, None]
        turn = 0
        while not stop.is_set():
            try:
                chunk = todo.get_nowait()
            except queue.Empty:
                break
            with _errors_name_tensor(chunk):
                last_copy = copied[turn]
                if last_copy is not None:
                    last_copy.synchronize()
                buffer = buffers[turn][: chunk.nbytes]
                files.read(chunk, buffer)
                with torch.cuda.stream(stream):
                    source = buffer.view(chunk.dtype)
                    if chunk.converts:
                        source = chunk.scaled(source.to(device, non_blocking=True))
                    chunk.target.copy_(source, non_blocking=True)
                    event = copied[turn] = stream.record_event()
            sent.put((chunk.index, event))
            turn = 1 - turn
        # The allocator reuses the buffers when this function returns, so the copies from them must be done.
        stream.synchronize()

    count = min(READER_THREADS, os.cpu_count() or 1, len(chunks))
    threads = [threading.Thread(target=reader, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        remaining = _chunks_per_read(chunks, reads)
        for _ in range(len(chunks)):
            arrived = sent.get()
            if isinstance(arrived, BaseException):
                raise arrived
            index, event = arrived
            torch.cuda.current_stream(device).wait_event(event)
            remaining[index] -= 1
            if not remaining[index]:
                yield index
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _chunks_per_read(chunks: list[_Chunk], reads: int) -> list[int]:
    counts = [0] * reads
    for chunk in chunks:
        counts[chunk.index] += 1
    return counts


@contextmanager
def _errors_name_tensor(chunk: _Chunk) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        raise with_context(error, f"{chunk.info.path}: {chunk.info.key}") from error


def with_context(error: BaseException, what: str) -> BaseException:
    """A copy of `error` with `what` in front of its message, of the same type where its constructor takes one text."""
    kind = type(error) if isinstance(error, ValueError | RuntimeError) else RuntimeError
    try:
        return kind(f"{what}: {error}")
    except TypeError:
        return RuntimeError(f"{what}: {type(error).__name__}: {error}")


def load_shard(
    module: nn.Module,
    tensors: Mapping[str, TensorInfo],
    tp: RankGroup,
    *,
    dtype: torch.dtype,
    device: torch.device,
    proceed: Callable[[], None] = lambda: None,
) -> None:
    """Fill `module` with this rank's slices of `tensors`, as `dtype` on `device`.

    `proceed` is called before each read, and what it raises ends the reading.

    Parameters on the meta device are allocated. Others, which `packing.pack_linears` laid out, are filled in place;
    those in fp8 take the values of prequantized tensors as they are, and others are quantized from values that exist in
    `dtype` for a moment only. Raises ValueError naming the file
    and the first ten keys when names or shapes do not match, and the tensor when the device's memory is too small.
    """
    expected = dict(module.named_parameters())
    problems = listed("missing", expected.keys() - tensors.keys()) + listed(
        "unexpected", tensors.keys() - expected.keys()
    )
    if problems:
        where = next(iter(tensors.values())).path if tensors else "the checkpoint"
        raise ValueError(f"{where}: the transformer's keys do not fit the model: {'; '.join(problems)}")
    reads: list[ShardRead] = []
    quantized: list[_QuantizedRead] = []
    for name, parameter in expected.items():
        assert isinstance(parameter, ShardParameter), name
        info, dim = tensors[name], parameter.shard_dim
        if len(info.shape) != parameter.dim() or shard_shape(info, dim, tp) != tuple(parameter.shape):
            raise ValueError(
                f"{info.path}: {info.key} has shape {info.shape}; legal: one of which rank {tp.rank} of "
                f"{tp.size} gets {tuple(parameter.shape)}"
            )
        if row_scale_of(parameter) is not None:
            quantized.append(_QuantizedRead(info, parameter))
            continue
        if parameter.is_meta:
            parameter = _allocated(parameter, info, dtype, device)
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, parameter)
        reads.append(ShardRead(info, dim, parameter.data))
    proceed()
    with closing(read_shards(reads, tp)) as done:
        for _ in done:
            proceed()
    _load_quantized(quantized, tp, dtype, device, proceed)


@dataclass(frozen=True)
class _QuantizedRead:
    """A parameter in fp8 and the tensor that it is quantized from."""

    info: TensorInfo
    parameter: ShardParameter

    def dtype(self, computed: torch.dtype) -> torch.dtype:
        """What the tensor is read as: the file's fp8, or the dtype that is computed in."""
        return TORCH_DTYPES[self.info.dtype] if is_prequantized(self.info) else computed


def _allocated(parameter: ShardParameter, info: TensorInfo, dtype: torch.dtype, device: torch.device) -> ShardParameter:
    try:
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
    except RuntimeError as error:
        raise with_context(error, f"{info.path}: {info.key}") from error
    return shard_parameter(values, parameter.shard_dim)


def _load_quantized(
    reads: list[_QuantizedRead], tp: RankGroup, dtype: torch.dtype, device: torch.device, proceed: Callable[[], None]
) -> None:
    """Fill parameters in fp8, a batch at a time, so that few of them exist in `dtype` at once."""
    reads = sorted(reads, key=lambda read: (read.info.path, read.info.start))
    while reads:
        proceed()
        batch: list[_QuantizedRead] = []
        size = 0
        while reads and (not batch or size + reads[0].parameter.numel() * dtype.itemsize <= _QUANTIZED_BATCH_BYTES):
            batch.append(reads.pop(0))
            size += batch[-1].parameter.numel() * dtype.itemsize
        values = [torch.empty(read.parameter.shape, dtype=read.dtype(dtype), device=device) for read in batch]
        shard_reads = [
            ShardRead(
                as_stored(read.info) if is_prequantized(read.info) else read.info, read.parameter.shard_dim, target
            )
            for read, target in zip(batch, values, strict=True)
        ]
        for index in read_shards(shard_reads, tp):
            info, parameter = batch[index].info, batch[index].parameter
            if is_prequantized(info):
                write_exactly(parameter, values[index], scale_of(info))
            else:
                write_values(parameter, values[index])
        del values, shard_reads  # The next batch needs the memory.
