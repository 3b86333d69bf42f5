"""How long the work that is left takes, in seconds of the stages as they were measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import TypeAlias

from ltx_ray.driver.policy import Policy
from ltx_ray.driver.tracker import RowTracker
from ltx_ray.pools.pool import Pool
from ltx_ray.records import RenderRequest, WorkItem
from ltx_ray.stages import Stage

#: Calls of a stage before its seconds mean something: the first one of a replica also warms it up.
_LEAST_CALLS = 2
#: Sizes of clips that are measured, for each stage together. Those of further ones follow from these.
_MOST_SIZES = 1000

#: The deadline of a call, as a multiple of what such calls usually take, and the least in seconds.
_DEADLINE_TIMES, _LEAST_DEADLINE = 8.0, 300.0

#: A stage, and what decides how long it takes for a clip, apart from guidance: pipeline, height, width, frames, steps.
_Kind: TypeAlias = tuple[Stage, str, int, int, int, int]


def _kind(stage: Stage, request: RenderRequest) -> _Kind:
    r = request
    return stage, r.pipeline, r.height, r.width, r.num_frames, r.num_inference_steps


def _units(kind: _Kind) -> float:
    """How the seconds of a stage grow with the clip, for sizes that were not measured."""
    stage, _, height, width, frames, steps = kind
    if stage in (Stage.TEXT, Stage.LOAD_LATENTS, Stage.SAVE_LATENTS):
        return 1.0
    return float(height * width * frames * (steps if stage == Stage.STAGE1 else 1))


class WorkLeft:
    """Measures the stages, and says how long a set of items takes."""

    def __init__(self) -> None:
        #: [calls, their seconds] by kind.
        self._measured: dict[_Kind, list[float]] = {}

    def measured(self, stage: Stage, item: WorkItem, seconds: float) -> None:
        """A call has succeeded in this time, merging included. The preflight clip is not like others."""
        if item.preflight:
            return
        kind = _kind(stage, item.request)
        sums = self._measured.get(kind)
        if sums is not None:
            sums[0] += 1
            sums[1] += seconds
        elif len(self._measured) < _MOST_SIZES:
            self._measured[kind] = [1, seconds]

    def usual_seconds(self, stage: Stage, item: WorkItem) -> float | None:
        """The mean seconds of a stage for clips of this size; None before it has been measured often enough."""
        calls, seconds = self._measured.get(_kind(stage, item.request), (0, 0.0))
        return seconds / calls if calls >= _LEAST_CALLS else None

    def deadline(self, stage: Stage, item: WorkItem, most: float) -> float:
        """Seconds that a call may take: a multiple of what its stage and size usually take, once that is known."""
        usual = self.usual_seconds(stage, item)
        return most if usual is None else min(most, max(_LEAST_DEADLINE, _DEADLINE_TIMES * usual))

    def _seconds_of_units(self) -> dict[Stage, float]:
        """Seconds of a unit, by stage, of stages that have been measured often enough."""
        calls, units, seconds = (defaultdict[Stage, float](float) for _ in range(3))
        for kind, (count, spent) in self._measured.items():
            calls[kind[0]] += count
            units[kind[0]] += count * _units(kind)
            seconds[kind[0]] += spent
        return {stage: seconds[stage] / units[stage] for stage in calls if calls[stage] >= _LEAST_CALLS}

    def in_flight(
        self, tracker: RowTracker, policy: Policy, pools: Iterable[Pool], call_began: Mapping[str, float], now: float
    ) -> float | None:
        """Seconds that a run still takes; None while rows are still read, or when some will be left.

        `call_began`: by item under way, in the time of `now`.
        """
        if not tracker.exhausted or policy.draining:
            return None
        spent = {item: now - call_began[item] for item in policy.running}
        items = (
            (tracked.item, policy.remaining_path(name), spent.get(name, 0.0))
            for name, tracked in tracker.items.items()
            if tracked.outcome is None
        )
        return self.left(items, ((pool.spec.roles, pool.ready) for pool in pools))

    def left(
        self,
        items: Iterable[tuple[WorkItem, tuple[Stage, ...], float]],
        serving: Iterable[tuple[Iterable[Stage], int]],
    ) -> float | None:
        """Seconds until `items` are done: (item, the stages that are left, seconds in the first of them).

        `serving`: the stages that replicas may serve, and how many of them do. Work is shared by all replicas that may
        do it, whatever stage they are at now, so that a turn of roles changes nothing. No item is faster than its own
        stages. None without items, without a replica for a stage, or before a stage has been measured.
        """
        work: defaultdict[Stage, float] = defaultdict(float)
        longest = 0.0
        of_units = self._seconds_of_units()
        for item, path, spent in items:
            own = 0.0
            for stage in path:
                if stage not in of_units:
                    return None
                kind = _kind(stage, item.request)
                count, total = self._measured.get(kind, (1, of_units[stage] * _units(kind)))
                seconds, spent = max(total / count - spent, 0.0), 0.0
                work[stage] += seconds
                own += seconds
            longest = max(longest, own)
        pools = [(frozenset(roles), count) for roles, count in serving]
        bounds = [longest]
        for number in range(1, len(work) + 1):
            for stages in combinations(work, number):
                replicas = sum(count for roles, count in pools if not roles.isdisjoint(stages))
                if not replicas:
                    return None
                bounds.append(sum(work[stage] for stage in stages) / replicas)
        return max(bounds) or None
