"""A rank's shard straight from safetensors files, at the speed of the disk or of the bus.

A rank reads its own slices and nothing else, in file order, in pieces: a few threads read them into
small pinned buffers and send each to the device while the next is read, so that host memory stays
small however large the shard is. Dtypes are converted on the device. On a CPU the bytes are read in
place. There is never a state dict.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ltx_ray.checkpoints.safetensors import TensorInfo, listed
from ltx_ray.parallel.fp8 import row_scale_of, store
from ltx_ray.parallel.layers import TPGroup

#: Bytes read at once, and threads that read. Each has two pinned buffers, so a rank pins at most 256 MiB.
PIECE_BYTES = 16 * 2**20
LANES = 8
_SCRATCH_BYTES = 2 * 2**20
#: Bytes of weights that exist unquantized at once on their way to fp8.
_QUANTIZED_BATCH_BYTES = 2**30

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """A slice to read: this rank's part of `info` along `shard_dim` (None: all), into `into` (contiguous)."""

    info: TensorInfo
    shard_dim: int | None
    into: torch.Tensor


def shard_shape(info: TensorInfo, shard_dim: int | None, tp: TPGroup) -> tuple[int, ...]:
    """The shape of this rank's part of a tensor."""
    shape = list(info.shape)
    if shard_dim is not None:
        part = tp.slice(shape[shard_dim])
        shape[shard_dim] = part.stop - part.start
    return tuple(shape)


def fill(wanted: Sequence[Slice], tp: TPGroup) -> Iterator[int]:
    """Read every slice into its tensor; yields the places in `wanted` of those that are there, as they come.

    On a GPU the current stream waits for what is yielded, so that work queued after it sees the values.
    All of `wanted` lies on one device. Raises ValueError for a file that ends too early, else what the
    reading or the copying raised, with the file and the tensor in the message.
    """
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i].info.path, wanted[i].info.start))
    pieces = [piece for i in order for piece in _pieces(i, wanted[i], tp)]
    files = _Files()
    try:
        if pieces and wanted[0].into.is_cuda:
            yield from _fill_gpu(pieces, len(wanted), files, wanted[0].into.device)
        else:
            buffer = torch.empty(0, dtype=torch.uint8)
            left = _counts(pieces, len(wanted))
            for piece in pieces:
                with _naming(piece):
                    if not piece.converts:
                        files.read(piece, piece.target.view(torch.uint8))
                    else:
                        if buffer.numel() < piece.nbytes:
                            buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8)
                        files.read(piece, buffer[: piece.nbytes])
                        piece.target.copy_(piece.scaled(buffer[: piece.nbytes].view(piece.dtype)))
                left[piece.index] -= 1
                if not left[piece.index]:
                    yield piece.index
    finally:
        files.close()


@dataclass(frozen=True)
class _Piece:
    """A part of a slice: `rows` runs of `run` bytes, `pitch` apart from byte `offset` on, for `target` (flat)."""

    index: int
    info: TensorInfo
    offset: int
    rows: int
    run: int
    pitch: int
    target: torch.Tensor
    scale: float | None = None

    @property
    def nbytes(self) -> int:
        return self.rows * self.run

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.info.dtype]

    @property
    def converts(self) -> bool:
        return self.target.dtype != self.dtype or self.scale is not None

    def scaled(self, values: torch.Tensor) -> torch.Tensor:
        """The values that the file means: quantized ones are multiplied in float32."""
        return values if self.scale is None else values.float().mul_(self.scale)


def _pieces(index: int, want: Slice, tp: TPGroup) -> Iterator[_Piece]:
    info, flat = want.info, want.into.view(-1)
    if info.dtype not in TORCH_DTYPES:
        raise ValueError(f"{info.path}: {info.key} has dtype {info.dtype}; legal: {', '.join(TORCH_DTYPES)}")
    assert tuple(want.into.shape) == shard_shape(info, want.shard_dim, tp), (info.key, want.into.shape)
    item = TORCH_DTYPES[info.dtype].itemsize
    scale = None if info.scale is None else info.scale.scalar()
    if not flat.numel():
        return
    if want.shard_dim is None or want.shard_dim == 0 or tp.size == 1:
        part = tp.slice(info.shape[0]) if want.shard_dim == 0 else slice(0, 0)
        start = info.start + part.start * (info.nbytes // info.shape[0] if info.shape else 0)
        step = PIECE_BYTES // item
        for at in range(0, flat.numel(), step):
            count = min(step, flat.numel() - at)
            yield _Piece(index, info, start + at * item, 1, count * item, 0, flat[at : at + count], scale)
        return
    assert want.shard_dim == 1 and len(info.shape) == 2, (info.key, want.shard_dim)
    part = tp.slice(info.shape[1])
    width, pitch = part.stop - part.start, info.shape[1] * item
    step = max(1, PIECE_BYTES // (width * item))
    for row in range(0, info.shape[0], step):
        rows = min(step, info.shape[0] - row)
        target = flat[row * width : (row + rows) * width]
        offset = info.start + row * pitch + part.start * item
        yield _Piece(index, info, offset, rows, width * item, pitch, target, scale)


class _Files:
    """Open files by path; safe to read from several threads."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()
        self._scratch = threading.local()

    def read(self, piece: _Piece, into: torch.Tensor) -> None:
        """The bytes of `piece` into `into` (uint8, on the host)."""
        descriptor, room = self._get(piece.info.path), into.numpy()
        if piece.rows == 1:
            _read_fully(descriptor, memoryview(room), piece.offset)
            return
        # Runs of a few KiB, far apart: the kernel fetches whole pages anyway, and a call or a page fault for each
        # costs more than to take the rows whole, a cacheful at a time, and to keep the columns wanted.
        room = room.reshape(piece.rows, piece.run)
        step = max(1, _SCRATCH_BYTES // piece.pitch)
        for row in range(0, piece.rows, step):
            count = min(step, piece.rows - row)
            # the last row ends where its run does, which may be the end of the file
            whole = self._rows(count * piece.pitch)[: (count - 1) * piece.pitch + piece.run]
            _read_fully(descriptor, memoryview(whole), piece.offset + row * piece.pitch)
            runs = np.lib.stride_tricks.as_strided(whole, (count, piece.run), (piece.pitch, 1), writeable=False)
            np.copyto(room[row : row + count], runs)

    def _rows(self, size: int) -> np.ndarray:
        held = getattr(self._scratch, "rows", None)
        if held is None or len(held) < size:
            held = self._scratch.rows = np.empty(size, dtype=np.uint8)
        return held

    def _get(self, path: str) -> int:
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
            return self._open[path]

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def _read_fully(descriptor: int, room: memoryview, offset: int) -> None:
    done = 0
    while done < len(room):
        got = os.preadv(descriptor, [room[done:]], offset + done)
        if not got:
            raise ValueError(f"the file ends at byte {offset + done}, inside it; fetch it again")
        done += got


def _fill_gpu(pieces: list[_Piece], count: int, files: _Files, device: torch.device) -> Iterator[int]:
    todo: queue.SimpleQueue[_Piece] = queue.SimpleQueue()
    for piece in pieces:
        todo.put(piece)
    sent: queue.SimpleQueue[tuple[int, torch.cuda.Event] | BaseException] = queue.SimpleQueue()
    stop = threading.Event()
    # what the tensors held may still be in use by work queued before
    free = torch.cuda.current_stream(device).record_event()

    def lane() -> None:
        try:
            run_lane()
        except BaseException as error:
            sent.put(error)  # the reader raises it in its own thread

    def run_lane() -> None:
        stream = torch.cuda.Stream(device)
        stream.wait_event(free)
        buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        busy: list[torch.cuda.Event | None] = [None, None]
        turn = 0
        while not stop.is_set():
            try:
                piece = todo.get_nowait()
            except queue.Empty:
                break
            with _naming(piece):
                if busy[turn] is not None:
                    busy[turn].synchronize()
                buffer = buffers[turn][: piece.nbytes]
                files.read(piece, buffer)
                with torch.cuda.stream(stream):
                    source = buffer.view(piece.dtype)
                    if piece.converts:
                        source = piece.scaled(source.to(device, non_blocking=True))
                    piece.target.copy_(source, non_blocking=True)
                    busy[turn] = stream.record_event()
            sent.put((piece.index, busy[turn]))
            turn = 1 - turn
        # the buffers go back to their pool only when the copies from them are done
        stream.synchronize()

    lanes = [threading.Thread(target=lane, daemon=True) for _ in range(min(LANES, os.cpu_count() or 1, len(pieces)))]
    for thread in lanes:
        thread.start()
    try:
        left = _counts(pieces, count)
        for _ in range(len(pieces)):
            arrived = sent.get()
            if isinstance(arrived, BaseException):
                raise arrived
            index, event = arrived
            torch.cuda.current_stream(device).wait_event(event)
            left[index] -= 1
            if not left[index]:
                yield index
    finally:
        stop.set()
        for thread in lanes:
            thread.join()


def _counts(pieces: list[_Piece], count: int) -> list[int]:
    counts = [0] * count
    for piece in pieces:
        counts[piece.index] += 1
    return counts


class _naming:
    """Adds the file and the tensor to what is raised inside, and keeps its type where that takes one text."""

    def __init__(self, piece: _Piece):
        self._what = f"{piece.info.path}: {piece.info.key}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            raise named(error, self._what) from error


def named(error: BaseException, what: str) -> BaseException:
    """`error` again, with `what` in front of its message."""
    kind = type(error) if isinstance(error, ValueError | RuntimeError) else RuntimeError
    try:
        return kind(f"{what}: {error}")
    except TypeError:
        return RuntimeError(f"{what}: {type(error).__name__}: {error}")


def load_shard(
    module: nn.Module, tensors: Mapping[str, TensorInfo], tp: TPGroup, *, dtype: torch.dtype, device: torch.device
) -> None:
    """Fill `module` with this rank's slices of `tensors`, as `dtype` on `device`.

    Parameters on the meta device are allocated; others, which `packing.pack` laid out, are filled where they are,
    those in fp8 from values that exist in `dtype` for a moment only. Raises ValueError naming the file and the
    first ten keys when names or shapes do not match, and the tensor when the device's memory is too small.
    """
    expected = dict(module.named_parameters())
    problems = listed("missing", expected.keys() - tensors.keys()) + listed(
        "unexpected", tensors.keys() - expected.keys()
    )
    if problems:
        where = next(iter(tensors.values())).path if tensors else "the checkpoint"
        raise ValueError(f"{where}: the transformer's keys do not fit the model: {'; '.join(problems)}")
    wanted, quantized = [], []
    for name, parameter in expected.items():
        info, dim = tensors[name], parameter.shard_dim
        if len(info.shape) != parameter.dim() or shard_shape(info, dim, tp) != tuple(parameter.shape):
            raise ValueError(
                f"{info.path}: {info.key} has shape {info.shape}; legal: one of which rank {tp.rank} of "
                f"{tp.size} gets {tuple(parameter.shape)}"
            )
        if row_scale_of(parameter) is not None:
            quantized.append((info, dim, parameter))
            continue
        if parameter.is_meta:
            parameter = _allocated(parameter, info, dtype, device)
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, parameter)
        wanted.append(Slice(info, dim, parameter.data))
    for _ in fill(wanted, tp):
        pass
    _load_quantized(quantized, tp, dtype, device)


def _allocated(parameter: nn.Parameter, info: TensorInfo, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    try:
        loaded = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device), requires_grad=False)
    except RuntimeError as error:
        raise named(error, f"{info.path}: {info.key}") from error
    loaded.shard_dim = parameter.shard_dim
    return loaded


def _load_quantized(
    parts: list[tuple[TensorInfo, int | None, nn.Parameter]], tp: TPGroup, dtype: torch.dtype, device: torch.device
) -> None:
    """Fill parameters in fp8, a batch of them at a time, so that few exist in `dtype` at once."""
    parts = sorted(parts, key=lambda part: (part[0].path, part[0].start))
    while parts:
        batch, size = [], 0
        while parts and (not batch or size + parts[0][2].numel() * dtype.itemsize <= _QUANTIZED_BATCH_BYTES):
            batch.append(parts.pop(0))
            size += batch[-1][2].numel() * dtype.itemsize
        values = [torch.empty(parameter.shape, dtype=dtype, device=device) for _, _, parameter in batch]
        wanted = [Slice(info, dim, plain) for (info, dim, _), plain in zip(batch, values, strict=True)]
        for index in fill(wanted, tp):
            store(batch[index][2], values[index])
        del values, wanted  # before the next batch takes as much
