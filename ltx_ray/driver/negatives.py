"""The contexts of negative prompts, which most rows share: they travel once to a node, and not with every call.

The first item with a negative prompt carries its own context. For the next one, text returns it apart, and the driver
keeps it in the object store of its own node, which is lost only with the run. Later items refer to it there, and Ray
brings it to a node once. Stage 1 alone takes it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any

from ltx_ray.driver.tracker import TrackedItem
from ltx_ray.pools.protocol import ReplicaSet
from ltx_ray.records import Negative, WorkItem
from ltx_ray.sampling.passes import needs_negative
from ltx_ray.stages import Stage

#: Contexts that are kept, and prompts that are remembered; the oldest go first.
_MOST_CONTEXTS, _MOST_PROMPTS = 8, 64
#: How often a context is asked for, while calls that were asked have not ended.
_MOST_ASKED = 3
#: Calls for which a context that is kept is not given up for another one.
_LEAST_CALLS = 256


@dataclass
class _Kept:
    """The handle of a context, the node that computed it, and the last call that took it."""

    handle: Any
    node: str
    used: int


class NegativeContexts:
    """Decides with each call what becomes of its item's negative context.

    `wrong_nodes`: those that compute wrongly, whose contexts are not used again.
    """

    def __init__(self, replicas: ReplicaSet, wrong_nodes: Set[str] = frozenset()):
        self._replicas, self._wrong_nodes = replicas, wrong_nodes
        self._calls = 0
        #: By prompt, those used last at the end.
        self._contexts: OrderedDict[str, _Kept] = OrderedDict()
        self._met: OrderedDict[str, int] = OrderedDict()

    def call(self, tracked: TrackedItem, stage: Stage) -> tuple[WorkItem, list[Any]]:
        """The item and the inputs with which a call of `stage` is to be made."""
        item, inputs = tracked.item, tracked.inputs(stage)
        if stage == Stage.STAGE1 and tracked.negative is not None:
            return item, [*inputs, tracked.negative]
        if stage != Stage.TEXT or not needs_negative(item.request):
            return item, inputs
        prompt = item.request.negative_prompt
        tracked.negative = self._kept(prompt)
        negative = self._meet(prompt) if tracked.negative is None else Negative.LEFT_OUT
        return (item if negative == item.negative else replace(item, negative=negative)), inputs

    def _kept(self, prompt: str) -> Any:
        """The handle of a prompt's context; None when there is none to be used."""
        self._calls += 1
        kept = self._contexts.get(prompt)
        if kept is not None and kept.node in self._wrong_nodes:
            del self._contexts[prompt]
            kept = None
        if kept is None:
            return None
        self._contexts.move_to_end(prompt)
        kept.used = self._calls
        return kept.handle

    def _meet(self, prompt: str) -> Negative:
        if len(self._contexts) >= _MOST_CONTEXTS:
            oldest = next(iter(self._contexts.values()))
            if self._calls - oldest.used < _LEAST_CALLS:
                return Negative.WITHIN  # All that are kept are in use, and this one would drive another one out.
        times = self._met[prompt] = self._met.pop(prompt, 0) + 1
        if len(self._met) > _MOST_PROMPTS:
            self._met.popitem(last=False)
        return Negative.SEPARATE if 1 < times <= 1 + _MOST_ASKED else Negative.WITHIN

    def take(self, tracked: TrackedItem, packed: bytes, node: str) -> None:
        """A call of text on `node` has returned the context apart. Keep it."""
        prompt = tracked.item.request.negative_prompt
        if prompt not in self._contexts:
            self._contexts[prompt] = _Kept(self._replicas.share(packed), node, self._calls)
            self._met.pop(prompt, None)
            if len(self._contexts) > _MOST_CONTEXTS:
                self._contexts.popitem(last=False)
        tracked.negative = self._contexts[prompt].handle
