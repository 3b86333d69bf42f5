#!/usr/bin/env python
"""Benchmark passes of the DiT at many shapes, ours as the product runs them against the reference compiled.

    scripts/bench_shapes.py [--shapes 512x768x121,...] [--layers 12] [--repeat 5] [--check] [--record]

Shapes are HxWxFRAMES in pixels of the final clip; each is measured at the sizes of both stages. Ours replays small
passes from CUDA graphs. Weights are random bfloat16 at the released widths. All layers cost the same, so a few show the
ratio.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_ray.model.fused import FusedTransformer
from ltx_ray.model.graphs import GraphedTransformer
from ltx_ray.model.transformer import Modality
from ltx_ray.records import AV
from ltx_ray.shapes import ClipShape
from scripts.bench import dit_implementations, random_transformer
from scripts.bench.baselines import Baselines, check
from scripts.bench.dit_implementations import Case
from scripts.bench.passes import Velocities, best_attention, build_ours, errors, measure, on_host
from scripts.bench_dit import TEXT

SHAPES = "512x768x121,704x1280x121,1920x1088x121,1088x1920x65,512x768x257"


def cases(arguments: argparse.Namespace, device: torch.device) -> dict[str, Case]:
    """The cases by shape and stage."""
    metadata = random_transformer.metadata(arguments.layers)
    found: dict[str, Case] = {}
    for text in arguments.shapes.split(","):
        height, width, frames = (int(n) for n in text.split("x"))
        clip = ClipShape(frames, height, width, 24.0)
        for stage, shape in ((1, clip.half()), (2, clip)):
            found[f"{text} stage {stage}"] = Case.random(metadata, shape, TEXT, device, torch.bfloat16)
    return found


def ours(dit: GraphedTransformer, case: Case) -> Callable[[], AV[torch.Tensor]]:
    """A pass of our transformer. Each call copies the noise level, so that nothing is reused from the last call."""
    ropes = dit.ropes(case.positions, case.dtype)

    def modality(latent: torch.Tensor, context: torch.Tensor, tables: tuple) -> Modality:
        return Modality(latent, case.sigma.clone(), case.sigma.reshape(1, 1).clone(), context, *tables)

    return lambda: dit(case.latents.map(modality, case.contexts, ropes))


def measure_ours(
    todo: dict[str, Case], attention: str, arguments: argparse.Namespace
) -> tuple[dict[str, float], dict[str, Velocities]]:
    """Milliseconds and velocities of our transformer for each case."""
    first = next(iter(todo.values()))
    dit = GraphedTransformer(FusedTransformer(build_ours(first, "bf16"), attention))
    times, outputs = {}, {}
    for key, case in todo.items():
        call = ours(dit, case)
        call(), call()  # the second call captures the graph
        outputs[key] = on_host(call())
        times[key] = measure("ours", call, case.device, arguments.repeat, arguments.warm).ms
    return times, outputs


def build_reference(case: Case) -> nn.Module | None:
    """The reference's transformer, compiled; None when it is not installed."""
    missing = [module for module in dit_implementations.NEEDS["ltx-core"] if importlib.util.find_spec(module) is None]
    if missing:
        print(f"ltx-core: SKIPPED, not installed: {', '.join(missing)}")
        return None
    model = dit_implementations.ltx_core_model(case)
    dit_implementations.ltx_core_compiled(model)
    return model


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--warm", type=float, default=1.0, help="seconds of passes before those that are timed")
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure is 5 %% worse than its baseline")
    parser.add_argument("--record", action="store_true", help="write the figures to scripts/baselines.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_shapes needs a CUDA GPU, and torch finds none", file=sys.stderr)
        return 2
    device, name = torch.device("cuda"), torch.cuda.get_device_name()
    attention = best_attention(device)
    print(f"{name}, torch {torch.__version__}, {arguments.layers} layers, attention {attention}", flush=True)
    todo = cases(arguments, device)
    times, outputs = measure_ours(todo, attention, arguments)
    gc.collect()
    torch.cuda.empty_cache()
    reference = build_reference(next(iter(todo.values())))
    print(f"{'shape':28} {'tokens':>7} {'ours ms':>9} {'reference ms':>13} {'faster by':>9}  error (video, audio)")
    for key, case in todo.items():
        line = f"{key:28} {case.shape.video_tokens:7} {times[key]:9.2f}"
        if reference is not None:
            call = partial(dit_implementations.ltx_core_call(reference, case, "token"), False)
            error = errors(outputs[key], on_host(call()))
            theirs = measure("reference", call, device, arguments.repeat, arguments.warm).ms
            line += f" {theirs:13.2f} {theirs / times[key]:9.3f}  {error[0]:.1e} {error[1]:.1e}"
        print(line, flush=True)
    figures = {f"dit.{key.replace(' stage ', '.stage')}.layers{arguments.layers}.ms": ms for key, ms in times.items()}
    baselines = Baselines(name)
    code = check(baselines, figures) if arguments.check else 0
    if arguments.record:
        baselines.record(figures)
    return code


if __name__ == "__main__":
    sys.exit(main())
