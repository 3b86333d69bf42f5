"""Which GPUs of a cluster are a run's: with noise that is drawn on them, those of one model.

Models are Ray's names, such as H100. A node whose model Ray does not know is taken; what its replicas show when they
are up decides (driver/admission.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Prefix of the GPU model among the resources of a Ray node.
MODEL_PREFIX = "accelerator_type:"


@dataclass(frozen=True)
class GpuNode:
    """A node with GPUs. `gpus`, `cpus`: those that are free; `model`: "" where it is not known."""

    id: str
    address: str
    model: str
    gpus: float
    cpus: float


@dataclass(frozen=True)
class Choice:
    """The nodes of a run, and those that are left alone."""

    nodes: Sequence[GpuNode]
    others: Sequence[GpuNode] = ()

    def without(self, nodes: Sequence[GpuNode]) -> Choice:
        """The same, with these nodes left alone, too."""
        return Choice([node for node in self.nodes if node not in nodes], [*self.others, *nodes])

    def told(self) -> str | None:
        """What is left alone, in words; None when nothing is."""
        if not self.others:
            return None
        models = " and ".join(sorted({node.model for node in self.nodes if node.model}))
        others = ", ".join(sorted({f"{node.address} ({node.model})" for node in self.others}))
        return f"the GPUs of this run are {models}; left alone: {others}"


def model_of(resources: Mapping[str, float]) -> str:
    """The model of a node's GPUs by its resources; "" where it is not known."""
    return next((name.removeprefix(MODEL_PREFIX) for name in resources if name.startswith(MODEL_PREFIX)), "")


def choose_nodes(nodes: Sequence[GpuNode], given: str | None, one_model: bool) -> Choice:
    """The nodes whose GPUs a run uses: those of the model `given`, or of that with the most free cards.

    Without `given` and without `one_model`, all of them. Raises ValueError when no node has the model `given`.
    """
    cards = Counter[str]()
    for node in nodes:
        if node.model:
            cards[node.model] += node.gpus  # type: ignore[assignment]
    if given is not None:
        known = sorted(cards)
        if known and given not in known:
            raise ValueError(f"--gpu-model: {given!r}, legal: {', '.join(known)} (the GPUs of this cluster)")
        chosen = given
    elif one_model and len(cards) > 1:
        chosen = max(sorted(cards), key=lambda model: cards[model])
    else:
        return Choice(nodes)
    mine = [node for node in nodes if node.model in ("", chosen)]
    return Choice(mine, [node for node in nodes if node.model not in ("", chosen)])
