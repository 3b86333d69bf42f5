"""What a run is busy with, in the words of its progress line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from ltx_ray.dataset.run_summary import wait_lines
from ltx_ray.driver.policy import Policy
from ltx_ray.pools.pool import Pool


def activity(policy: Policy, pools: Iterable[Pool], shares: Mapping[str, Mapping[str, float]]) -> str:
    """`stage1 2, stage2 1, 3 gangs starting, stage2 waits for decode 63% of the time`. `shares` as of WaitReport."""
    running = Counter(map(policy.stage_of, policy.running))
    starting = sum(len(pool.replicas) - pool.ready for pool in pools)
    busy = [f"{stage} {n}" for stage, n in sorted(running.items())]
    return ", ".join([*busy, *([f"{starting} gangs starting"] if starting else []), *wait_lines(shares)[:1]])
