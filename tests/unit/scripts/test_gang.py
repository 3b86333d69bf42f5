"""What a profile of a gang's pass says of its exchanges."""

from __future__ import annotations

import pytest

from scripts.bench.gang import is_exchange


@pytest.mark.parametrize(
    ("kernel", "exchange"),
    [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", True),
        ("c10d::symmetric_memory::barrier_kernel(unsigned int**, int, int, int, unsigned long)", True),
        ("Memcpy PtoP (Device -> Device)", True),
        ("nvjet_sm90_tst_256x160_64x4_2x1_v_bz_coopA_TNT", False),
        ("Memcpy DtoD (Device -> Device)", False),
    ],
)
def test_copies_between_cards_are_exchanges_as_nccl_is(kernel, exchange):
    assert is_exchange(kernel) is exchange
