"""An engine that sleeps, and whose workers import next to nothing, so that hundreds of them fit on one machine."""

from __future__ import annotations

import os
import time
from typing import Any

from ltx_ray.parallel.rendezvous import Rendezvous
from ltx_ray.records import Clip, EngineFacts
from ltx_ray.stages import TRAITS, Stage

#: The environment variable with the factor by which stages are faster than those of an HQ clip on an H100.
SPEEDUP = "LTX_RAY_BENCH_SPEEDUP"


class IdleEngine:
    """Serves every stage, with the protocol of ltx_ray/engine/base.py."""

    def __init__(self, spec: Any, rank: Any):
        self.facts = EngineFacts()

    @staticmethod
    def join_gang(device: str, rank: int, world: int, rendezvous: Rendezvous | None, timeout: float) -> str:
        """No torch."""
        return device

    def load(self) -> None:
        pass

    def run(self, stage: Stage, item: Any, *inputs: Any) -> Any:
        time.sleep(TRAITS[stage].seconds / float(os.environ[SPEEDUP]))
        name = item.item_id
        return (
            Clip(f"clips/{name[:2]}/{name}.mp4", name * 2, name * 2, (), "stage_1") if stage == Stage.DECODE else name
        )
