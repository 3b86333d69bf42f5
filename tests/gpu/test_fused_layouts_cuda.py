"""The fused path on several ranks of one GPU, at the released widths: as near to float32 as on one rank.

The ranks are threads of this process, so the passes are eager. Their exchanges are exact.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from ltx_ray.parallel.mesh import Mesh
from ltx_ray.records import AV
from tests.support.cuda_passes import passes
from tests.support.thread_ranks import run_ranks
from tests.support.transformers import relative


@cache
def one_rank(precision: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, AV[torch.Tensor]]:
    with torch.inference_mode():
        return passes(Mesh(), precision, dtype)[0]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize(("tp", "sequence"), [(2, 1), (4, 1), (1, 2), (1, 4), (2, 2)])
def test_a_layout_is_as_near_to_float32_as_one_rank(tp, sequence, precision):
    exact, floor = one_rank("bf16", torch.float32), one_rank(precision)
    ranks = run_ranks(tp, sequence, lambda mesh: passes(mesh, precision)[0])
    for name, right in exact.items():
        for stream in range(2):
            error = relative(list(floor[name])[stream], list(right)[stream])
            for found in ranks:
                assert relative(list(found[name])[stream], list(right)[stream]) <= 1.2 * error, (name, stream, error)
        assert all(torch.equal(a, b) for found in ranks for a, b in zip(found[name], ranks[0][name], strict=True))
