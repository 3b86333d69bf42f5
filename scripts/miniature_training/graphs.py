"""CUDA graphs of loss functions and their backward passes.

Small layers leave a GPU waiting for the launches of their kernels. A graph replays all kernels of a step in one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

#: Runs before a recording, in which libraries choose their algorithms and allocate their workspaces.
_WARMUP_RUNS = 3

Losses = dict[str, torch.Tensor]


@dataclass
class _Recording:
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    losses: Losses
    gradients: list[torch.Tensor | None]


class RecordedLosses:
    """Runs loss functions and the backward pass of their loss named "loss".

    On a GPU, the first call with a new `kind` records a graph, and further calls replay it. A function must therefore
    do the same for all inputs of one kind: it gets everything that changes as tensors, and draws no random numbers.
    """

    def __init__(self, weights: Iterable[torch.nn.Parameter]) -> None:
        self._weights = list(weights)
        self._recordings: dict[Hashable, _Recording] = {}
        #: Memory of all graphs. They run one after the other, and what one gives is used before the next one runs.
        self._memory: Any = None

    def __call__(self, kind: Hashable, function: Callable[..., Losses], *inputs: torch.Tensor) -> Losses:
        """The losses of `function(*inputs)`, detached. The weights' gradients are those of the loss."""
        if not inputs[0].is_cuda:
            self._clear_gradients()
            return self._run(function, inputs)
        if kind not in self._recordings:
            self._recordings[kind] = self._record(function, inputs)
        recording = self._recordings[kind]
        for kept, value in zip(recording.inputs, inputs, strict=True):
            kept.copy_(value)
        recording.graph.replay()
        for weight, gradient in zip(self._weights, recording.gradients, strict=True):
            weight.grad = gradient
        return recording.losses

    def _run(self, function: Callable[..., Losses], inputs: tuple[torch.Tensor, ...]) -> Losses:
        losses = function(*inputs)
        losses["loss"].backward()
        return {name: value.detach() for name, value in losses.items()}

    def _record(self, function: Callable[..., Losses], inputs: tuple[torch.Tensor, ...]) -> _Recording:
        kept = tuple(value.clone() for value in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP_RUNS):
                self._clear_gradients()
                self._run(function, kept)
        torch.cuda.current_stream().wait_stream(stream)
        # Without gradients, the recorded backward pass writes them anew instead of adding to them.
        self._clear_gradients()
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            losses = self._run(function, kept)
        return _Recording(graph, kept, losses, [weight.grad for weight in self._weights])

    def _clear_gradients(self) -> None:
        for weight in self._weights:
            weight.grad = None
