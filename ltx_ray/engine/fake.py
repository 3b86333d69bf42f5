"""An engine for tests of scheduling and failure: the same protocol, deterministic, without a model or torch.

A prompt may contain orders `[[stage:order]]`:

* `[[stage1:crash]]`, `[[stage2:crash:2]]`: the process dies, in the second example on the first two attempts only
* `[[decode:hang]]`: the call never returns
* `[[text:slow:0.5]]`, `[[text:slow:60:1]]`: it takes this many seconds, in the second example on the first attempt only
* `[[stage1:row]]`: the row is at fault; `[[stage1:error]]`: any other exception
* `[[stage1:store]]`: a store does not answer; `[[stage1:full]]`: its disk is full; `[[stage1:memory]]`: out of memory
* `[[stage1:model]]`: a file of the model cannot be used
* `[[load_latents:gone]]`: there are no stored latents
* `[[stage1:lone]]`: the last rank of several fails; `[[stage1:stuck]]`: it hangs
* `[[stage1:gate]]`, `[[stage1:gate:2]]`: the call waits until `open_gate` opens that gate
* `[[stage1:big]]`: the result has 1 MB, too much to travel with the report

Attempts are counted in files below the output, so that the count outlives the process.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from typing import Any

from ltx_ray.config import EngineSpec
from ltx_ray.dataset.clips import ClipMetadata, publish_clip
from ltx_ray.dataset.layout import clip_path, latents_path, preview_path
from ltx_ray.engine.base import Rank
from ltx_ray.parallel.rendezvous import Rendezvous
from ltx_ray.records import Clip, EngineFacts, ModelError, RowError, StoredLatentsGone, WorkItem
from ltx_ray.stages import TRAITS, Stage
from ltx_ray.storage.locations import join
from ltx_ray.storage.store import Store

_ORDER = re.compile(r"\[\[(\w+):(\w+)(?::([\d.]+))?(?::(\d+))?\]\]")
_MOOV = re.compile(rb"moov([0-9a-f]{32}) ([0-9a-f]{64})")
#: Characters of a big result.
_BIG = 2**20
#: A gate is open once this file exists, which ends in its number.
_GATE = "_fake/open"


class FakeEngine:
    """Serves every stage. Results are hashes that depend on the request and on earlier results alone."""

    def __init__(self, spec: EngineSpec, rank: Rank):
        self.spec, self.rank = spec, rank
        self.facts = EngineFacts()
        self.switches, self.switch_seconds = 0, 0.0
        self._merged_stage: Stage | None = None

    @staticmethod
    def join_gang(device: str, rank: int, world: int, rendezvous: Rendezvous | None, timeout: float) -> str:
        return "cpu"

    def load(self) -> None:
        self.store = Store(self.spec.output)

    def run(self, stage: Stage, item: WorkItem, *inputs: Any) -> Any:
        self._follow_orders(stage, item)
        if TRAITS[stage].merges_weights and stage != self._merged_stage:
            self._merged_stage, self.switches = stage, self.switches + 1
        inputs = tuple(value.strip() for value in inputs)
        if stage == Stage.LOAD_LATENTS:
            return self._load_latents(item)
        if stage == Stage.SAVE_LATENTS:
            return join(self.store.name, self._save_latents(item, inputs))
        result = hashlib.sha256(f"{stage}:{item.item_id}:{inputs}".encode()).hexdigest()
        if stage == Stage.DECODE:
            return self._publish(item, result, inputs)
        if f"[[{stage}:big]]" in item.request.prompt:
            result = result.ljust(_BIG)
        return result if self.rank.rank == 0 else None

    def _publish(self, item: WorkItem, result: str, inputs: tuple[str, ...]) -> Clip:
        clip = mp4_boxes(item.item_id, result)
        sha256 = hashlib.sha256(clip).hexdigest()
        if item.preflight:
            return Clip(None, sha256, result, (), "stage_1")
        if self.spec.save_latents or self.spec.stop_after:
            self._save_latents(item, inputs)
        path = preview_path(item.item_id) if self.spec.stop_after else clip_path(item.item_id)
        return publish_clip(self.store, Clip(path, sha256, result, (), "stage_1"), item.item_id, clip, read_metadata)

    def _save_latents(self, item: WorkItem, stages: tuple[str, ...]) -> str:
        """Store the results of `stages` where the real engine stores latents; returns the path in the output."""
        path = latents_path(item.item_id)
        self.store.write_bytes(path, "\n".join(stages).encode())
        return path

    def _load_latents(self, item: WorkItem) -> str:
        try:
            return self.store.read_bytes(latents_path(item.item_id)).decode().splitlines()[0]
        except FileNotFoundError as error:
            raise StoredLatentsGone(f"{latents_path(item.item_id)}: no such file") from error

    def _follow_orders(self, stage: Stage, item: WorkItem) -> None:
        for ordered_stage, order, number, slow_attempts in _ORDER.findall(item.request.prompt):
            if ordered_stage != stage:
                continue
            if order == "slow":
                if not slow_attempts or self.count_attempt(stage, item) <= int(slow_attempts):
                    time.sleep(float(number or 0.2))
            elif order == "gate":
                self.store.write_bytes(f"_fake/at-{item.item_id}-{stage}-{self.rank.rank}", b"")
                while not self.store.exists(_GATE + number):
                    time.sleep(0.05)
            elif number and self.count_attempt(stage, item) > int(number):
                continue
            elif order == "crash":
                os._exit(1)
            elif order == "hang":
                time.sleep(3600)
            elif order == "row":
                raise RowError(f"{stage}: this row was told to fail")
            elif order == "model":
                raise ModelError(f"{stage}: this call was told that a LoRA cannot be used")
            elif order == "store":
                raise OSError(f"{stage}: this call was told that the store is gone")
            elif order == "full":
                raise OSError(errno.ENOSPC, f"{stage}: this call was told that the disk is full")
            elif order == "memory":
                raise MemoryError(f"{stage}: this call was told that memory is out")
            elif order == "gone":
                raise StoredLatentsGone(f"{stage}: this call was told that there are none")
            elif order == "error":
                raise RuntimeError(f"{stage}: this call was told to fail")
            elif order == "lone" and self.rank.rank == self.rank.world - 1:
                raise RuntimeError(f"{stage}: this rank was told to fail alone")
            elif order == "stuck" and self.rank.rank == self.rank.world - 1:
                time.sleep(3600)

    def count_attempt(self, stage: Stage, item: WorkItem) -> int:
        """The number of this attempt, from 1."""
        name = f"_fake/{item.item_id}-{stage}-{self.rank.rank}"
        attempt = 1 + (int(self.store.read_bytes(name)) if self.store.exists(name) else 0)
        self.store.write_bytes(name, str(attempt).encode())
        return attempt


def open_gate(output: str, number: str = "") -> None:
    """Let all calls of a run into `output` pass the gate, those that wait there now and those that come later."""
    Store(output).write_bytes(_GATE + number, b"")


def mp4_boxes(item_id: str, content: str) -> bytes:
    """An mp4 that does not play, with the boxes by which a check sees that a clip is whole and which item it is of."""
    contents = {b"ftyp": b"isom", b"moov": f"{item_id} {content}".encode(), b"mdat": content.encode()}
    return b"".join((8 + len(content)).to_bytes(4) + kind + content for kind, content in contents.items())


def read_metadata(data: bytes) -> ClipMetadata | None:
    """What `mp4_boxes` has been told; None for other bytes."""
    if (match := _MOOV.search(data)) is None:
        return None
    item_id, content = match.groups()
    return ClipMetadata(item_id.decode(), content.decode())
