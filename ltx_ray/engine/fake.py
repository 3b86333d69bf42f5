"""An engine for tests of scheduling and failure: the same protocol, deterministic, no model and no torch.

A prompt may carry orders such as `[[stage1:crash]]`, `[[stage2:crash:2]]` (the first two tries only),
`[[decode:hang]]`, `[[text:slow:0.5]]` (seconds), `[[stage1:row]]` (the row is at fault), `[[stage1:error]]`
(any other exception), `[[stage1:store]]` (a store that does not answer), `[[stage1:lone]]` (one rank of
several fails). Tries are counted by files under the output, so that they outlive the process.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from typing import Any

from ltx_ray.config import EngineSpec
from ltx_ray.engine.base import Rank
from ltx_ray.records import Clip, RowError, WorkItem
from ltx_ray.storage import Store

_ORDER = re.compile(r"\[\[(\w+):(\w+)(?::([\d.]+))?\]\]")


class FakeEngine:
    """Serves every stage. Results are hashes that depend on the request and on earlier results alone."""

    def __init__(self, spec: EngineSpec, rank: Rank):
        self.spec, self.rank = spec, rank
        self.info: dict[str, Any] = {}
        self.switches, self.switch_seconds = 0, 0.0
        self._phase: str | None = None

    @staticmethod
    def join(device: str, rank: int, world: int, rendezvous: tuple[str, int] | None, timeout: float) -> str:
        return "cpu"

    def load(self) -> None:
        self.store = Store(self.spec.output)
        if self.spec.options.get("fail_to_load"):
            raise RuntimeError("this engine was told not to load")

    def run(self, stage: str, item: WorkItem, *inputs: Any) -> Any:
        self._obey(stage, item)
        if stage in ("stage1", "stage2") and stage != self._phase:
            self._phase, self.switches = stage, self.switches + 1
        made = hashlib.sha256(f"{stage}:{item.item_id}:{inputs}".encode()).hexdigest()
        if stage != "decode":
            return made if self.rank.rank == 0 else None
        path = f"clips/{item.item_id[:2]}/{item.item_id}.mp4"
        clip = _boxes(item.item_id, made)
        self.store.write_bytes(path, clip)
        return Clip(path, hashlib.sha256(clip).hexdigest(), made, (), "stage_1")

    def _obey(self, stage: str, item: WorkItem) -> None:
        for where, order, number in _ORDER.findall(item.request.prompt):
            if where != stage:
                continue
            if order == "slow":
                time.sleep(float(number or 0.2))
            elif number and self._tries(stage, item) > int(number):
                continue
            elif order == "crash":
                os._exit(1)
            elif order == "hang":
                time.sleep(3600)
            elif order == "row":
                raise RowError(f"{stage}: this row was told to fail")
            elif order == "store":
                raise OSError(f"{stage}: this call was told that the store is gone")
            elif order == "error":
                raise RuntimeError(f"{stage}: this call was told to fail")
            elif order == "lone" and self.rank.rank == self.rank.world - 1:
                raise RuntimeError(f"{stage}: this rank was told to fail alone")

    def _tries(self, stage: str, item: WorkItem) -> int:
        name = f"_fake/{item.item_id}-{stage}-{self.rank.rank}"
        tries = 1 + (int(self.store.read_bytes(name)) if self.store.exists(name) else 0)
        self.store.write_bytes(name, str(tries).encode())
        return tries


def _boxes(item_id: str, made: str) -> bytes:
    """The boxes of an mp4, for those who check that a clip is whole and whose it is; it does not play."""
    contents = {b"ftyp": b"isom", b"moov": item_id.encode(), b"mdat": made.encode()}
    return b"".join((8 + len(content)).to_bytes(4) + kind + content for kind, content in contents.items())
