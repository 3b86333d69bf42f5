"""Nodes that have joined: what is free on them, and those whose GPUs are of another model than the run's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ltx_ray.placement.gpu_models import model_of
from ltx_ray.placement.output_pools import Node


class JoinedNodes:
    """Knows the nodes that were there when it was made. The others are new.

    `models`: of GPUs that the run uses; `binding`: whether it may use no others. When a run began without a GPU, the
    models of the first nodes that serve it are taken for them.
    """

    def __init__(self, models: Collection[str], binding: bool = False):
        self._known, self._models, self._binding = frozenset(self._alive()), frozenset(models), binding

    def free(self) -> list[Node]:
        """The CPUs and GPUs that are free on each new node."""
        new = {
            name
            for name, node in self._alive().items()
            if name not in self._known and node["Resources"].get("GPU") and model_of(node["Resources"]) in self._models
        }
        if not new:
            return []
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node()
        return [Node(free[name].get("CPU", 0.0), free[name].get("GPU", 0.0)) for name in sorted(new & free.keys())]

    def foreign(self, serving: Collection[str]) -> dict[str, str]:
        """By the ids of new nodes whose GPUs the run must not use, their addresses and models.

        `serving`: ids of the nodes where replicas are ready. A node whose model Ray does not know is none of them.
        """
        if not self._binding:
            return {}
        alive = {name: node for name, node in self._alive().items() if node["Resources"].get("GPU")}
        if not self._models:
            self._models = frozenset(model_of(alive[name]["Resources"]) for name in alive.keys() & set(serving)) - {""}
        if not self._models - {""}:
            return {}
        return {
            name: f"{node['NodeManagerAddress']} ({model})"
            for name, node in alive.items()
            if name not in self._known and (model := model_of(node["Resources"])) not in ("", *self._models)
        }

    def _alive(self) -> dict[str, Mapping[str, Any]]:
        import ray

        return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
