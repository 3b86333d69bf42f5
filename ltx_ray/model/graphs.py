"""Passes of the fused path as CUDA graphs, where launching their kernels would take longer than running them.

A graph reads and writes fixed memory, to which whatever changes from pass to pass is copied. Weights stay in place when
a LoRA is merged, so graphs outlive switches. A replay has the bits of the pass that was captured.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from ltx_ray.model.fused import FusedTransformer
from ltx_ray.model.modulations import ModulationTables
from ltx_ray.model.rope import RopeTable
from ltx_ray.model.transformer import NO_PERTURBATION, Modality, Perturbation
from ltx_ray.parallel.collectives import SINGLE_RANK, RankGroup
from ltx_ray.records import AV

#: Video tokens of all batch entries, divided by the ranks that share them and the weights, up to which a pass is
#: launch-bound. Above, kernels take longer than their launches.
LAUNCH_BOUND_TOKENS = 20_000
#: Input shapes whose graphs are kept. A clip size has at most three. Each shape holds its inputs and its results, and
#: all share one memory pool for what lies between.
_MAX_SHAPES = 9
#: Graphs that are kept of one shape. A guided call makes four kinds of passes, and as many again for each stream that
#: sits out some calls. STG makes another kind of every set of blocks that a row names.
_MAX_GRAPHS = 16
#: Kinds of passes that are remembered as seen: all that may have a graph.
_MAX_SEEN = 2 * _MAX_SHAPES * _MAX_GRAPHS
_log = logging.getLogger(__name__)

#: What a graph is captured for besides the shapes of its inputs: the perturbation, the enabled streams, and the ranks
#: that divide the tokens.
_Call = tuple[Perturbation, AV[bool], RankGroup]


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    velocities: AV[torch.Tensor]


@dataclass
class _GraphedShape:
    """The fixed inputs of one shape, the tensors last copied into them by number, and the graphs that read them."""

    inputs: AV[Modality]
    tables: AV[ModulationTables]
    sources: dict[int, torch.Tensor] = field(default_factory=dict)
    graphs: OrderedDict[_Call, _Graph] = field(default_factory=OrderedDict)


class GraphedTransformer:
    """A FusedTransformer whose small passes are replayed from graphs, from the second pass of a kind on.

    Shapes and graphs are bounded in number, and those that were used longest ago go first.
    """

    def __init__(self, dit: FusedTransformer, max_tokens: int = LAUNCH_BOUND_TOKENS):
        self._dit, self._max_tokens = dit, max_tokens
        self.ropes = dit.ropes
        self._shapes: OrderedDict[Any, _GraphedShape] = OrderedDict()
        self._seen: OrderedDict[Any, None] = OrderedDict()
        self._pool: Any = None

    def __call__(
        self,
        inputs: AV[Modality],
        perturbation: Perturbation = NO_PERTURBATION,
        sequence_group: RankGroup = SINGLE_RANK,
    ) -> AV[torch.Tensor]:
        """Do as `FusedTransformer.__call__`.

        All ranks of a gang capture and replay the same passes in the same order, as their inputs have the same shapes.
        """
        latent, tables = inputs.video.latent, self._dit.tables(inputs)
        ranks = self._dit.model.tp.size * sequence_group.size
        if latent.shape[0] * latent.shape[1] > self._max_tokens * ranks:
            return self._dit.run(inputs, tables, perturbation, sequence_group)
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in _tensors(inputs, tables))
        call = perturbation, inputs.map(lambda modality: modality.enabled), sequence_group
        if (shapes, call) not in self._seen:
            # The first pass compiles kernels and initialises libraries, that for exchanges between ranks included,
            # which must not happen during a capture.
            _make_room(self._seen, _MAX_SEEN)
            self._seen[shapes, call] = None
            return self._dit.run(inputs, tables, perturbation, sequence_group)
        self._seen.move_to_end((shapes, call))
        shape = self._shape(shapes, inputs, tables)
        self._copy_inputs(shape, inputs, tables)
        if call not in shape.graphs:
            _make_room(shape.graphs, _MAX_GRAPHS)
            shape.graphs[call] = self._capture(shape, call)
        shape.graphs.move_to_end(call)
        captured = shape.graphs[call]
        captured.graph.replay()
        return captured.velocities.map(torch.clone)

    def _shape(self, shapes: Any, inputs: AV[Modality], tables: AV[ModulationTables]) -> _GraphedShape:
        if shapes not in self._shapes:
            _make_room(self._shapes, _MAX_SHAPES)
            self._shapes[shapes] = _GraphedShape(inputs.map(_empty_like), tables.map(_empty_like))
        self._shapes.move_to_end(shapes)
        return self._shapes[shapes]

    def _copy_inputs(self, shape: _GraphedShape, inputs: AV[Modality], tables: AV[ModulationTables]) -> None:
        """Copy the inputs to the fixed memory, except those that an earlier pass has copied."""
        sources, targets = _tensors(inputs, tables), _tensors(shape.inputs, shape.tables)
        for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
            if shape.sources.get(number) is not source:
                target.copy_(source)
                shape.sources[number] = source

    def _capture(self, shape: _GraphedShape, call: _Call) -> _Graph:
        perturbation, enabled, sequence_group = call
        inputs = shape.inputs.map(lambda modality, on: replace(modality, enabled=on), enabled)
        graph = torch.cuda.CUDAGraph()
        if not any(other.graphs for other in self._shapes.values()):
            # The pool went with the last of its graphs.
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        # "thread_local" lets other threads of the process use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            velocities = self._dit.run(inputs, shape.tables, perturbation, sequence_group)
        return _Graph(graph, velocities)


def _make_room(kept: OrderedDict[Any, Any], most: int) -> None:
    """Drop what was used longest ago, so that there is room for one more."""
    while len(kept) >= most:
        kept.popitem(last=False)


def _tensors(inputs: AV[Modality], tables: AV[ModulationTables]) -> list[torch.Tensor]:
    """Every tensor that a pass reads besides the weights, in a fixed order."""
    found = []
    for part in (*inputs, *tables):
        for entry in fields(part):
            value = getattr(part, entry.name)
            if isinstance(value, RopeTable):
                found += [value.cos, value.sin]
            elif isinstance(value, torch.Tensor):
                found.append(value)
    return found


def _empty_like(part: Any) -> Any:
    """A copy of a dataclass with new, uninitialised tensors."""

    def empty(value: Any) -> Any:
        if isinstance(value, RopeTable):
            return RopeTable(torch.empty_like(value.cos), torch.empty_like(value.sin))
        if isinstance(value, torch.Tensor):
            return torch.empty(value.shape, dtype=value.dtype, device=value.device)
        return value

    return replace(part, **{entry.name: empty(getattr(part, entry.name)) for entry in fields(part)})
