"""Latents that are not finite: the row's fault, or that of the node that made them.

The call is made once more on another node, uncharged. When the latents are finite there, the first node computes
wrongly and is excluded. Otherwise, and where there is no other node, the row is blamed.
"""

from __future__ import annotations

from collections.abc import Sequence

from ltx_ray.driver.policy import Policy
from ltx_ray.driver.staffing import Staffing
from ltx_ray.pools.exclusion import node_name
from ltx_ray.pools.protocol import RankInfo
from ltx_ray.stages import Stage


class SecondOpinions:
    """The items whose latents were not finite, and where that was."""

    def __init__(self, policy: Policy, staff: Staffing):
        self._policy, self._staff = policy, staff
        self._asked: dict[str, tuple[Stage, Sequence[RankInfo]]] = {}

    def ask(self, item: str, replica: str) -> str | None:
        """Have the item's call made once more on another node; where it was made, or None when the row is to blame."""
        stage, ranks = self._policy.stage_of(item), self._staff.ranks_of(replica)
        if not ranks or self._asked.get(item, ("",))[0] == stage or not self._policy.try_elsewhere(item):
            return None
        self._asked[item] = stage, ranks
        return node_name(ranks)

    def succeeded(self, item: str, stage: Stage, name: str, now: float) -> None:
        """A call of `stage` has succeeded. When another node had failed at it, that one is excluded."""
        if not self._asked or self._asked.get(item, ("",))[0] != stage:
            return
        _, ranks = self._asked.pop(item)
        if self._staff.left_alone.has_others(ranks):
            self._staff.exclude(ranks, f"{stage} of {name} was not finite there, and is on another node", now)

    def forget(self, item: str) -> None:
        """The item has ended."""
        self._asked.pop(item, None)
