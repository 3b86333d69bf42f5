"""What is free on nodes that have joined the cluster since the run did."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ltx_ray.placement.gpu_models import model_of
from ltx_ray.placement.output_pools import Node


class JoinedNodes:
    """Knows the nodes that were there when it was made. The others are new, if their GPUs are of one of `models`."""

    def __init__(self, models: Collection[str]):
        self._known, self._models = frozenset(self._alive()), frozenset(models)

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
