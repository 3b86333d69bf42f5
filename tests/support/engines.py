"""Engines that break in one way each, named by dotted path in the tests of gangs."""

from __future__ import annotations

import time

from ltx_ray.engine import base
from ltx_ray.engine.fake import FakeEngine
from ltx_ray.records import ReplicaError


class NoRoom(FakeEngine):
    """Rank 1 has no memory for a tensor of its shard."""

    def load(self) -> None:
        super().load()
        if self.rank.rank == 1:
            raise MemoryError("model.safetensors: blocks.3.attn1.to_q.weight: tried to allocate 32 MiB")


class Late(FakeEngine):
    """Rank 1 comes to the rendezvous when the others have given up."""

    @staticmethod
    def join_gang(device: str, rank: int, world: int, rendezvous: tuple[str, int] | None, timeout: float) -> str:
        if rank == 1:
            time.sleep(timeout + 60)
            raise TimeoutError("too late")
        return base.join_gang(device, rank, world, rendezvous, timeout)


class HalfMerged(FakeEngine):
    """The first stage-1 call of a row whose prompt says so (every one, if it says always) fails while merging."""

    failed = False

    def run(self, stage, item, *inputs):
        told = "merge" in item.request.prompt and stage == "stage1"
        if told and (self._tries("merge", item) == 1 or "always" in item.request.prompt):
            HalfMerged.failed = True
            raise ReplicaError("OutOfMemoryError: merging into blocks.0.ff.net.2.weight: no room")
        assert not HalfMerged.failed, "a replica that failed to merge serves another row"
        return super().run(stage, item, *inputs)


class Hasty(FakeEngine):
    """Gives a store that refuses a second, not a minute."""

    def load(self) -> None:
        super().load()
        self.store = self.store.hurried(1.0)
