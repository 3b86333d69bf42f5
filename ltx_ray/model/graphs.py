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
from ltx_ray.model.transformer import NO_PERTURBATION, Modality, Perturbation, Prefix
from ltx_ray.parallel.collectives import SINGLE_RANK, RankGroup
from ltx_ray.records import AV

#: Video tokens of all batch entries, divided by the ranks that share them and the weights, up to which a pass is
#: launch-bound. Above, kernels take longer than their launches.
LAUNCH_BOUND_TOKENS = 20_000
#: Input shapes whose graphs are kept. A clip size has at most four. Each shape holds its inputs and its results, and
#: all share one memory pool for what lies between.
_MAX_SHAPES = 12
#: Graphs that are kept of one shape. A guided call makes four kinds of passes, and as many again for each stream that
#: sits out some calls. STG makes another kind of every set of blocks that a row names.
_MAX_GRAPHS = 16
#: Kinds of passes that are remembered as seen: all that may have a graph.
_MAX_SEEN = 2 * _MAX_SHAPES * _MAX_GRAPHS
_log = logging.getLogger(__name__)


def is_launch_bound(tokens: int, ranks: int, max_tokens: int = LAUNCH_BOUND_TOKENS) -> bool:
    """Whether a pass of `tokens` video tokens, all batch entries together, is a graph on `ranks` that share it.

    `max_tokens` are those of one rank.
    """
    return tokens <= max_tokens * ranks


@dataclass(frozen=True)
class _Call:
    """What a graph is captured for besides the shapes of its inputs.

    `prefix`: the number of blocks that it leaves (`begins`) or takes over; None for neither.
    """

    perturbation: Perturbation
    enabled: AV[bool]
    sequence_group: RankGroup
    prefix: int | None = None
    begins: bool = False

    def new_prefix(self, streams: AV[torch.Tensor] | None) -> Prefix | None:
        return None if self.prefix is None else Prefix(self.prefix, None if self.begins else streams)


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    velocities: AV[torch.Tensor]
    #: The streams that the pass leaves for another one.
    begun: AV[torch.Tensor] | None


@dataclass
class _GraphedShape:
    """The fixed inputs of one shape, the tensors last copied into them by number, and the graphs that read them."""

    inputs: AV[Modality]
    tables: AV[ModulationTables]
    begun: AV[torch.Tensor] | None
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
        prefix: Prefix | None = None,
    ) -> AV[torch.Tensor]:
        """Do as `FusedTransformer.__call__`.

        All ranks of a gang capture and replay the same passes in the same order, as their inputs have the same shapes.
        """
        latent, tables = inputs.video.latent, self._dit.tables(inputs)
        ranks = self._dit.model.tp.size * sequence_group.size
        if not is_launch_bound(latent.shape[0] * latent.shape[1], ranks, self._max_tokens):
            return self._dit.run(inputs, tables, perturbation, sequence_group, prefix)
        begun = None if prefix is None else prefix.streams
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in _tensors(inputs, tables, begun))
        enabled = inputs.map(lambda modality: modality.enabled)
        length = None if prefix is None else prefix.length
        call = _Call(perturbation, enabled, sequence_group, length, begins=begun is None)
        if (shapes, call) not in self._seen:
            # The first pass compiles kernels and initialises libraries, that for exchanges between ranks included,
            # which must not happen during a capture.
            _make_room(self._seen, _MAX_SEEN)
            self._seen[shapes, call] = None
            return self._dit.run(inputs, tables, perturbation, sequence_group, prefix)
        self._seen.move_to_end((shapes, call))
        shape = self._shape(shapes, inputs, tables, begun)
        self._copy_inputs(shape, inputs, tables, begun)
        if call not in shape.graphs:
            _make_room(shape.graphs, _MAX_GRAPHS)
            shape.graphs[call] = self._capture(shape, call)
        shape.graphs.move_to_end(call)
        captured = shape.graphs[call]
        captured.graph.replay()
        if prefix is not None and captured.begun is not None:
            prefix.streams = captured.begun.map(torch.clone)
        return captured.velocities.map(torch.clone)

    def _shape(
        self, shapes: Any, inputs: AV[Modality], tables: AV[ModulationTables], begun: AV[torch.Tensor] | None
    ) -> _GraphedShape:
        if shapes not in self._shapes:
            _make_room(self._shapes, _MAX_SHAPES)
            places = None if begun is None else begun.map(torch.empty_like)
            self._shapes[shapes] = _GraphedShape(inputs.map(_empty_like), tables.map(_empty_like), places)
        self._shapes.move_to_end(shapes)
        return self._shapes[shapes]

    def _copy_inputs(
        self,
        shape: _GraphedShape,
        inputs: AV[Modality],
        tables: AV[ModulationTables],
        begun: AV[torch.Tensor] | None,
    ) -> None:
        """Copy the inputs to the fixed memory, except those that an earlier pass has copied."""
        sources, targets = _tensors(inputs, tables, begun), _tensors(shape.inputs, shape.tables, shape.begun)
        for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
            if shape.sources.get(number) is not source:
                target.copy_(source)
                shape.sources[number] = source

    def _capture(self, shape: _GraphedShape, call: _Call) -> _Graph:
        inputs = shape.inputs.map(lambda modality, on: replace(modality, enabled=on), call.enabled)
        graph, prefix = torch.cuda.CUDAGraph(), call.new_prefix(shape.begun)
        if not any(other.graphs for other in self._shapes.values()):
            # The pool went with the last of its graphs.
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        # "thread_local" lets other threads of the process use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            velocities = self._dit.run(inputs, shape.tables, call.perturbation, call.sequence_group, prefix)
        return _Graph(graph, velocities, prefix.streams if prefix is not None and call.begins else None)


def _make_room(kept: OrderedDict[Any, Any], most: int) -> None:
    """Drop what was used longest ago, so that there is room for one more."""
    while len(kept) >= most:
        kept.popitem(last=False)


def _tensors(inputs: AV[Modality], tables: AV[ModulationTables], begun: AV[torch.Tensor] | None) -> list[torch.Tensor]:
    """Every tensor that a pass reads besides the weights, in a fixed order."""
    found = [] if begun is None else list(begun)
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
