"""What the nodes of a run have installed, asked of a few of them: the driver may run on a machine of another kind."""

from __future__ import annotations

from collections.abc import Sequence

from ltx_ray.placement.numerics import has_fa3

#: Nodes that are asked, and seconds for their answers.
_NODES, _SECONDS = 3, 60.0


def nodes_have_fa3(nodes: Sequence[str]) -> bool:
    """Whether FlashAttention-3 is installed on most of these nodes, given by Ray's ids; here, when none answers.

    A node that differs from them is excluded when its first replica starts.
    """
    answers = _ask(nodes[:_NODES])
    return 2 * sum(answers) > len(answers) if answers else has_fa3()


def _ask(nodes: Sequence[str]) -> list[bool]:
    """The answers of those nodes that answer in time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(has_fa3)
    asked = [
        ask.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in nodes
    ]
    if not asked:
        return []
    ready, late = ray.wait(asked, num_returns=len(asked), timeout=_SECONDS)
    for reference in late:
        ray.cancel(reference, force=True)
    answers = []
    for reference in ready:
        try:
            answers.append(bool(ray.get(reference)))
        except ray.exceptions.RayError:
            continue  # The node is gone, or lacks this package.
    return answers
