"""What the GPU nodes of a run have installed, asked of each: the driver may run on a machine of another kind.

A run has one attention for all of its nodes. A node that joins later tells by its first replica, before that reads the
model (`engine/diffusion.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ltx_ray.placement.gpu_models import GpuNode
from ltx_ray.placement.numerics import has_fa3

#: Seconds for the first answer, and for those that come after it.
_SECONDS, _LATE_SECONDS = 60.0, 15.0
#: Part of the cards from which FlashAttention-3 on these is faster than cuDNN on all (docs/benchmarks.md).
_ENOUGH = 0.92


@dataclass(frozen=True)
class Attention:
    """What follows for a run from which nodes have FlashAttention-3.

    `fa3`: whether the run uses it. `without`: the nodes that lack it; with `fa3` they are left alone.
    """

    fa3: bool
    without: Sequence[GpuNode] = ()

    def told(self) -> str | None:
        """That in words; None when all nodes are alike."""
        if not self.without:
            return None
        names = ", ".join(sorted({node.address for node in self.without}))
        if self.fa3:
            return f"left alone, because they lack FlashAttention-3 (the package fa3-fwd): {names}"
        return f"attention is not fa3, because these nodes lack FlashAttention-3 (the package fa3-fwd): {names}"


def choose_attention(nodes: Sequence[GpuNode], found: Mapping[str, bool], requested: str) -> Attention:
    """The attention of a run on `nodes`. `found`: by the ids of those that have answered, whether they have it.

    Of "auto" the cards decide: some nodes without it slow nobody down when most have it. Where no node has answered,
    this machine counts. Raises ValueError when it is `requested` and no node has it.
    """
    known = [node for node in nodes if node.id in found]
    without = [node for node in known if not found[node.id]]
    if requested == "fa3":
        if known and len(without) == len(known):
            raise ValueError(
                "--attention: 'fa3', and no GPU node has FlashAttention-3; legal: auto, cudnn, flash or sdpa, or the "
                "package fa3-fwd on every GPU node"
            )
        return Attention(True, without)
    if not known:
        return Attention(has_fa3())
    cards = sum(node.gpus for node in known)
    fa3 = len(without) < len(known) and cards - sum(node.gpus for node in without) >= _ENOUGH * cards
    return Attention(fa3, without if fa3 or len(without) < len(known) else ())


def nodes_have_fa3(nodes: Sequence[str]) -> dict[str, bool]:
    """Whether each of these nodes, given by Ray's ids, has FlashAttention-3. Those that do not answer are left out."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(has_fa3)
    asked: dict[Any, str] = {
        ask.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): node
        for node in nodes
    }
    answers: dict[str, bool] = {}
    waiting, seconds = list(asked), _SECONDS
    while waiting:
        ready, waiting = ray.wait(waiting, timeout=seconds)
        if not ready:
            break
        seconds = _LATE_SECONDS
        for reference in ready:
            try:
                answers[asked[reference]] = bool(ray.get(reference))
            except ray.exceptions.RayError:
                continue  # The node is gone, or lacks this package.
    for reference in waiting:
        ray.cancel(reference, force=True)
    return answers
