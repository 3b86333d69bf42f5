#!/usr/bin/env python
"""Benchmark the whole line on several GPUs: replicas of one stage each, against replicas that serve both stages.

    scripts/bench_line.py [--gpus 2] [--rows 12] [--layers 48] [--gemma-layers 6] [--shape 1088x1920x121] [--steps 15]
                          [--folder /tmp/ltx-ray-line] [--only split,both] [--limit 560] [--json figures.json]

The model has random weights at the released widths (scripts/bench/random_model.py). `ltx_ray.run.render` renders the
same manifest twice, each time in a process of its own on a private Ray cluster:

split  each replica serves one stage. Two GPUs have one replica in each stage pool; more are divided between the pools
       as the product divides them.
both   one replica on each GPU, which serves both stages in turns.

Both have one replica of text and one of decode, which share the GPUs. There is no preflight, so that all replicas load
at the same time. Kernels are compiled by the first run and cached for later ones. With --json, a run whose figures the
file holds is not made again; --only makes one run at a time.

clips/h          from the first stage-1 call to the end of the last clip's decoding. It includes filling and emptying
                 the line, which weigh less in a longer manifest.
idle             of each pool: one less the seconds of its calls over its replicas times that span. Merging other
                 weights is a part of the calls, and is printed as well.
why it was idle  parts of that share, as far as the events tell:
  loading                       the replica was not ready yet
  its clips were in STAGE       none was ready, and the foremost of them waited or ran there
  the next queue was full       a clip was ready, but as many waited for the next stage as a replica's queue holds
  a clip was ready              it was being handed over, or the replica did not serve its stage at the time
  no clip left                  every clip had begun its last call in this pool
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ltx_ray.placement.sizing import ParallelConfig, choose_replicas
from scripts.bench import clip_runs
from scripts.bench.clip_figures import device_name, known_figures, save_figures, time_and_commit, write_files
from scripts.bench.pool_times import STAGES, LineTimes, PoolTimes, read_line

_SPLIT, _BOTH = "split", "both"


def replicas(run: str, gpus: int) -> tuple[int, int]:
    """Replicas of stage 1 and of stage 2. 0 of stage 2: those of stage 1 serve both."""
    if run == _BOTH:
        return gpus, 0
    sizes = choose_replicas(ParallelConfig(), gpus, share_cards=True)
    return sizes.stage1, sizes.stage2


def measure(a: argparse.Namespace, run: str, files: dict[str, str]) -> LineTimes:
    """Render the manifest once."""
    stage1, stage2 = replicas(run, a.gpus)
    spec = {
        "numerics": {"device": a.device}, "parallel": {"stage1": stage1, "stage2": stage2}, "preflight": False,
    }  # fmt: skip
    rendered = clip_runs.render(a, files, a.folder / run, a.rows, a.limit, spec, "bench_line")
    return read_line(rendered.events, a.rows)


def table(found: Mapping[str, LineTimes]) -> str:
    """The runs side by side."""
    lines = [_line("", *found)]
    lines.append(_line("clips/h", *(f"{times.clips_per_hour:.1f}" for times in found.values())))
    lines.append(_line("seconds", *(f"{times.span:.1f}" for times in found.values())))
    for stage in STAGES:
        lines.append(_line(f"median {stage} call", *(f"{times.stages[stage]:.2f}" for times in found.values())))
    merged = (f"{times.switches} in {times.merging:.1f} s" for times in found.values())
    lines.append(_line("switches, all replicas", *merged))
    for pool in dict.fromkeys(pool for times in found.values() for pool in times.pools):
        pools = {run: times.pools.get(pool) for run, times in found.items()}
        lines.append(_line(f"{pool}: replicas", *(str(p.replicas) if p else "-" for p in pools.values())))
        lines.append(_line("  idle", *(f"{p.idle_share:.1%}" if p else "-" for p in pools.values())))
        for reason in dict.fromkeys(reason for p in pools.values() if p for reason in p.idle):
            lines.append(_line(f"    {reason}", *(_share(p, reason) for p in pools.values())))
    if len(found) == 2:
        lines.append(f"clips/h of both over split: {found[_BOTH].clips_per_hour / found[_SPLIT].clips_per_hour:.3f}")
    return "\n".join(lines)


def _line(name: str, *values: str) -> str:
    return f"{name:36}" + "".join(f"{value:>16}" for value in values)


def _share(pool: PoolTimes | None, reason: str) -> str:
    """The part of a pool's time in which it was idle for one reason."""
    if pool is None or reason not in pool.idle:
        return "-"
    return f"{pool.idle[reason] / (pool.busy + sum(pool.idle.values())):.1%}"


def restored(figures: Mapping[str, Any]) -> LineTimes:
    """The figures of a run as the JSON file holds them."""
    fields = {name: figures[name] for name in LineTimes.__dataclass_fields__}
    return LineTimes(**fields | {"pools": {name: PoolTimes(**pool) for name, pool in figures["pools"].items()}})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, help="GPUs, or on a CPU replicas of the DiT; 2 and more")
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--layers", type=int, default=48, help="blocks of the DiT")
    parser.add_argument("--gemma-layers", type=int, default=6, help="blocks of Gemma")
    parser.add_argument("--connector-layers", type=int, default=8)
    parser.add_argument("--shape", default="1088x1920x121", help="height x width x frames")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ltx-ray-line"), help="57 GB at 48 layers; kept")
    parser.add_argument("--only", default=f"{_SPLIT},{_BOTH}", help="runs to make, comma-separated (default: both)")
    parser.add_argument("--model", choices=["real", "toy"], default="real", help="toy: to try out the benchmark itself")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--limit", type=float, default=560.0, help="seconds that one run may take")
    parser.add_argument("--json", type=Path, help="file for the figures; those that it holds are not measured again")
    a = parser.parse_args()
    a.runs = list(dict.fromkeys(a.only.split(",")))
    if not set(a.runs) <= {_SPLIT, _BOTH}:
        parser.error(f"--only: {a.only}, legal: {_SPLIT}, {_BOTH}, or both with a comma")
    if a.gpus < 2:
        parser.error(f"--gpus: {a.gpus}, legal: 2 and more")
    if a.rows < 1:
        parser.error(f"--rows: {a.rows}, legal: 1 and more")
    if a.json and not a.json.parent.is_dir():
        parser.error(f"--json: {a.json}, the folder does not exist")
    if a.device == "cuda":
        _show_gpus(parser, a.gpus)
    a.size, a.folder = tuple(int(n) for n in a.shape.split("x")), a.folder.resolve()
    return a


def _show_gpus(parser: argparse.ArgumentParser, gpus: int) -> None:
    """Let the runs see the first `gpus` of the GPUs that this process sees."""
    import torch

    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus > count:
        parser.error(f"--gpus: {gpus}, but torch finds {count} GPUs")
    names = visible.split(",") if visible else [str(n) for n in range(count)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[:gpus])


def main() -> int:
    a = parse()
    of = (
        f"{a.gpus} x {device_name(a.device)}, {a.shape} {a.steps} steps, {a.rows} rows, {a.model} model, {a.layers} "
        f"layers, {a.gemma_layers} of Gemma, {a.connector_layers} of the connectors"
    )
    known, failed = known_figures(a.json, of), False
    print(of, flush=True)
    files: dict[str, str] = {}
    for run in a.runs:
        if run in known:
            print(f"{run}: from {a.json}, measured {known[run]['measured']}")
            continue
        since = time.monotonic()
        a.folder.mkdir(parents=True, exist_ok=True)
        files = files or write_files(a, a.folder, a.layers)
        written = time.monotonic()
        try:
            figures = asdict(measure(a, run, files))
        except (RuntimeError, AssertionError, OSError) as error:
            print(f"{run}: FAILED after {time.monotonic() - written:.0f} s: {error}", flush=True)
            failed = True
            continue
        known[run] = {**figures, "measured": time_and_commit()}
        took = time.monotonic() - written
        print(f"{run}: in {took:.0f} s, after {written - since:.0f} s for the model's files", flush=True)
        save_figures(a.json, of, known)
    found = {run: restored(known[run]) for run in (_SPLIT, _BOTH) if run in known}
    if found:
        print(table(found))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
