"""Ranks as threads of the test's process, which share its device and need no process group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from ltx_ray.parallel.collectives import RankGroup, Threads, Transport
from ltx_ray.parallel.mesh import Mesh
from ltx_ray.parallel.peer_copies import SLOTS, CopyStream, PeerCopies

T = TypeVar("T")


class ThreadSlots:
    """The slots (peer_copies.Slots) of ranks that are threads and share the memory of a CPU."""

    def __init__(self, size: int):
        self._barrier = threading.Barrier(size)
        self._nbytes = 0
        self._slots: list[list[torch.Tensor]] = [[] for _ in range(size)]

    def of_rank(self, rank: int) -> _RankSlots:
        return _RankSlots(self, rank)

    def abort(self) -> None:
        self._barrier.abort()


class _RankSlots:
    def __init__(self, shared: ThreadSlots, rank: int):
        self._shared, self._rank, self._nbytes = shared, rank, 0

    def reserve(self, nbytes: int) -> None:
        if nbytes > self._nbytes:
            self._nbytes = nbytes
            # The others may still read what is replaced.
            self._shared._barrier.wait()
            # What a rank reads too early is no number that it could take for a result.
            self._shared._slots[self._rank] = [torch.full((nbytes,), 255, dtype=torch.uint8) for _ in range(SLOTS)]
            self._shared._barrier.wait()

    def of(self, rank: int, slot: int) -> torch.Tensor:
        return self._shared._slots[rank][slot]

    def barrier(self, number: int) -> None:
        self._shared._barrier.wait()


class CopyingThreads(Threads):
    """Threads that exchange as GPUs of a node do (peer_copies.PeerCopies)."""

    def __init__(self, size: int):
        super().__init__(size)
        self._places = ThreadSlots(size)

    def rank(self, rank: int) -> Transport:
        slots = self._places.of_rank(rank)
        return PeerCopies(rank, self.size, slots, super().rank(rank), CopyStream(torch.device("cpu")))

    def abort(self) -> None:
        super().abort()
        self._places.abort()


def run_ranks(tp: int, peers: int, run: Callable[[Mesh], T], threads: type[Threads] = Threads) -> list[T]:
    """What `run` returns on each of tp * peers ranks, in their order (mesh.make_mesh). The first failure is raised."""
    tp_groups, peer_groups = [threads(tp) for _ in range(peers)], [threads(peers) for _ in range(tp)]
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
