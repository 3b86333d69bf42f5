"""How many replicas the pools of text and decode should have, by the seconds of their calls and by their queues.

The DiT decides how many clips an hour a run can make. The other pools have to keep up with it, with some headroom. What
the DiT needs for a clip, and what a call of text or decode takes, is measured all the time (`Policy.seconds`). When a
stage waits for a pool nevertheless, because clips differ or because many resume after stage 1, the pool grows as well.
It shrinks when it has been far too large for a while.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ltx_ray.driver.policy import Policy
from ltx_ray.driver.waits import Waits, WaitWindow
from ltx_ray.placement.output_pools import HEADROOM
from ltx_ray.pools.pool import Pool
from ltx_ray.stages import DIFFUSION_STAGES

#: Seconds between two looks.
_PERIOD = 10.0
#: A pool grows when a stage waits for it for more than this part of the time, at this many looks in a row.
_WAITED, _LOOKS = 0.02, 2
#: By which part it grows then.
_GROWTH = 0.25
#: A pool shrinks once it has had this many times the replicas that it needs, for this many seconds.
_OVERSIZE, _SHRINK_SECONDS = 3.0, 180.0


@dataclass
class _Sizing:
    #: The fewest replicas, since the pool had to grow beyond what the seconds of its calls tell; until then.
    least: int = 1
    least_until: float = -math.inf
    #: Looks in a row at which a stage waited for it.
    waited: int = 0
    #: Since when it has been too large.
    oversized_since: float | None = None


class PoolSizer:
    """Decides the number of replicas of each pool that has no fixed one."""

    def __init__(self, policy: Policy, waits: Waits):
        self._policy, self._window = policy, WaitWindow(waits)
        self._sizings: dict[str, _Sizing] = {}
        self._looked = -math.inf
        #: By pool, the replicas that would be busy all the time, at the last look.
        self.needs: dict[str, float] = {}

    def sizes(self, pools: Sequence[Pool], now: float) -> dict[str, int]:
        """By pool whose number of replicas should change, the new one."""
        if now - self._looked < _PERIOD:
            return {}
        self._looked = now
        waited = self._window.read()
        sizes = {}
        for pool in pools:
            if pool.spec.most is None:
                continue
            need = self._need(pool, pools)
            if need is not None:
                self.needs[pool.spec.name] = need
            size = self._size(pool, need, waited.of(*pool.spec.roles), now)
            if size != pool.spec.replicas:
                sizes[pool.spec.name] = size
        return sizes

    def _need(self, pool: Pool, pools: Sequence[Pool]) -> float | None:
        """Replicas of `pool` that would be busy all the time; None before its stage and the DiT have been measured."""
        policy = self._policy
        stage = next((stage for stage in policy.path if stage in pool.spec.roles), None)
        if stage is None or (seconds := policy.measured_seconds(stage)) is None:
            return None
        clips = self._clips_per_second(pools)
        return None if clips is None else clips * seconds

    def _clips_per_second(self, pools: Sequence[Pool]) -> float | None:
        """What the replicas of the DiT can make, at whatever stages they are now."""
        stages = [stage for stage in self._policy.path if stage in DIFFUSION_STAGES]
        seconds = {stage: self._policy.measured_seconds(stage) for stage in stages}
        measured = {stage: value for stage, value in seconds.items() if value is not None}
        if len(measured) < len(stages) or not measured:
            return None
        dit = [pool.spec for pool in pools if set(pool.spec.roles) & set(DIFFUSION_STAGES)]
        if all(set(stages) <= set(spec.roles) for spec in dit):
            return sum(spec.replicas for spec in dit) / sum(measured.values())
        serving = {stage: sum(spec.replicas for spec in dit if stage in spec.roles) for stage in stages}
        return min(serving[stage] / measured[stage] for stage in stages)

    def _size(self, pool: Pool, need: float | None, waited: float, now: float) -> int:
        sizing = self._sizings.setdefault(pool.spec.name, _Sizing())
        size, most = pool.spec.replicas, pool.spec.most
        assert most is not None
        wanted = size if need is None else math.ceil(HEADROOM * need)
        sizing.waited = sizing.waited + 1 if waited > _WAITED and pool.ready >= size else 0
        if sizing.waited >= _LOOKS:
            # All are there, and do not suffice. What has been measured is too little for some reason.
            sizing.waited = 0
            sizing.least, sizing.least_until = size + max(1, int(_GROWTH * size)), now + 10 * _SHRINK_SECONDS
        if now < sizing.least_until:
            wanted = max(wanted, sizing.least)
        wanted = min(max(wanted, 1), most)
        if size <= _OVERSIZE * wanted:
            sizing.oversized_since = None
            return max(size, wanted)
        if sizing.oversized_since is None:
            sizing.oversized_since = now
        return wanted if now - sizing.oversized_since > _SHRINK_SECONDS else size
