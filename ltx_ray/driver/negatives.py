"""The contexts of negative prompts, which most rows share: they travel once to a node, and not with every call.

The first item with a negative prompt carries its own context. For the next one, text returns it apart, and the driver
keeps it in the object store of its own node, which is lost only with the run. Later items refer to it there, and Ray
brings it to a node once. Stage 1 alone takes it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

from ltx_ray.driver.tracker import TrackedItem
from ltx_ray.pools.protocol import ReplicaSet
from ltx_ray.records import CallReport, Negative, WorkItem
from ltx_ray.sampling.passes import Pass, passes_for
from ltx_ray.stages import Stage

#: Contexts that are kept, and prompts that are remembered; the oldest go first.
_MOST_CONTEXTS, _MOST_PROMPTS = 8, 64
#: How often a context is asked for, while calls that were asked have not ended.
_MOST_ASKED = 3


class NegativeContexts:
    """Decides with each call what becomes of its item's negative context."""

    def __init__(self, replicas: ReplicaSet):
        self._replicas = replicas
        #: By prompt.
        self._contexts: OrderedDict[str, Any] = OrderedDict()
        self._met: OrderedDict[str, int] = OrderedDict()

    def call(self, tracked: TrackedItem, stage: Stage) -> tuple[WorkItem, list[Any]]:
        """The item and the inputs with which a call of `stage` is to be made."""
        inputs = tracked.inputs(stage)
        if stage == Stage.STAGE1 and tracked.negative is not None:
            return tracked.item, [*inputs, tracked.negative]
        if stage != Stage.TEXT or Pass.UNCOND not in passes_for(tracked.item.request.guidance):
            return tracked.item, inputs
        prompt = tracked.item.request.negative_prompt
        tracked.negative = self._contexts.get(prompt)
        if tracked.negative is not None:
            self._contexts.move_to_end(prompt)
            return replace(tracked.item, negative=Negative.LEFT_OUT), inputs
        return replace(tracked.item, negative=self._meet(prompt)), inputs

    def _meet(self, prompt: str) -> Negative:
        times = self._met[prompt] = self._met.pop(prompt, 0) + 1
        if len(self._met) > _MOST_PROMPTS:
            self._met.popitem(last=False)
        return Negative.SEPARATE if 1 < times <= 1 + _MOST_ASKED else Negative.WITHIN

    def take(self, tracked: TrackedItem, report: CallReport) -> None:
        """A call has succeeded. Keep the context that text has returned apart."""
        if (packed := report.facts.negative) is None:
            return
        prompt = tracked.item.request.negative_prompt
        if prompt not in self._contexts:
            self._contexts[prompt] = self._replicas.share(packed)
            self._met.pop(prompt, None)
            if len(self._contexts) > _MOST_CONTEXTS:
                self._contexts.popitem(last=False)
        tracked.negative = self._contexts[prompt]
