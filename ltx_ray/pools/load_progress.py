"""Whether gangs that take long to load still get on: the time to start counts from the last bytes that came.

Weights may come from a shared disk or from an object store, at a speed that nobody knows before. A rank that loads
answers no call, so that a small task on its node looks at what its process has read and written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ltx_ray.pools.gang import Gang, GangState

#: Looks within the time to start, and the bytes between two of them that are progress: Ray and Python read fewer.
_LOOKS = 4
_LEAST_BYTES = 64 * 2**20


@dataclass
class _Looks:
    """`seen`: bytes at the last look, which was `at`; `pending`: the answer that is still to come."""

    at: float
    seen: int | None = None
    pending: ray.ObjectRef | None = None


class LoadProgress:
    """Gives gangs that load more time while bytes arrive. `start_timeout`: seconds that may pass without any."""

    def __init__(self, start_timeout: float):
        self._period = start_timeout / _LOOKS
        self._looks: dict[str, _Looks] = {}

    def look(self, gangs: Iterable[Gang], now: float) -> None:
        """Begin looks that are due, and take in what others have found. `now` as of `time.time`."""
        loading = {gang.name: gang for gang in gangs if gang.state is GangState.LOADING}
        for name in self._looks.keys() - loading.keys():
            del self._looks[name]
        for name, gang in loading.items():
            looks = self._looks.setdefault(name, _Looks(gang.load_began))
            if looks.pending is not None:
                self._take_in(gang, looks, now)
            elif now - looks.at > self._period:
                looks.at, looks.pending = now, _ask(gang)

    def _take_in(self, gang: Gang, looks: _Looks, now: float) -> None:
        assert looks.pending is not None
        if not ray.wait([looks.pending], timeout=0)[0]:
            return
        answer, looks.pending = looks.pending, None
        try:
            found = ray.get(answer)
        except ray.exceptions.RayError:
            return  # The node is gone, which shows elsewhere.
        if looks.seen is not None and found - looks.seen >= _LEAST_BYTES:
            gang.gets_on(now)
        looks.seen = found


def _ask(gang: Gang) -> ray.ObjectRef:
    where = NodeAffinitySchedulingStrategy(gang.ranks[0].node, soft=False)
    task: Any = ray.remote(moved_bytes)
    return task.options(num_cpus=0, max_retries=0, scheduling_strategy=where).remote([rank.pid for rank in gang.ranks])


def moved_bytes(pids: Sequence[int]) -> int:
    """Bytes that these processes of this node have read and written so far, and those that are being downloaded here:
    a rank may wait for another process's download."""
    from ltx_ray.checkpoints.node_cache import unfinished_bytes

    return sum(_counted(pid) for pid in pids) + unfinished_bytes()


def _counted(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/io") as file:
            counts = dict(line.split(":", 1) for line in file)
    except OSError:
        return 0
    # The third are reads through mapped files, which are no calls.
    return sum(int(counts.get(name, 0)) for name in ("rchar", "wchar", "read_bytes"))
