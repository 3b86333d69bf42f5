"""Exchanges by copies from the other ranks' memory, whose ranks are threads here."""

from __future__ import annotations

import random
import time

import pytest
import torch

from ltx_ray.parallel.collectives import RankGroup, Threads
from ltx_ray.parallel.head_exchange import HeadPlaces, HeadShape, exchange_heads
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


def _head_exchanges(ranks: RankGroup, late: float) -> list[torch.Tensor]:
    """Exchanges of heads among others, of which several have begun before the first is waited for."""
    found: list[torch.Tensor] = []
    pause = random.Random(ranks.rank)
    for number, (groups, parts, batch) in enumerate([(1, 1, 1), (4, 2, 1), (2, 2, 2), (1, 3, 2), (4, 1, 1)]):
        shape = HeadShape(groups, parts, batch, tokens=3 + number, width=4)
        rows = [
            _drawn(ranks.rank, 10 * number + part, batch * shape.tokens, ranks.size * groups * 4)
            for part in range(parts)
        ]

        def write(places: HeadPlaces, rows: list[torch.Tensor] = rows) -> None:
            time.sleep(pause.random() * late)
            for part, x in enumerate(rows):
                places.write(part, x)

        pending = exchange_heads(ranks, shape, rows[0], write)
        summed = ranks.start_sum(_drawn(ranks.rank, number, 7))
        back = [
            ranks.start_all_to_all([_drawn(ranks.rank, g, ranks.size, 2)], [torch.empty(ranks.size, 2)])
            for g in range(4)
        ]
        for group in pending:
            time.sleep(pause.random() * late)
            found += group.wait()
        found += [summed.wait(), *(x for exchange in back for x in exchange.wait())]
    return found


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("late", [0.0, 0.003])
def test_heads_arrive_where_they_are_wanted(n, late):
    copied = run_ranks(n, 1, lambda mesh: _head_exchanges(mesh.tp, late), CopyingThreads)
    expected = run_ranks(n, 1, lambda mesh: _head_exchanges(mesh.tp, 0.0), Threads)
    for rank in range(n):
        assert all(torch.equal(a, b) for a, b in zip(copied[rank], expected[rank], strict=True))
    # Six results come of the first exchange. Of the second, group 1, part 1: the channels of rank 0's heads.
    rows = [_drawn(rank, 11, 4, n * 16) for rank in range(n)]
    assert torch.equal(copied[0][6 + 3][0], torch.stack([x[:, 4:8] for x in rows]))


def test_a_sum_that_two_streams_wait_for_is_taken_once():
    def run(ranks: RankGroup) -> bool:
        (pending,) = ranks.start_reduce_scatter([torch.ones(2 * ranks.size)])
        in_place = ranks.start_sum(torch.ones(3))
        return all(
            torch.equal(x.wait(), torch.full_like(x.wait(), ranks.size)) and x.wait() is x.wait()
            for x in (pending, in_place)
        )

    assert run_ranks(2, 1, lambda mesh: run(mesh.tp), CopyingThreads) == [True] * 2


def test_inputs_are_as_they_were():
    def run(group: RankGroup) -> bool:
        shards, whole = [_drawn(group.rank, 1, 4)], [_drawn(group.rank, 2, 2 * group.size)]
        before = [x.clone() for x in (*shards, *whole)]
        group.start_gather(shards).wait()
        for pending in group.start_reduce_scatter(whole):
            pending.wait()
        return all(torch.equal(a, b) for a, b in zip((*shards, *whole), before, strict=True))

    assert run_ranks(3, 1, lambda mesh: run(mesh.tp), CopyingThreads) == [True] * 3
