"""A run without a number of replicas takes nodes that join its cluster later.

Nodes that were there when the run began are left to other jobs, whatever becomes free on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from ltx_ray.placement.output_pools import Node
from ltx_ray.placement.sizing import slots_needed
from ltx_ray.pools.pool import Pool
from ltx_ray.stages import DIFFUSION_STAGES, TRAITS

#: Seconds between two looks.
_PERIOD = 10.0


class Growth:
    """Adds replicas of the DiT for what is free on new nodes, and lets text and decode grow in proportion."""

    def __init__(self, pools: Sequence[Pool], free: Callable[[], Sequence[Node]], max_gpus: int | None):
        """`free`: what is free on each node that has joined. `max_gpus`: the most that all pools may take."""
        self._pools, self._free, self._max_gpus = pools, free, max_gpus
        self._dit = [pool for pool in pools if set(pool.spec.roles) & set(DIFFUSION_STAGES)]
        self._began_with = self._dit_ranks()
        self._most = {pool.spec.name: pool.spec.most for pool in pools if pool.spec.most is not None}
        self._looked = -math.inf

    def grow(self, placing: Callable[[], object], now: float) -> dict[str, int]:
        """By pool of the DiT that has grown, its new number of replicas. `placing`: the replicas without a place."""
        if now - self._looked < _PERIOD:
            return {}
        self._looked = now
        # What is missing takes free places first.
        if any(len(pool.replicas) < pool.spec.replicas for pool in self._dit) or placing():
            return {}
        before = {pool.spec.name: pool.spec.replicas for pool in self._dit}
        for node in self._free():
            self._fill(node)
        grown = {
            pool.spec.name: pool.spec.replicas for pool in self._dit if pool.spec.replicas > before[pool.spec.name]
        }
        if grown:
            self._raise_most()
        return grown

    def _fill(self, node: Node) -> None:
        """Add replicas of the DiT as long as they fit on a node, each to the stage that has the least for its work."""
        cpus, gpus = node.cpus, node.gpus
        while True:
            fitting = [
                pool
                for pool in self._dit
                # A rank that shares its card with text or decode takes a whole one nevertheless.
                if pool.spec.ranks <= gpus and pool.spec.ranks * pool.spec.cpus_per_rank <= cpus and self._allows(pool)
            ]
            if not fitting:
                return
            pool = min(fitting, key=_ranks_for_work)
            pool.spec = replace(pool.spec, replicas=pool.spec.replicas + 1)
            cpus, gpus = cpus - pool.spec.ranks * pool.spec.cpus_per_rank, gpus - pool.spec.ranks

    def _allows(self, pool: Pool) -> bool:
        taken = slots_needed([each.spec for each in self._pools]).gpus
        return self._max_gpus is None or taken + pool.spec.ranks <= self._max_gpus

    def _dit_ranks(self) -> int:
        return sum(pool.spec.replicas * pool.spec.ranks for pool in self._dit)

    def _raise_most(self) -> None:
        """Text and decode run beside the DiT, so that there are places for more of them."""
        times = self._dit_ranks() / self._began_with
        for pool in self._pools:
            # A card that they have to themselves does not grow.
            if pool.spec.name in self._most and all(dit.spec.gpus_per_rank < 1 for dit in self._dit):
                pool.spec = replace(pool.spec, most=int(self._most[pool.spec.name] * times))


def _ranks_for_work(pool: Pool) -> float:
    """Ranks for a second of the stage in which a pool's replicas begin."""
    stage = next(role for role in pool.spec.roles if role in DIFFUSION_STAGES)
    return pool.spec.replicas * pool.spec.ranks / TRAITS[stage].seconds
