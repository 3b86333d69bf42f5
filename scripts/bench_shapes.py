#!/usr/bin/env python
"""Passes of the DiT at many shapes, ours as the product makes them against the reference compiled, in one run.

    scripts/bench_shapes.py [--shapes 512x768x121,...] [--layers 12] [--repeat 5] [--check] [--record]

Shapes are HxWxFRAMES in pixels of the final clip; each is measured at both stages' sizes. Ours replays small passes
from CUDA graphs. Random bfloat16 weights at real widths; a layer is like any other, so few of them show the ratio.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_ray.model.fused import FusedTransformer
from ltx_ray.model.graphs import GraphedTransformer
from ltx_ray.model.transformer import Modality
from ltx_ray.shapes import ClipShape
from scripts.bench import dit_implementations, random_transformer
from scripts.bench.baselines import Baselines, check
from scripts.bench.dit_implementations import Case
from scripts.bench_dit import TEXT, _best_attention, build_ours, errors, measure, on_host

SHAPES = "512x768x121,704x1280x121,1920x1088x121,1088x1920x65,512x768x257"


def cases(arguments: argparse.Namespace, device: torch.device) -> dict[str, Case]:
    """By shape and stage."""
    metadata, found = random_transformer.metadata(arguments.layers), {}
    for text in arguments.shapes.split(","):
        height, width, frames = (int(n) for n in text.split("x"))
        clip = ClipShape(frames, height, width, 24.0)
        for stage, shape in ((1, clip.half()), (2, clip)):
            found[f"{text} stage {stage}"] = Case.random(metadata, shape, TEXT, device, torch.bfloat16)
    return found


def ours(dit: GraphedTransformer, case: Case):
    """A call with a noise level of its own."""
    ropes = dit.ropes(case.positions, case.dtype)

    def modality(latent: torch.Tensor, context: torch.Tensor, tables: tuple) -> Modality:
        return Modality(latent, case.sigma.clone(), case.sigma.reshape(1, 1).clone(), context, *tables)

    return lambda: dit(case.latents.map(modality, case.contexts, ropes))


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--warm", type=float, default=1.0, help="seconds of passes before those that count")
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure is 5 %% worse than its baseline")
    parser.add_argument("--record", action="store_true", help="write the figures to scripts/baselines.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_shapes needs a CUDA GPU, and this Python sees none", file=sys.stderr)
        return 2
    device, name = torch.device("cuda"), torch.cuda.get_device_name()
    attention = _best_attention(device)
    print(f"{name}, torch {torch.__version__}, {arguments.layers} layers, attention {attention}", flush=True)
    todo = cases(arguments, device)
    first = next(iter(todo.values()))
    dit = GraphedTransformer(FusedTransformer(build_ours(first, "bf16"), attention))
    times, outputs = {}, {}
    for key, case in todo.items():
        call = ours(dit, case)
        call(), call()  # the second one is made into a graph
        outputs[key] = on_host(call())
        times[key] = measure("ours", call, device, arguments.repeat, arguments.warm).ms
    del dit, call
    gc.collect()
    torch.cuda.empty_cache()
    figures = {f"dit.{key.replace(' stage ', '.stage')}.layers{arguments.layers}.ms": ms for key, ms in times.items()}
    missing = [module for module in dit_implementations.NEEDS["ltx-core"] if importlib.util.find_spec(module) is None]
    peer = None
    if missing:
        print(f"ltx-core: SKIPPED, this Python has no {', '.join(missing)}")
    else:
        peer = dit_implementations.ltx_core_model(first)
        dit_implementations.ltx_core_compiled(peer)
    print(f"{'shape':28} {'tokens':>7} {'ours ms':>9} {'reference ms':>13} {'faster by':>9}  error (video, audio)")
    for key, case in todo.items():
        line = f"{key:28} {case.shape.video_tokens:7} {times[key]:9.2f}"
        if peer is not None:
            call = partial(dit_implementations.ltx_core_call(peer, case, "token"), False)
            found = errors(outputs[key], on_host(call()))
            theirs = measure("reference", call, device, arguments.repeat, arguments.warm).ms
            line += f" {theirs:13.2f} {theirs / times[key]:9.3f}  {found[0]:.1e} {found[1]:.1e}"
        print(line, flush=True)
    baselines = Baselines(name)
    code = check(baselines, figures) if arguments.check else 0
    if arguments.record:
        baselines.record(figures)
    return code


if __name__ == "__main__":
    sys.exit(main())
