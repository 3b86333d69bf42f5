"""What a profile of a gang's pass says of its exchanges."""

from __future__ import annotations

import pytest

from scripts.bench.gang import GangPass, exposed_share, is_exchange


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


def test_figures_are_those_of_the_gang_whether_its_passes_are_graphs():
    found = GangPass("tp2", {"one card": 6.0, "tp2, graph": 4.0})
    assert found.figures == {"ms": 4.0, "speedup": 1.5} and found.layout == "tp2"


def test_time_without_work_is_exposed_whether_an_exchange_runs_or_nothing():
    work = [(0.0, 10.0, False), (5.0, 12.0, False), (40.0, 60.0, False), (60.0, 70.0, False)]
    exchanges = [(11.0, 30.0, True), (50.0, 80.0, True)]
    assert exposed_share(work + exchanges) == pytest.approx((28 + 10) / 80)
    assert exposed_share(work[:1]) == 0
