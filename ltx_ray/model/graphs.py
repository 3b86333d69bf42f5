"""Passes of the fused path as CUDA graphs, where launching their kernels would take longer than running them.

A graph reads and writes fixed places: what changes from pass to pass is copied there. The weights stay where they
are when a LoRA is merged, so graphs outlive switches. A replay gives the bits of the pass that it was made from.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from ltx_ray.model.fused import FusedTransformer, Tables
from ltx_ray.model.rope import RopeTable
from ltx_ray.model.transformer import NO_PERTURBATION, Modality, Perturbation
from ltx_ray.records import AV

#: Video tokens (of all batch entries) up to which a pass is launch-bound; above, its kernels outlast their launches.
LAUNCH_BOUND_TOKENS = 20_000
#: Input sizes whose graphs are kept, at most three for a size of clips; each holds its inputs and its results, and all
#: share one pool for what is between.
_KEPT_SHAPES = 9
_log = logging.getLogger(__name__)


@dataclass
class _Shape:
    """The fixed places of a shape, what was copied into them last, and the graphs that read them."""

    inputs: AV[Modality]
    tables: AV[Tables]
    sources: dict[int, torch.Tensor] = field(default_factory=dict)
    graphs: dict[Any, tuple[torch.cuda.CUDAGraph, AV[torch.Tensor]]] = field(default_factory=dict)


class GraphedTransformer:
    """A FusedTransformer whose small passes are replayed from graphs from their second time on."""

    def __init__(self, dit: FusedTransformer, max_tokens: int = LAUNCH_BOUND_TOKENS):
        self._dit, self._max_tokens = dit, max_tokens
        self.ropes = dit.ropes
        self._shapes: OrderedDict[Any, _Shape] = OrderedDict()
        self._seen: set[Any] = set()
        self._pool: tuple[int, int] | None = None

    def __call__(self, inputs: AV[Modality], perturbation: Perturbation = NO_PERTURBATION) -> AV[torch.Tensor]:
        """As `FusedTransformer.__call__`."""
        latent, tables = inputs.video.latent, self._dit.tables(inputs)
        if latent.shape[0] * latent.shape[1] > self._max_tokens:
            return self._dit.run(inputs, tables, perturbation)
        sizes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in _tensors(inputs, tables))
        kind = sizes, perturbation, inputs.map(lambda m: m.enabled)
        if kind not in self._seen:
            # the first time, kernels are compiled and libraries set up, which no graph may hold
            self._seen.add(kind)
            return self._dit.run(inputs, tables, perturbation)
        shape = self._shape(sizes, inputs, tables)
        self._copy(shape, inputs, tables)
        key = kind[1:]
        if key not in shape.graphs:
            shape.graphs[key] = self._capture(shape, key)
        graph, out = shape.graphs[key]
        graph.replay()
        return out.map(torch.clone)

    def _shape(self, sizes: Any, inputs: AV[Modality], tables: AV[Tables]) -> _Shape:
        if sizes not in self._shapes:
            if len(self._shapes) == _KEPT_SHAPES:
                self._shapes.popitem(last=False)
            self._shapes[sizes] = _Shape(inputs.map(_fixed), tables.map(_fixed))
        self._shapes.move_to_end(sizes)
        return self._shapes[sizes]

    def _copy(self, shape: _Shape, inputs: AV[Modality], tables: AV[Tables]) -> None:
        """Bring the inputs to their places; those that are there already since an earlier pass stay."""
        new, places = _tensors(inputs, tables), _tensors(shape.inputs, shape.tables)
        for number, (source, place) in enumerate(zip(new, places, strict=True)):
            if shape.sources.get(number) is not source:
                place.copy_(source)
                shape.sources[number] = source

    def _capture(self, shape: _Shape, key: tuple[Perturbation, AV[bool]]) -> tuple[torch.cuda.CUDAGraph, AV]:
        perturbation, enabled = key
        inputs = shape.inputs.map(lambda m, on: replace(m, enabled=on), enabled)
        graph = torch.cuda.CUDAGraph()
        if not any(kept.graphs for kept in self._shapes.values()):
            # a pool that no graph is left of is gone
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        # other threads of the process may go on with the device meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = self._dit.run(inputs, shape.tables, perturbation)
        return graph, out


def _tensors(inputs: AV[Modality], tables: AV[Tables]) -> list[torch.Tensor]:
    """Every tensor that a pass reads besides the weights, in a fixed order."""
    found = []
    for part in (*inputs, *tables):
        for one in fields(part):
            value = getattr(part, one.name)
            if isinstance(value, RopeTable):
                found += [value.cos, value.sin]
            elif isinstance(value, torch.Tensor):
                found.append(value)
    return found


def _fixed(part: Any) -> Any:
    """A copy of a dataclass with tensors of its own, not filled yet."""

    def own(value: Any) -> Any:
        if isinstance(value, RopeTable):
            return RopeTable(torch.empty_like(value.cos), torch.empty_like(value.sin))
        if isinstance(value, torch.Tensor):
            return torch.empty(value.shape, dtype=value.dtype, device=value.device)
        return value

    return replace(part, **{one.name: own(getattr(part, one.name)) for one in fields(part)})
