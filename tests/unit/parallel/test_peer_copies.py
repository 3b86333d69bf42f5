"""Exchanges by copies from the other ranks' memory, whose ranks are threads here."""

from __future__ import annotations

import random
import time

import pytest
import torch

from ltx_ray.parallel.collectives import RankGroup, Threads
from tests.support.thread_ranks import CopyingThreads, run_ranks


def _drawn(rank: int, number: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * number + rank)).to(dtype)


def _exchanges(group: RankGroup, late: float) -> list[torch.Tensor]:
    """Results of every kind of exchange, of many sizes, some of which begin before others have been waited for."""
    rank, n, pause = group.rank, group.size, random.Random(group.rank)
    found: list[torch.Tensor] = []
    for number in range(12):
        if number % 5 == 4:
            group.begin()
        time.sleep(pause.random() * late)
        rows = 3 + 7 * (number % 4)
        pending = group.start_gather([_drawn(rank, number, rows, 5), _drawn(rank, number, rows, dtype=torch.bfloat16)])
        scattered = group.start_reduce_scatter(
            [_drawn(rank, number, n * rows, 3), _drawn(rank, number, n * 2, 4, dtype=torch.bfloat16)]
        )
        found += [*pending.wait(), group.all_to_all(_drawn(rank, number, n, rows, 2)), *(x.wait() for x in scattered)]
        found += [group.sum_(_drawn(rank, number, rows)), group.sum_(_drawn(rank, number, 2**18 + 1))]
        found += [group.min_(_drawn(rank, number, 4)), group.broadcast_(_drawn(rank, number, 4), n - 1)]
        time.sleep(pause.random() * late)
        found.append(group.gather(torch.full((rows,), rank, dtype=torch.uint8)))
    return found


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("late", [0.0, 0.003])
def test_results_are_those_of_any_transport(n, late):
    copied = run_ranks(n, 1, lambda mesh: _exchanges(mesh.tp, late), CopyingThreads)
    expected = run_ranks(n, 1, lambda mesh: _exchanges(mesh.tp, 0.0), Threads)
    for rank in range(n):
        assert len(copied[rank]) == len(expected[rank])
        for number, (a, b) in enumerate(zip(copied[rank], expected[rank], strict=True)):
            assert a.dtype == b.dtype and torch.equal(a, b), (rank, number)


def test_inputs_are_as_they_were():
    def run(group: RankGroup) -> bool:
        shards, whole = [_drawn(group.rank, 1, 4)], [_drawn(group.rank, 2, 2 * group.size)]
        before = [x.clone() for x in (*shards, *whole)]
        group.start_gather(shards).wait()
        for pending in group.start_reduce_scatter(whole):
            pending.wait()
        return all(torch.equal(a, b) for a, b in zip((*shards, *whole), before, strict=True))

    assert run_ranks(3, 1, lambda mesh: run(mesh.tp), CopyingThreads) == [True] * 3
