"""The Triton kernel of `merging.merge_`: products, roundings and sum in one pass over the weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ltx_ray.parallel.factors import FactorProduct


@triton.jit
def _merge_kernel(
    target, clean, delta_in, a, b, rows, columns, rank, strength,
    stride_target, stride_clean, stride_delta, stride_a, stride_b,
    FIRST: tl.constexpr, LAST: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share rows of B or columns of A, which thus stay in the cache.
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(rows, M), tl.cdiv(columns, N)
    group = program // (GROUP * tiles_n)
    first_tile = group * GROUP
    group_tiles = tl.minimum(tiles_m - first_tile, GROUP)
    tile_m = first_tile + (program % (GROUP * tiles_n)) % group_tiles
    tile_n = (program % (GROUP * tiles_n)) // group_tiles
    m = tile_m * M + tl.arange(0, M)
    n = tile_n * N + tl.arange(0, N)
    k = tl.arange(0, K)
    in_m, in_n = m[:, None] < rows, n[None, :] < columns
    dtype = target.dtype.element_ty
    total = tl.zeros((M, N), dtype=tl.float32)
    for at in range(0, rank, K):
        b_tile = tl.load(b + m[:, None] * stride_b + (at + k)[None, :], mask=in_m & ((at + k)[None, :] < rank), other=0)
        a_tile = tl.load(a + (at + k)[:, None] * stride_a + n[None, :], mask=((at + k)[:, None] < rank) & in_n, other=0)
        if FIRST:
            b_tile = (b_tile.to(tl.float32) * strength).to(dtype)
        total = tl.dot(b_tile, a_tile, total, input_precision="ieee")
    inside = in_m & in_n
    if FIRST:
        delta = total.to(dtype)
    else:
        before = tl.load(delta_in + m[:, None] * stride_delta + n[None, :], mask=inside, other=0)
        delta = (strength * total + before.to(tl.float32)).to(dtype)
    if LAST:
        weight = tl.load(clean + m[:, None] * stride_clean + n[None, :], mask=inside, other=0)
        delta = (delta.to(tl.float32) + weight.to(tl.float32)).to(dtype)
    tl.store(target + m[:, None] * stride_target + n[None, :], delta, mask=inside)


def merge(
    target: torch.Tensor,
    clean: torch.Tensor,
    products: Sequence[FactorProduct],
    chunk_bytes: int,
) -> None:
    """Do as `merging.merge_` on CUDA tensors whose rows are contiguous. `chunk_bytes` bounds the temporaries."""
    rows, columns = target.shape
    if len(products) == 1:
        _launch(target, clean, clean, products[0], first=True, last=True)
        return
    # The sum of several LoRAs is rounded to the weight's dtype between them, and needs memory of its own.
    step = max(1, chunk_bytes // (columns * target.element_size()))
    delta_rows = torch.empty((min(step, rows), columns), dtype=target.dtype, device=target.device)
    for start in range(0, rows, step):
        block = slice(start, min(rows, start + step))
        delta = delta_rows[: block.stop - start]
        for number, (a, b, strength) in enumerate(products):
            last = number == len(products) - 1
            into = target[block] if last else delta
            _launch(into, clean[block], delta, (a, b[block], strength), first=number == 0, last=last)


def _launch(
    target: torch.Tensor,
    clean: torch.Tensor,
    delta: torch.Tensor,
    product: tuple[torch.Tensor, torch.Tensor, float],
    *,
    first: bool,
    last: bool,
) -> None:
    a, b, strength = product
    rows, columns = target.shape
    assert clean.shape == target.shape and a.shape[1] == columns and b.shape == (rows, a.shape[0]), (
        target.shape, clean.shape, a.shape, b.shape,
    )  # fmt: skip
    for tensor in (target, clean, delta, a, b):
        assert tensor.stride(1) == 1 and tensor.dtype == target.dtype, (tensor.shape, tensor.stride(), tensor.dtype)
    # Tiles depend on the dtype and not on the shape, because a shard has another shape and must get the same bits.
    float32 = target.dtype == torch.float32
    m, n, k, warps, stages = (64, 64, 32, 4, 2) if float32 else (128, 256, 64, 8, 3)
    _merge_kernel[(triton.cdiv(rows, m) * triton.cdiv(columns, n),)](
        target, clean, delta, a, b, rows, columns, a.shape[0], float(strength),
        target.stride(0), clean.stride(0), delta.stride(0), a.stride(0), b.stride(0),
        FIRST=first, LAST=last, M=m, N=n, K=k, GROUP=8, num_warps=warps, num_stages=stages,
    )  # fmt: skip
