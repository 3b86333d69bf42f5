"""Ranks as threads of the test's process, which share its device and need no process group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from ltx_ray.parallel.collectives import RankGroup, Threads
from ltx_ray.parallel.mesh import Mesh

T = TypeVar("T")


def run_ranks(tp: int, peers: int, run: Callable[[Mesh], T]) -> list[T]:
    """What `run` returns on each of tp * peers ranks, in their order (mesh.make_mesh). The first failure is raised."""
    tp_groups, peer_groups = [Threads(tp) for _ in range(peers)], [Threads(peers) for _ in range(tp)]
    found: dict[int, T] = {}
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        peer, tp_rank = divmod(rank, tp)
        mesh = Mesh(
            RankGroup(tp_rank, tp, tp_groups[peer].rank(tp_rank)),
            RankGroup(peer, peers, peer_groups[tp_rank].rank(peer)),
        )
        try:
            with torch.inference_mode():
                found[rank] = run(mesh)
        except BaseException as error:
            failures.append(error)
            for group in (*tp_groups, *peer_groups):
                group.abort()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(tp * peers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    broken = (threading.BrokenBarrierError,)
    failure = next((error for error in failures if not isinstance(error, broken)), failures[0] if failures else None)
    if failure is not None:
        raise failure
    return [found[rank] for rank in range(tp * peers)]
