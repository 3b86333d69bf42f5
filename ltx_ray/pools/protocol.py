"""What the driver may ask of its replicas, and the events that they report. It does not import Ray.

A ReplicaSet holds the gangs of a run: on a Ray cluster (`ray_replicas.RayReplicaSet`), or in virtual time
(`simulated.SimulatedReplicaSet`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ltx_ray.config import PoolSpec
from ltx_ray.records import CallReport, Evidence, WorkItem, plain
from ltx_ray.stages import Stage


@dataclass(frozen=True)
class RankInfo:
    """Where a rank runs and what it computes on. `node` is Ray's id of the node, `gpus` is CUDA_VISIBLE_DEVICES."""

    rank: int
    pid: int = 0
    node: str = ""
    address: str = ""
    gpus: str = ""
    device: str = ""
    #: Model of the GPU, or "cpu"; "" for engines whose results do not depend on the device.
    device_name: str = ""
    #: Where the weights without LoRAs and the LoRA factors are kept; None for engines that merge nothing.
    clean_weights: str | None = None
    lora_factors: str | None = None
    #: Seconds of the parts of the start.
    start_seconds: Mapping[str, float] | None = None

    def event(self) -> dict[str, Any]:
        """The fields as `gang_started` in events.jsonl lists them; those that are None are left out."""
        return {name: value for name, value in plain(self).items() if value is not None}

    def __str__(self) -> str:
        return f"rank {self.rank} on node {self.address} ({self.device or 'device unknown'})"


@dataclass(frozen=True)
class ReplicaStarted:
    """A replica is ready, `seconds` after it was asked for."""

    replica: str
    ranks: Sequence[RankInfo]
    seconds: float
    #: Of rank 0; None when its engine has none.
    evidence: Evidence | None = None


@dataclass(frozen=True)
class CallFinished:
    """A call ended the same way on all ranks. `report` is that of rank 0, `payload` a handle of its result."""

    replica: str
    item_id: str
    report: CallReport
    payload: Any
    #: Rank 0 with its node and device, for messages.
    where: str = ""


@dataclass(frozen=True)
class ReplicaLost:
    """A replica has failed and has been killed."""

    replica: str
    reason: str
    #: Whether it had been ready; otherwise it failed to start.
    served: bool
    #: Whether it is lost because results of earlier stages are gone.
    inputs_lost: bool = False
    #: Whether it died before the call under way had reached it, so that the item is not to blame.
    idle: bool = False
    #: Whether its node is gone, for which the item is seldom to blame.
    node_lost: bool = False
    #: The item whose call has broken it, where that is known. Items of other calls are not to blame.
    item_id: str | None = None
    #: Where its ranks ran, as far as that is known.
    ranks: Sequence[RankInfo] = ()
    #: Which of them has failed, where that is known.
    rank: int | None = None
    #: Whether its place is held until `ReplicaSet.release` is called.
    held: bool = False
    #: Whether its node cannot compute as the run does, so that nothing else would start there either.
    unfit: bool = False


@dataclass(frozen=True)
class InputsLost:
    """The results of earlier stages that a call needs are gone; the replica is alive."""

    replica: str
    item_id: str
    reason: str


ReplicaEvent = ReplicaStarted | CallFinished | ReplicaLost | InputsLost


class ReplicaSet(Protocol):
    """The replicas of a run, by name. Only `wait` blocks."""

    def start(self, name: str, spec: PoolSpec) -> None:
        """Begin to start a replica; ReplicaStarted or ReplicaLost reports how that ended."""

    def submit(self, replica: str, stage: Stage, item: WorkItem, inputs: list[Any], timeout: float) -> None:
        """Start `stage` of `item`, which may take `timeout` seconds; `inputs` are payloads of earlier calls."""

    def wait(self, timeout: float) -> list[ReplicaEvent]:
        """The events since the last call; waits up to `timeout` seconds for the first."""

    def placing(self) -> Mapping[str, float]:
        """The replicas that have no place in the cluster yet, with the seconds that each has waited for one.

        One that has its place is among them until its processes are there.
        """

    def has_place(self, replica: str) -> bool:
        """Whether a replica that is placing has its place, and waits for its processes alone. Not for every turn."""

    def leaving(self) -> Collection[str]:
        """The replicas on nodes that are about to leave the cluster."""

    def gpu_seconds(self) -> float:
        """How long GPUs have been reserved, those of replicas that could not start included."""

    def nodes(self) -> Mapping[str, int]:
        """The nodes that have CPUs or GPUs, with the number of their GPUs."""

    def avoid(self, nodes: Collection[str]) -> None:
        """Place no replica on these nodes from now on, nor those that wait for a place; on all others again."""

    def kill(self, replica: str, hold: bool = False) -> None:
        """End a replica, and give its place back unless it is to be held until `release`."""

    def release(self, replica: str) -> None:
        """Give back a place that is held (`ReplicaLost.held`)."""

    def share(self, value: bytes) -> Any:
        """A handle of `value`, which calls may take as an input. It lives as long as it is referred to."""

    def result(self, payload: Any) -> Any:
        """The value behind a payload's handle."""

    def close(self) -> None:
        """End every replica."""
