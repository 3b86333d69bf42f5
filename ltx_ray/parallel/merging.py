"""target <- clean + sum of strength * B @ A, rounded as in the reference.

Source of the rounding: docs/ltx-2.3.md#lora, `ltx_core/loader/fuse_loras.py` of the reference v1.2.0. The first product
is round(round(B * strength) @ A). Later ones are added to it by addmm, and only the sum is rounded. The clean weight
comes last.

On a GPU one Triton kernel does all of it in one pass over the weight, a tile at a time. Every element sums over the
rank of the LoRA in the same order wherever its tile lies, so a shard has the bits of the whole weight.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch

from ltx_ray.parallel.factors import FactorProduct

MERGE_CHUNK_BYTES = 32 * 2**20
_log = logging.getLogger(__name__)


def merge_(
    target: torch.Tensor,
    clean: torch.Tensor,
    products: Sequence[FactorProduct],
    *,
    first_row: int = 0,
    full_columns: int | None = None,
    chunk_bytes: int = MERGE_CHUNK_BYTES,
) -> None:
    """target (out, in) <- clean + products; `clean` may be `target` itself. All of one dtype and device.

    Temporaries stay within `chunk_bytes`. Where the arithmetic goes in chunks of rows, the borders of the chunks are
    those of the whole weight, of which this shard begins at row `first_row` and which has `full_columns` columns. Every
    layout thus computes the same matrix products.
    """
    if not products:
        if clean is not target:
            target.copy_(clean)
        return
    if target.is_cuda and (kernel := _kernel()) is not None:
        kernel(target, clean, products, chunk_bytes)
        return
    columns = full_columns or target.shape[1]
    # Half is for the product, and half for B's rows times the strength, which are as wide as the rank.
    step = max(1, chunk_bytes // 2 // (max(columns, *(a.shape[0] for a, _, _ in products)) * target.element_size()))
    start = 0
    while start < target.shape[0]:
        end = min(target.shape[0], (first_row + start) // step * step + step - first_row)
        target[start:end] = _delta(products, slice(start, end)).add_(clean[start:end])
        start = end


def _delta(products: Sequence[FactorProduct], rows: slice) -> torch.Tensor:
    """`rows` of the sum of the products: (rows, in)."""
    delta: torch.Tensor | None = None
    for a, b, strength in products:
        part = b[rows]
        if delta is None:
            delta = _matmul(part * strength, a)
        elif len(part) > 1:
            delta.addmm_(part, a, alpha=strength)
        else:
            delta = delta.expand(2, -1).addmm(part.expand(2, -1), a, alpha=strength)[:1]
    assert delta is not None
    return delta


def _matmul(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    # A single row would go to a matrix-vector routine, which rounds otherwise than the same row of a matrix.
    return torch.matmul(b, a) if len(b) > 1 else torch.matmul(b.expand(2, -1).contiguous(), a)[:1]


_Kernel = Callable[[torch.Tensor, torch.Tensor, Sequence[FactorProduct], int], None]


@cache
def _kernel() -> _Kernel | None:
    """The Triton kernel, or None where Triton or the C compiler that it needs at first use is missing.

    Raises OutOfMemoryError: without the kernel, bits would differ from those of other replicas.
    """
    try:
        from ltx_ray.parallel.merge_kernel import merge

        tile = torch.zeros(16, 16, dtype=torch.bfloat16, device="cuda")
        merge(tile, tile, [FactorProduct(tile, tile, 1.0)], MERGE_CHUNK_BYTES)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _log.warning("merging without its kernel, more slowly: %s: %s", type(error).__name__, error)
        return None
    return merge
