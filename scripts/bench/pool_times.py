"""How busy each pool of a run was, and why it was idle, from the run's events.

Everything is counted from the first stage-1 call to the end of the last clip's decoding.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ltx_ray.config import RunLimits

#: The stages of a clip, upstream first.
STAGES = ("text", "stage1", "stage2", "decode")
#: Why a replica had no call.
LOADING, READY, NEXT_FULL, NO_CLIP_LEFT = "loading", "a clip was ready", "the next queue was full", "no clip left"


def waited_for(stage: str) -> str:
    """The reason of a replica whose clips were all still at an earlier stage, of which `stage` was the last."""
    return f"its clips were in {stage}"


@dataclass(frozen=True)
class Call:
    """A call of a replica for a clip, from `begin` to `end` in seconds since the epoch."""

    pool: str
    replica: str
    stage: str
    clip: str
    begin: float
    end: float


@dataclass(frozen=True)
class PoolTimes:
    """Seconds of a pool, summed over its replicas; `idle` by reason."""

    replicas: int
    calls: int
    busy: float
    idle: Mapping[str, float]

    @property
    def idle_share(self) -> float:
        idle = sum(self.idle.values())
        return idle / (self.busy + idle)


@dataclass(frozen=True)
class LineTimes:
    """Figures of a run. `span`: its seconds; `stages`: median seconds of a call by stage, merging included.

    `switches` and `merging`: how often a replica of the DiT merged other weights, and the seconds of that, which are
    a part of the calls'.
    """

    clips: int
    span: float
    pools: Mapping[str, PoolTimes]
    stages: Mapping[str, float]
    switches: int
    merging: float

    @property
    def clips_per_hour(self) -> float:
        return 3600 * self.clips / self.span


def read_line(events: Iterable[Mapping[str, Any]], clips: int) -> LineTimes:
    """The figures of a run of `clips` clips that all succeeded.

    Raises RuntimeError when a gang was lost or given back, since the pool then had fewer replicas for a while.
    """
    events = list(events)
    for event in events:
        if event["event"] in ("gang_lost", "gang_given_back"):
            raise RuntimeError(f"{event['replica']} ended before the run did: {event['reason']}")
    calls = [
        Call(e["role"], e["replica"], e["stage"], e["item_id"], e["start"], e["start"] + e["seconds"])
        for e in events
        if e["event"] == "call"
    ]
    made = Counter(call.stage for call in calls)
    assert all(made[stage] == clips for stage in STAGES), f"{dict(made)} calls for {clips} clips"
    begin = min(call.begin for call in calls if call.stage == "stage1")
    end = max(call.end for call in calls if call.stage == "decode")
    started = {(e["role"], e["replica"]): e["t"] for e in events if e["event"] == "gang_started"}
    switches = [e["seconds"] for e in events if e["event"] == "switch"]
    return LineTimes(
        clips,
        end - begin,
        {pool: _pool_times(pool, calls, started, begin, end) for pool in dict.fromkeys(pool for pool, _ in started)},
        {stage: median(call.end - call.begin for call in calls if call.stage == stage) for stage in STAGES},
        len(switches),
        sum(switches),
    )


def _pool_times(
    pool: str, calls: Sequence[Call], started: Mapping[tuple[str, str], float], begin: float, end: float
) -> PoolTimes:
    clips = _Clips(calls)
    stages = {call.stage for call in calls if call.pool == pool}
    edges = sorted({begin, end, *started.values(), *(time for call in calls for time in (call.begin, call.end))})
    edges = [time for time in edges if begin <= time <= end]
    idle: defaultdict[str, float] = defaultdict(float)
    busy = 0.0
    replicas = [replica for role, replica in started if role == pool]
    for replica in replicas:
        own = [call for call in calls if call.pool == pool and call.replica == replica]
        # Between neighbouring edges nothing begins or ends, so that what holds in the middle holds throughout.
        for since, until in itertools.pairwise(edges):
            at = (since + until) / 2
            if any(call.begin <= at < call.end for call in own):
                busy += until - since
            else:
                reason = LOADING if at < started[pool, replica] else clips.why_idle(stages, at)
                idle[reason] += until - since
    return PoolTimes(len(replicas), sum(call.pool == pool for call in calls), busy, dict(idle))


class _Clips:
    """Where each clip was at any time."""

    def __init__(self, calls: Iterable[Call]):
        self._clips: dict[str, dict[str, Call]] = {}
        for call in calls:
            self._clips.setdefault(call.clip, {})[call.stage] = call

    def why_idle(self, stages: set[str], at: float) -> str:
        """Why a replica that serves `stages` had no call at a time."""
        places = [place for clip in self._clips.values() if (place := self._place(clip, stages, at)) is not None]
        if not places:
            return NO_CLIP_LEFT
        ready = {stage for stage, waits in places if waits and stage in stages}
        if not ready:
            return waited_for(max((stage for stage, _ in places), key=STAGES.index))
        following = {STAGES[STAGES.index(stage) + 1] for stage in ready if stage != STAGES[-1]}
        # Events do not say which stage a replica of both serves, so that the queue of one replica counts as full.
        full = {stage for stage in following - stages if self._waiting(stage, at) >= RunLimits.queue_depth}
        return NEXT_FULL if len(full) == len(ready) else READY

    @staticmethod
    def _place(clip: Mapping[str, Call], stages: set[str], at: float) -> tuple[str, bool] | None:
        """The stage that a clip was at, and whether it waited there; None when none of `stages` was ahead of it."""
        if not any(clip[stage].begin > at for stage in stages):
            return None
        stage = next(stage for stage in STAGES if clip[stage].end > at)
        return stage, clip[stage].begin > at

    def _waiting(self, stage: str, at: float) -> int:
        before = STAGES[STAGES.index(stage) - 1]
        return sum(clip[before].end <= at < clip[stage].begin for clip in self._clips.values())
