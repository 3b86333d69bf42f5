"""Latents that are not finite: the row's fault, or that of the node that made them.

The call is made once more on another node, uncharged. When the latents are finite there, the first node computes
wrongly and is excluded. Otherwise, and where there is no other node, the row is blamed.
"""

from __future__ import annotations

from collections.abc import Sequence

from ltx_ray.driver.policy import Policy
from ltx_ray.driver.staffing import Staffing
from ltx_ray.driver.tracker import TrackedItem
from ltx_ray.pools.exclusion import node_name
from ltx_ray.pools.protocol import RankInfo
from ltx_ray.stages import Stage


class SecondOpinions:
    """The items whose latents were not finite, and where that was."""

    def __init__(self, policy: Policy, staff: Staffing):
        self._policy, self._staff = policy, staff
        self._asked: dict[str, tuple[Stage, Sequence[RankInfo]]] = {}

    def ask(self, tracked: TrackedItem, replica: str, message: str, now: float) -> bool:
        """Have the call be made once more on another node. False when the row is to blame."""
        item, ranks = tracked.item.item_id, self._staff.ranks_of(replica)
        stage, has_others = self._policy.stage_of(item), bool(ranks) and self._staff.left_alone.has_others(ranks)
        if has_others and tracked.item.preflight:
            # It is the same clip whatever the manifest says. With the replica, its call goes back to the queue.
            self._staff.exclude(ranks, f"{stage} of the preflight clip was not finite there", now)
            return True
        asked = self._asked.pop(item, None)
        if not has_others or (asked is not None and asked[0] == stage) or not self._policy.try_elsewhere(item):
            return False
        self._asked[item] = stage, ranks
        self._staff.say(f"{tracked.name}: {stage} on {node_name(ranks)}: {message}; trying once on another node")
        return True

    def succeeded(self, tracked: TrackedItem, stage: Stage, now: float) -> None:
        """A call of `stage` has succeeded. When another node had failed at it, that one is excluded."""
        asked = self._asked.get(tracked.item.item_id) if self._asked else None
        if asked is None or asked[0] != stage:
            return
        del self._asked[tracked.item.item_id]
        _, ranks = asked
        if self._staff.left_alone.has_others(ranks):
            self._staff.exclude(ranks, f"{stage} of {tracked.name} was not finite there, and is on another node", now)
