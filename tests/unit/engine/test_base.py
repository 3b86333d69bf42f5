"""What errors of an engine say of the row and of the replica."""

from __future__ import annotations

import pytest
import torch

from ltx_ray.engine.base import error_kind, is_out_of_memory
from ltx_ray.records import ErrorKind, ModelError, ReplicaError, RowError, StoredLatentsGone, WrongDevice


@pytest.mark.parametrize(
    "error, kind",
    [
        (RowError("no picture"), ErrorKind.ROW),
        (WrongDevice("drawn on another GPU"), ErrorKind.INFRASTRUCTURE),
        (ReplicaError("half merged"), ErrorKind.REPLICA),
        (ModelError("a LoRA that is not finite"), ErrorKind.MODEL),
        (StoredLatentsGone("no such file"), ErrorKind.STORED_LATENTS_GONE),
        (OSError("the store cannot be reached"), ErrorKind.INFRASTRUCTURE),
        (RuntimeError("shapes do not match"), ErrorKind.UNKNOWN),
        (MemoryError(), ErrorKind.PROCESS),
        (torch.OutOfMemoryError("tried to allocate 32 MiB"), ErrorKind.PROCESS),
        (RuntimeError("CUDA error: out of memory"), ErrorKind.PROCESS),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ErrorKind.PROCESS),
        (torch.AcceleratorError("an illegal memory access was encountered"), ErrorKind.DEVICE),
        (torch.distributed.DistBackendError("NCCL error"), ErrorKind.PROCESS),
        (torch.distributed.DistNetworkError("connection reset"), ErrorKind.PROCESS),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value.value,
)
def test_kinds_of_errors(error, kind):
    assert error_kind(error) == kind


@pytest.mark.parametrize("name", ["RowError", "StoredLatentsGone", "OutOfMemoryError", "DistBackendError"])
def test_the_name_of_a_class_decides_nothing(name):
    error = type(name, (Exception,), {})("an error of another library")
    assert error_kind(error) == ErrorKind.UNKNOWN and not is_out_of_memory(error)
