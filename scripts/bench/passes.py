"""The passes of a benchmark: how they are built, called and timed."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from ltx_ray.model.attention_backends import BACKENDS, attention_backend
from ltx_ray.model.fused import FusedTransformer
from ltx_ray.model.graphs import is_launch_bound
from ltx_ray.model.packing import pack_linears
from ltx_ray.model.transformer import Modality, Perturbation, Transformer
from ltx_ray.parallel.collectives import SINGLE_RANK, RankGroup
from ltx_ray.parallel.fp8 import write_values
from ltx_ray.records import AV
from ltx_ray.shapes import ClipShape
from scripts.bench import random_transformer
from scripts.bench.dit_implementations import Case

GIB = 2**30
T = TypeVar("T")
Call = Callable[[], object]
Velocities = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Row:
    """One side's passes in milliseconds, and in GiB its weights and the memory of a pass beyond them."""

    side: str
    passes: list[float]
    pass_gib: float | None = None
    weights_gib: float | None = None
    error: tuple[float, float] | None = None

    @property
    def ms(self) -> float:
        return statistics.median(self.passes)


def measure(
    side: str,
    call: Call,
    device: torch.device,
    repeat: int,
    warm: float,
    agreed: Callable[[float], float] = lambda seconds: seconds,
) -> Row:
    """Time `repeat` consecutive passes after `warm` seconds of warm-up; the very first pass may compile.

    `agreed` makes the ranks of a gang warm up for the same number of passes.
    """
    memory = _memory_of(call, device)
    if device.type != "cuda":
        marks = []
        for _ in range(repeat + 1):
            call()
            marks.append(time.perf_counter())
        return Row(side, [1e3 * (b - a) for a, b in itertools.pairwise(marks)], memory)
    began = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    for _ in range(math.ceil(warm / agreed(time.perf_counter() - began))):
        call()
    torch.cuda.synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return Row(side, [a.elapsed_time(b) for a, b in itertools.pairwise(events)], memory)


def _memory_of(call: Call, device: torch.device) -> float | None:
    """Peak GiB of a pass beyond what is allocated after the first pass."""
    call()
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / GIB


def graphed(call: Callable[[], T]) -> Callable[[], T]:
    """Capture the call in a CUDA graph; each replay overwrites the result of the last."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Other threads of the process, such as NCCL's, may use the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = call()

    def replay() -> T:
        graph.replay()
        return result

    return replay


def as_in_a_run(call: Callable[[], T], case: Case, ranks: int) -> tuple[Callable[[], T], str]:
    """A graph of the call where a run replays one on `ranks` that share a pass, else the call. The label says which.

    Unlike a run's, the graph computes the modulations as well, and no inputs are copied to its memory.
    """
    if case.device.type == "cuda" and is_launch_bound(case.shape.video_tokens, ranks):
        return graphed(call), ", graph"
    return call, ""


def on_host(velocities: Iterable[torch.Tensor]) -> Velocities:
    video, audio = velocities
    return video.float().cpu(), audio.float().cpu()


def errors(found: Velocities, expected: Velocities) -> tuple[float, float]:
    """Relative L2 errors of video and audio."""
    video, audio = (((f - e).norm() / e.norm()).item() for f, e in zip(found, expected, strict=True))
    return video, audio


def build_ours(case: Case, precision: str, tp: RankGroup = SINGLE_RANK) -> Transformer:
    with torch.device("meta"):
        model = Transformer(case.config, tp)
    pack_linears(model, case.device, case.dtype, precision)
    random_transformer.fill(model, case.device, case.dtype, write_values, tp=tp)
    return model


def call_ours(
    case: Case, model: Transformer, attention: str, plain: bool, sequence_group: RankGroup = SINGLE_RANK
) -> Callable[[bool], AV[torch.Tensor]]:
    """isolated -> velocities. Each call copies the noise level, so that nothing is reused from the last call."""
    dit = model if plain else FusedTransformer(model, attention=attention)
    if isinstance(dit, FusedTransformer):
        ropes = dit.ropes(case.positions, case.dtype, sequence_group)
    else:
        ropes = dit.ropes(case.positions, case.dtype)

    def modality(latent: torch.Tensor, context: torch.Tensor, tables: tuple) -> Modality:
        return Modality(latent, case.sigma.clone(), case.sigma.reshape(1, 1).clone(), context, *tables)

    def call(isolated: bool) -> AV[torch.Tensor]:
        return dit(case.latents.map(modality, case.contexts, ropes), Perturbation(isolated=isolated), sequence_group)

    return call


def weights_gib(model: nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in model.parameters()) / GIB


def best_attention(device: torch.device) -> str:
    """The fastest backend that this machine has; BACKENDS is in order of speed."""
    for name in BACKENDS:
        with contextlib.suppress(RuntimeError, ImportError):
            attention_backend(name, device)
            return name
    raise AssertionError("sdpa is always available")


def pass_names(stage: int) -> tuple[str, ...]:
    """The passes that are measured: in stage 1 also that without attention between the streams."""
    return ("cond", "isolated") if stage == 1 else ("cond",)


def random_case(a: argparse.Namespace, text: int, device: torch.device) -> Case:
    """The inputs that the command line of bench_dit names."""
    height, width, frames = (int(n) for n in a.shape.split("x"))
    clip = ClipShape(frames, height, width, 24.0)
    metadata = random_transformer.metadata(a.layers, a.tiny)
    return Case.random(metadata, clip.half() if a.stage == 1 else clip, text, device, getattr(torch, a.dtype))
