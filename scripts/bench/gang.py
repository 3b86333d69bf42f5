"""A gang of ranks on cards of their own, beside one card in the same run: a pass, or a guided call of stage 1.

Every rank is a process. Each first measures a whole model on its own card, then all of them the layout. A time is that
of the slowest rank.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._C._autograd import DeviceType
from torch.multiprocessing.spawn import start_processes

from ltx_ray.model.fused import FusedTransformer
from ltx_ray.model.graphs import GraphedTransformer
from ltx_ray.parallel.mesh import Mesh, make_mesh
from scripts.bench.dit_implementations import Case
from scripts.bench.guided_step import guided_call
from scripts.bench.passes import (
    Call,
    Velocities,
    as_in_a_run,
    build_ours,
    call_ours,
    errors,
    measure,
    on_host,
    pass_names,
    random_case,
)

T = TypeVar("T")


@dataclass(frozen=True)
class GangPass:
    """Milliseconds of a pass by side, and how far the gang's result is from that of one card.

    The first side is one card, the last one the gang of `layout`, which is the word for it in the keys of figures.
    `waits`: the part of the gang's time in which a card ran exchanges or nothing.
    """

    layout: str
    sides: dict[str, float]
    error: tuple[float, float] | None = None
    waits: float | None = None

    @property
    def figures(self) -> dict[str, float]:
        """The figures of a case, by the end of its key."""
        *_, ms = self.sides.values()
        found = {"ms": ms, "speedup": self.sides[next(iter(self.sides))] / ms}
        if self.waits is not None:
            found["waits_share"] = self.waits
        if self.error is not None:
            found |= {"video_error": self.error[0], "audio_error": self.error[1]}
        return found

    def table(self, name: str) -> str:
        base = next(iter(self.sides.values()))
        lines = [name] + [f"  {side:28} {ms:9.2f} ms  {base / ms:6.3f} x" for side, ms in self.sides.items()]
        if self.error is not None:
            lines.append(f"  relative L2 error against one card: video {self.error[0]:.2e}, audio {self.error[1]:.2e}")
        if self.waits is not None:
            lines.append(f"  {self.waits:.1%} of the gang's pass goes by with exchanges or nothing")
        return "\n".join(lines)


def measure_gang(a: argparse.Namespace, text: int) -> dict[str, GangPass]:
    """Start the ranks that bench_dit's command line names, and measure. One rank is measured in this process."""
    if a.ranks == 1:
        return _Rank(a, text, Mesh(), torch.device(a.device)).measure()
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_run_rank, (a, text, f"{folder}/store", results), a.ranks, start_method="spawn")
    return results.get()


def _run_rank(rank: int, a: argparse.Namespace, text: int, store: str, results: Any) -> None:
    device = torch.device(a.device if a.device == "cpu" else f"{a.device}:{rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=a.ranks)
    mesh = make_mesh(rank, a.ranks, a.tp, a.guidance_parallel, a.sequence_parallel)
    found = _Rank(a, text, mesh, device).measure()
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


class _Rank:
    """One rank's measurements."""

    def __init__(self, a: argparse.Namespace, text: int, mesh: Mesh, device: torch.device):
        self._a, self._mesh = a, mesh
        self._case: Case = random_case(a, text, device)
        layout = (("tp", a.tp), ("sp", a.sequence_parallel), ("gp", a.guidance_parallel))
        self._layout = ".".join(f"{name}{ranks}" for name, ranks in layout if ranks > 1)
        self._names = (f"step.{a.step}",) if a.step else pass_names(a.stage)

    @torch.inference_mode()
    def measure(self) -> dict[str, GangPass]:
        sides: dict[str, dict[str, float]] = {name: {} for name in self._names}
        outputs: dict[str, list[Velocities]] = {name: [] for name in self._names}
        waits: dict[str, float | None] = {}
        layouts = {"one card": Mesh()} | ({self._layout: self._mesh} if self._layout else {})
        for layout, mesh in layouts.items():
            for name, side, call in self._calls(mesh):
                sides[name][f"{layout}{side}"] = self._time(call, name, f"{layout}{side}")
                outputs[name].append(on_host(call()))
                if mesh is self._mesh and self._layout:
                    waits[name] = self._waits(call)
            gc.collect()
            if self._case.device.type == "cuda":
                torch.cuda.empty_cache()
        found = {}
        for name in self._names:
            error = errors(outputs[name][-1], outputs[name][0]) if len(outputs[name]) > 1 else None
            found[name] = GangPass(self._layout, sides[name], error, waits.get(name))
        return found

    def _calls(self, mesh: Mesh) -> Iterable[tuple[str, str, Callable[[], Iterable[torch.Tensor]]]]:
        """(name of the figure, what is special about the side, call) for each call of a layout."""
        a, case = self._a, self._case
        model = build_ours(case, a.precision, mesh.tp)
        if not a.step:
            call = call_ours(case, model, a.attention, False, mesh.tokens)
            for name in self._names:
                one, label = as_in_a_run(partial(call, name == "isolated"), case, mesh.tp.size * mesh.tokens.size)
                yield name, label, one
                del one
            return
        fused = FusedTransformer(model, a.attention)
        dit = GraphedTransformer(fused) if case.device.type == "cuda" else fused
        if a.step == "base":
            yield self._names[0], ", passes whole", guided_call(case, dit, a.step, mesh, shared_prefix=False)
        yield self._names[0], "", guided_call(case, dit, a.step, mesh)

    def _time(self, call: Call, name: str, side: str) -> float:
        """Milliseconds, of the slowest rank."""
        row = measure(side, call, self._case.device, self._a.repeat, self._a.warm, self._agreed)
        slowest = max(self._of_all(row.ms))
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"  {name:12} {side:28} {slowest:9.2f} ms", file=sys.stdout, flush=True)
        return slowest

    def _agreed(self, seconds: float) -> float:
        return max(self._of_all(seconds))

    def _of_all(self, value: T) -> list[T]:
        if not dist.is_initialized():
            return [value]
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def _waits(self, call: Call) -> float | None:
        """The largest share, over the ranks, of a call in which no kernel but those of exchanges runs."""
        if self._case.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        kernels = [
            (event.time_range.start, event.time_range.end, is_exchange(event.name))
            for event in profile.events()
            if event.device_type == DeviceType.CUDA
        ]
        return max(self._of_all(exposed_share(kernels)))


def is_exchange(kernel: str) -> bool:
    """Whether a kernel or copy of this name, as the profiler gives it, belongs to an exchange between cards."""
    return any(word in kernel.lower() for word in ("nccl", "symmetric_memory", "ptop"))


def exposed_share(kernels: list[tuple[float, float, bool]]) -> float:
    """The share of the time from the first kernel to the last in which none runs but those of exchanges.

    `kernels`: begin, end, and whether it is an exchange. Waits for the other ranks are no kernels.
    """
    first, last = min(begin for begin, _, _ in kernels), max(end for _, end, _ in kernels)
    busy, until = 0.0, first
    for begin, end in sorted((begin, end) for begin, end, exchange in kernels if not exchange):
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return 1 - busy / (last - first)
