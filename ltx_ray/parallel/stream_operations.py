"""Writes and waits that a CUDA stream makes itself, without a kernel (cuStreamBatchMemOp of the CUDA driver)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StreamOperations:
    """Operations that a stream makes one after the other, however often they are launched."""

    operations: list[Any]

    @staticmethod
    def check() -> None:
        """Raise ImportError or RuntimeError where there are none."""
        import torch
        from cuda.bindings import driver

        attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS
        _, supported = driver.cuDeviceGetAttribute(attribute, torch.cuda.current_device())
        if not supported:
            raise RuntimeError("the GPU has no stream memory operations")

    @classmethod
    def tell_and_wait(cls, told: Sequence[int], own: Sequence[int]) -> StreamOperations:
        """Set the flags at the addresses `told`, then wait for those at `own`, and clear them for the next time.

        Flags are 32 bits wide.
        """
        operations = [_write(address, 1) for address in told]
        for address in own:
            operations += [_wait(address, 1), _write(address, 0)]
        return cls(operations)

    def launch(self, stream: int) -> None:
        """Give them to the CUDA stream of this handle, which may be capturing a graph."""
        from cuda.bindings import driver

        (status,) = driver.cuStreamBatchMemOp(driver.CUstream(stream), len(self.operations), self.operations, 0)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"cuStreamBatchMemOp: {status}")


def _write(address: int, value: int) -> Any:
    from cuda.bindings import driver

    made = driver.CUstreamBatchMemOpParams()
    made.operation = driver.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WRITE_VALUE_32
    made.writeValue.address = driver.CUdeviceptr(address)
    made.writeValue.value = driver.cuuint32_t(value)
    made.writeValue.flags = 0
    return made


def _wait(address: int, value: int) -> Any:
    from cuda.bindings import driver

    made = driver.CUstreamBatchMemOpParams()
    made.operation = driver.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WAIT_VALUE_32
    made.waitValue.address = driver.CUdeviceptr(address)
    made.waitValue.value = driver.cuuint32_t(value)
    made.waitValue.flags = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ.value
    return made
