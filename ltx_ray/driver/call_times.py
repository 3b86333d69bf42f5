"""How long calls take, as the policy reckons with them: it has no clock, and is told what was measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ltx_ray.stages import DIFFUSION_STAGES, TRAITS, Stage

#: Weight of the newest measurement in a running mean.
_NEWEST = 0.1
#: Seconds of a switch until one has been measured: one H100, the released model.
SWITCH_SECONDS = 1.5
#: A call is late after this multiple of the usual seconds of its stage, plus two switches.
LATE_TIMES = 4.0


@dataclass
class RunningMean:
    """A running mean that starts from a guess and drops it at the first measurement."""

    value: float
    measured: bool = False

    def add(self, value: float) -> None:
        self.value = value if not self.measured else (1 - _NEWEST) * self.value + _NEWEST * value
        self.measured = True

    @classmethod
    def guesses(cls, trait: str) -> dict[Stage, RunningMean]:
        """By stage, the mean of a trait that is guessed from the released model."""
        return {stage: cls(getattr(traits, trait)) for stage, traits in TRAITS.items()}


def calls_per_second(
    calls: Mapping[tuple[Stage, Stage | None], int],
    seconds: Mapping[Stage, RunningMean],
    stages: Collection[Stage | None],
    following: Stage,
) -> float:
    """How many of the calls of `stages` end per second; without any, of those after which `following` comes.

    `calls` are counted by their stage and the stage after it.
    """
    chosen = (
        (stage, count) for (stage, after), count in calls.items() if (stage in stages if stages else after == following)
    )
    return sum(count / seconds[stage].value for stage, count in chosen)


def switch_seconds(switch: RunningMean, seconds: Mapping[Stage, RunningMean]) -> float:
    """What a replica takes to merge other weights."""
    if switch.measured:
        return switch.value
    # The guess is scaled like a clip: the speed of this model and machine shows before the first switch.
    measured = sum(seconds[stage].value for stage in DIFFUSION_STAGES)
    return switch.value * measured / sum(TRAITS[stage].seconds for stage in DIFFUSION_STAGES)
