"""What a crew of replicas tells the driver, and what the driver may ask of it. No Ray here.

A crew holds the gangs of a run: on a Ray cluster (`crew.RayCrew`), or in virtual time (`simulated.SimulatedCrew`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ltx_ray.config import PoolSpec
from ltx_ray.records import CallReport, WorkItem


@dataclass(frozen=True)
class ReplicaStarted:
    """A replica is ready. `ranks`: a dict a rank with rank, pid, node, device and device_name."""

    replica: str
    ranks: Sequence[Mapping[str, Any]]
    seconds: float


@dataclass(frozen=True)
class CallFinished:
    """A call came back from all ranks alike; `report` is that of rank 0, `payload` a handle of its result."""

    replica: str
    report: CallReport
    payload: Any
    #: Rank 0 with its node and device, for messages.
    where: str = ""


@dataclass(frozen=True)
class ReplicaLost:
    """A replica is of no more use; it has been killed. `inputs_lost`: because results of earlier stages are gone."""

    replica: str
    reason: str
    #: Whether it had been ready; otherwise it failed to start.
    served: bool
    inputs_lost: bool = False
    #: Whether it died before the call under way had reached it, so that the item is not to blame.
    idle: bool = False
    #: Whether its node is gone: most often taken away, with whatever ran there.
    node_lost: bool = False


@dataclass(frozen=True)
class InputsLost:
    """Results of earlier stages that a call needs are gone; the replica lives."""

    replica: str
    reason: str


ReplicaEvent = ReplicaStarted | CallFinished | ReplicaLost | InputsLost


class ReplicaSet(Protocol):
    """The replicas of a run, by name. Only `wait` blocks."""

    def start(self, name: str, spec: PoolSpec) -> None:
        """Begin to bring a replica up; `ReplicaStarted` or `ReplicaLost` says how that ended."""

    def submit(self, replica: str, stage: str, item: WorkItem, inputs: list[Any]) -> None:
        """Start `stage` of `item`; `inputs` are payloads of earlier answers."""

    def wait(self, timeout: float) -> list[ReplicaEvent]:
        """What has happened since the last call, waiting up to `timeout` seconds for something to happen."""

    def placing(self) -> Mapping[str, float]:
        """Seconds that each replica which has found no place in the cluster yet has been waiting for one."""

    def kill(self, replica: str) -> None:
        """End a replica and give its place back."""

    def result(self, payload: Any) -> Any:
        """The value behind a payload's handle."""

    def close(self) -> None:
        """End every replica."""
