"""What is free on nodes that have joined the cluster since the run did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ltx_ray.placement.output_pools import Node

#: Prefix of the GPU model among the resources of a Ray node.
MODEL_PREFIX = "accelerator_type:"


def model_of(resources: Mapping[str, Any]) -> str | None:
    """The GPU model of a node, as Ray names it."""
    return next((name.removeprefix(MODEL_PREFIX) for name in resources if name.startswith(MODEL_PREFIX)), None)


class JoinedNodes:
    """Knows the nodes that were there when it was made. The others are new, if their GPUs are of a model that was."""

    def __init__(self) -> None:
        there = self._alive()
        self._known = frozenset(there)
        self._models = {model_of(resources) for resources in there.values() if resources.get("GPU")}

    def free(self) -> list[Node]:
        """The CPUs and GPUs that are free on each new node."""
        new = {
            name
            for name, resources in self._alive().items()
            if name not in self._known and resources.get("GPU") and model_of(resources) in self._models
        }
        if not new:
            return []
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node()
        return [Node(free[name].get("CPU", 0.0), free[name].get("GPU", 0.0)) for name in sorted(new & free.keys())]

    def _alive(self) -> dict[str, Mapping[str, float]]:
        import ray

        return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
