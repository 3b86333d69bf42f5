"""Writes and waits that a CUDA stream makes itself, without a kernel (cuStreamBatchMemOp of the CUDA driver)."""

from __future__ import annotations

from collections.abc import Sequence


def check() -> None:
    """Raise ImportError or RuntimeError where there are none."""
    import torch
    from cuda.bindings import driver

    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS
    _, supported = driver.cuDeviceGetAttribute(attribute, torch.cuda.current_device())
    if not supported:
        raise RuntimeError("the GPU has no stream memory operations")


def tell_and_wait(stream: int, told: Sequence[int], own: Sequence[int]) -> None:
    """Set the flags at the addresses `told`, then wait for those at `own`, and clear them for the next time.

    Flags are 32 bits wide. `stream` is the handle of a CUDA stream, which may be capturing a graph.
    """
    from cuda.bindings import driver

    kinds = driver.CUstreamBatchMemOpType
    equal = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ.value
    operations = []
    for address, value in [*((x, 1) for x in told), *((x, 0) for x in own)]:
        if value == 0:
            wait = driver.CUstreamBatchMemOpParams()
            wait.operation = kinds.CU_STREAM_MEM_OP_WAIT_VALUE_32
            wait.waitValue.address = driver.CUdeviceptr(address)
            wait.waitValue.value = driver.cuuint32_t(1)
            wait.waitValue.flags = equal
            operations.append(wait)
        write = driver.CUstreamBatchMemOpParams()
        write.operation = kinds.CU_STREAM_MEM_OP_WRITE_VALUE_32
        write.writeValue.address = driver.CUdeviceptr(address)
        write.writeValue.value = driver.cuuint32_t(value)
        write.writeValue.flags = 0
        operations.append(write)
    (status,) = driver.cuStreamBatchMemOp(driver.CUstream(stream), len(operations), operations, 0)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cuStreamBatchMemOp: {status}")
