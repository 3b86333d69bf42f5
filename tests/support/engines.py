"""Engines that each fail in one way. Tests name them by dotted path."""

from __future__ import annotations

import dataclasses
import os
import time

from ltx_ray.engine import base
from ltx_ray.engine.fake import FakeEngine
from ltx_ray.parallel.rendezvous import Rendezvous
from ltx_ray.records import ErrorKind, Evidence, NotFinite, RenderError, ReplicaError, UnfitNode


class ShardOutOfMemory(FakeEngine):
    """Rank 1 runs out of memory while it loads its shard."""

    def load(self) -> None:
        super().load()
        if self.rank.rank == 1:
            raise MemoryError("model.safetensors: blocks.3.attn1.to_q.weight: tried to allocate 32 MiB")


class BadCard(FakeEngine):
    """No replica loads on the second GPU of a node."""

    def load(self) -> None:
        super().load()
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "1":
            raise RuntimeError("CUDA error: the GPU has fallen off the bus")


class SlowDisk(FakeEngine):
    """Loads until the gate is open, and reads all the while."""

    def load(self) -> None:
        super().load()
        pieces = 0
        with open("/dev/zero", "rb", buffering=0) as disk:
            while not self.store.exists("_fake/open"):
                disk.read(64 * 2**20)
                pieces += 1
                self.store.write_bytes("_fake/pieces", str(pieces).encode())


class NoDisk(FakeEngine):
    """Loads forever, and reads nothing."""

    def load(self) -> None:
        super().load()
        self.store.write_bytes(f"_fake/loads-{os.getpid()}", b"")
        time.sleep(3600.0)


class TextFirst(FakeEngine):
    """Stage 1, in one replica, waits for the texts of the next rows. The prompt begins with the number of rows."""

    begun = 0

    def run(self, stage, item, *inputs):
        if stage == "text":
            self.store.write_bytes(f"_fake/text-{item.item_id}", b"")
        elif stage == "stage1":
            self.begun += 1
            # As many as a driver lets wait for stage 1.
            while self._texts() < min(self.begun + 3, int(item.request.prompt.split()[0])):
                time.sleep(0.02)
        return super().run(stage, item, *inputs)

    def _texts(self) -> int:
        return sum(name.startswith("text-") for name in self.store.list_names("_fake"))


class LateToRendezvous(FakeEngine):
    """Rank 1 reaches the rendezvous after the others have given up."""

    @staticmethod
    def join_gang(device: str, rank: int, world: int, rendezvous: Rendezvous | None, timeout: float) -> str:
        if rank == 1:
            time.sleep(timeout + 60)
            raise TimeoutError("too late")
        return base.join_gang(device, rank, world, rendezvous, timeout)


class FailsWhileMerging(FakeEngine):
    """The first stage-1 call of a row with "merge" in its prompt fails while merging; with "always", every call."""

    failed = False

    def run(self, stage, item, *inputs):
        fails = "merge" in item.request.prompt and stage == "stage1"
        if fails and (self.count_attempt("merge", item) == 1 or "always" in item.request.prompt):
            FailsWhileMerging.failed = True
            raise ReplicaError("OutOfMemoryError: merging into blocks.0.ff.net.2.weight: out of memory")
        assert not FailsWhileMerging.failed, "a replica that failed to merge serves another row"
        return super().run(stage, item, *inputs)


class BriefStoreRetries(FakeEngine):
    """Retries a failing store for a second instead of a minute."""

    def load(self) -> None:
        super().load()
        self.store = self.store.retrying_for(1.0)


class OnNodes(FakeEngine):
    """Differs on the nodes whose ids `_fake/nodes` of the output has; the base of engines that fail there."""

    def load(self) -> None:
        import ray

        super().load()
        told = self.store.read_bytes("_fake/nodes").decode().split() if self.store.exists("_fake/nodes") else []
        self.differs = ray.get_runtime_context().get_node_id() in told

    def evidence(self) -> Evidence:
        return Evidence({}, {"torch": "2.11"}, "", "NVIDIA H100", {"transformer": "right"})


class LoadsNowhereOn(OnNodes):
    def load(self) -> None:
        super().load()
        if self.differs:
            raise RuntimeError("CUDA error: the GPU has fallen off the bus")


class LacksAPackageOn(OnNodes):
    def load(self) -> None:
        super().load()
        if self.differs:
            raise UnfitNode("attention 'fa3' needs the package fa3-fwd on every GPU node; legal: --attention cudnn")


class OtherBitsOn(OnNodes):
    def evidence(self) -> Evidence:
        return dataclasses.replace(super().evidence(), answers={"transformer": "wrong" if self.differs else "right"})

    def run(self, stage, item, *inputs):
        result = super().run(stage, item, *inputs)
        return "wrong" if self.differs and stage == "stage1" and isinstance(result, str) else result


class OtherModelOn(OnNodes):
    def evidence(self) -> Evidence:
        return dataclasses.replace(super().evidence(), device="NVIDIA A100" if self.differs else "NVIDIA H100")


class OtherTorchOn(OnNodes):
    def evidence(self) -> Evidence:
        return dataclasses.replace(super().evidence(), versions={"torch": "2.12" if self.differs else "2.11"})


class NotFiniteOn(OnNodes):
    def run(self, stage, item, *inputs):
        if self.differs and stage == "stage1":
            raise NotFinite("3 of 9 video latents are not finite")
        return super().run(stage, item, *inputs)


class BrokenGpu(RenderError):
    kind = ErrorKind.DEVICE


class CardBreaksOn(OnNodes):
    """Replicas load on every card, and every call on the second GPU of such a node breaks it."""

    def run(self, stage, item, *inputs):
        if self.differs and os.environ.get("CUDA_VISIBLE_DEVICES") == "1":
            raise BrokenGpu("CUDA error: an illegal memory access was encountered")
        return super().run(stage, item, *inputs)
