#!/usr/bin/env python
"""Benchmark clips/h on one GPU, from the command to the mp4, against the reference's command on the same files.

    scripts/bench_clip.py [--layers 6,12] [--clips 4] [--shape 1088x1920x121] [--steps 15] [--precision bf16,fp8]
                          [--folder /tmp/ltx-ray-clip] [--against reference] [--reference .ref]
                          [--json figures.json] [--check] [--record]

The model has random weights at the released widths (scripts/bench/random_model.py) and --layers blocks. The release has
48; fewer take less disk and time. For each number of layers, both sides render the same files one after the other
(scripts/bench/clip_runs.py):

ours       `ltx_ray.run.render` of --clips rows in a process of its own, on a private Ray cluster with the product's own
           placement: on one card, text, decode and a replica that serves both stages in turns share it.
reference  `python -m ltx_pipelines.ti2vid_two_stages_hq` (v1.2.0) of one clip, one process per clip as its users run
           it: eager bfloat16, FlashAttention-3 where fa3_fwd is installed. --reference names a folder with ltx-core and
           ltx-pipelines below packages/.

Figures for 48 layers that were not measured are EXTRAPOLATED and labelled so. A part that depends on the number of
layers follows the line through two measured numbers of layers; from one, ours is multiplied by 48/n, which scales its
constant share too. The other parts take the reference's smallest and our largest measurement. All of this favours the
reference. Merging again counts as measured at 48 layers (bf16) with clean weights in pinned host memory, since they do
not fit beside text and decode on an 80 GB card. Gemma, which the reference loads for every clip and we once per run,
has as many blocks as the DiT unless --gemma-layers says otherwise; the release has 48 of both. The files are in the
page cache for both sides.

clip, pipeline full  the sum of the five parts above it: the medians of stage 1 and of stage 2 without concurrent
                     decoding, the slowdown by decoding another clip, merging again (both ways), and idle time
start                from the command to the first stage-1 call
                     (kernels are compiled by our first run and cached for later ones)
ready                from the command until a pool has a replica; "start of" and "later" are the parts of its start,
                     before and after that, several of which pass at once
first_decode         the first decode call, and its seconds over the median of the others
cold                 from weights loaded and text encoded to the end of the first stage-1 call, above a steady call
idle                 the DiT's replica had no call although a clip was waiting for it
other calls' share   the share of all calls' seconds outside the two stages: text, decoding, merging again
first to last        between the first and the last finished clip. With few clips this is not a steady rate: a replica
                     takes several clips through stage 1 before it switches, so the calls in between are all of stage 2.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.bench import clip_runs
from scripts.bench.baselines import Baselines, check
from scripts.bench.clip_figures import device_name, known_figures, save_figures, time_and_commit, write_files

RELEASED_LAYERS = 48
#: Seconds of merging again at 48 layers from clean weights and factors in pinned host memory (docs/benchmarks.md).
_MERGE_FROM_HOST = 0.844
_REFERENCE = "reference"
#: The parts of a clip that depend on the number of layers.
_LAYERED = {
    "ours": ("stage 1", "stage 2", "merging again, a clip"),
    _REFERENCE: ("text", "load for stage 1", "stage 1", "load for stage 2", "stage 2"),
}
#: The figures that --check compares with the baselines. Start-up depends on the machine's disk and caches.
_CHECKED = ("clip, pipeline full", "stage 1", "stage 2", "decode")
_RECORDED = (*_CHECKED, "start", "cold", "other calls' share")
#: Figures of one side by number of layers, and the same of every side as they are collected.
Runs = Mapping[int, Mapping[str, Any]]
Figures = dict[str, dict[int, dict[str, Any]]]


def total_of(side: str) -> str:
    """The name of the figure for a whole clip, of "reference" or of "ours" in one of its precisions."""
    return "clip, its command" if side == _REFERENCE else "clip, pipeline full"


def fit(seconds: Mapping[int, float]) -> tuple[float, float] | None:
    """(a, b) of seconds = a + b * layers by least squares. None with fewer than two numbers of layers."""
    if len(seconds) < 2:
        return None
    middle, level = mean(seconds), mean(seconds.values())
    b = sum((n - middle) * (s - level) for n, s in seconds.items()) / sum((n - middle) ** 2 for n in seconds)
    return level - b * middle, b


def extrapolate(side: str, runs: Runs) -> dict[str, float]:
    """Seconds by part at 48 layers, and their total. Empty when these were measured, or too little was."""
    if not runs or RELEASED_LAYERS in runs or (side == _REFERENCE and len(runs) < 2):
        return {}
    total = total_of(side)
    parts: dict[str, float] = {}
    for name in _LAYERED[side.split()[0]]:
        fitted = fit({n: figures[name] for n, figures in runs.items()})
        n = max(runs)
        parts[name] = fitted[0] + RELEASED_LAYERS * fitted[1] if fitted else runs[n][name] * RELEASED_LAYERS / n
    rests = [figures[total] - sum(figures[name] for name in parts) for figures in runs.values()]
    if side != _REFERENCE:
        switches = max(figures["switches"] / figures["clips"] for figures in runs.values())
        parts["merging again, a clip"] = max(parts["merging again, a clip"], switches * _MERGE_FROM_HOST)
    return {**parts, total: sum(parts.values()) + (min if side == _REFERENCE else max)(rests)}


def _table(side: str, runs: Runs) -> None:
    layers, extrapolated, total = sorted(runs), extrapolate(side, runs), total_of(side)
    print("\nthe reference's command" if side == _REFERENCE else f"\n{side}")
    print(f"{'seconds':28}" + "".join(f"{f'{n} layers':>11}" for n in layers)
          + (f"{'a':>9}{'b a layer':>11}{'48, EXTRAPOLATED':>18}" if extrapolated else ""))  # fmt: skip
    for name, value in runs[layers[0]].items():
        if not isinstance(value, float):
            print(f"{name:28}" + "; ".join(f"{n} layers: {runs[n][name]}" for n in layers))
            continue
        line = f"{name:28}" + "".join(f"{runs[n][name]:11.3f}" for n in layers)
        if name in extrapolated:
            fitted = fit({n: runs[n][name] for n in layers}) if name != total else None
            line += f"{fitted[0]:9.3f}{fitted[1]:11.4f}" if fitted else " " * 20
            line += f"{extrapolated[name]:18.2f}"
        print(line)


def _rates(arguments: argparse.Namespace, found: Mapping[str, Runs]) -> dict[str, float]:
    """Print the clips/h of every side, and ours over the reference's. Returns these ratios by case."""
    print("\nclips/h on one GPU: ours with the pipeline full, the reference one command per clip")
    ratios: dict[str, float] = {}
    theirs = _with_extrapolated(_REFERENCE, found.get(_REFERENCE, {}))
    for side, runs in found.items():
        for n, figures in sorted(_with_extrapolated(side, runs).items()):
            seconds = figures[total_of(side)]
            line = f"{n:3} layers  {side:10} {3600 / seconds:8.1f} ({seconds:.2f} s per clip)"
            if side != _REFERENCE and n in theirs:
                whole = theirs[n][total_of(_REFERENCE)] / seconds
                stages = _stages(theirs[n]) / _stages(figures)
                line += f"   ratio {whole:.2f}, of the two stages {stages:.2f}"
                case = f"clip {side.split()[1]} {arguments.case} {n} layers"
                if n not in runs or n not in found[_REFERENCE]:
                    used = sorted({*runs, *found[_REFERENCE]})
                    case += f" extrapolated from {','.join(map(str, used))}"
                    line += "   EXTRAPOLATED"
                ratios[f"{case}: rate over the reference's"] = whole
                ratios[f"{case}: the two stages' rate over the reference's"] = stages
            elif n not in runs:
                line += "   EXTRAPOLATED"
            print(line)
            if side != _REFERENCE and n in runs:
                took = figures["command to last mp4"]
                print(f"{'':22}{3600 * figures['clips'] / took:8.1f} from the command on: {figures['clips']} clips in "
                      f"{took:.1f} s, start-up and the last decoding included")  # fmt: skip
    return ratios


def _with_extrapolated(side: str, runs: Runs) -> dict[int, Mapping[str, Any]]:
    extrapolated = extrapolate(side, runs)
    return {**runs, RELEASED_LAYERS: extrapolated} if extrapolated else dict(runs)


def _stages(figures: Mapping[str, Any]) -> float:
    return figures["stage 1"] + figures["stage 2"] + figures.get("slower beside decoding", 0.0)


def _judge(arguments: argparse.Namespace, found: Mapping[str, Runs]) -> int:
    ratios = _rates(arguments, found)
    named = {
        name: {
            f"clip {side.split()[1]} {arguments.case} {n} layers: {name}": figures[name]
            for side, runs in found.items()
            if side != _REFERENCE
            for n, figures in runs.items()
        }
        for name in _RECORDED
    }
    baselines, code = Baselines(device_name(arguments.device)), 0
    if arguments.check:
        code = check(baselines, {case: value for name in _CHECKED for case, value in named[name].items()})
        if ratios:
            code |= check(baselines, ratios, lower_is_better=False)
    if arguments.record:
        recorded = {case: value for cases in named.values() for case, value in cases.items()}
        baselines.record({case: round(value, 4) for case, value in {**recorded, **ratios}.items()})
    return code


def main() -> int:
    arguments = _arguments()
    before = known_figures(arguments.json, _identity(arguments))
    known = {side: {int(n): run for n, run in runs.items()} for side, runs in before.items()}
    if not known:
        shutil.rmtree(arguments.folder / "caches", ignore_errors=True)
    deadline, failed = time.monotonic() + arguments.budget, False
    print(f"{device_name(arguments.device)}, {arguments.case}, {arguments.clips} clips, {arguments.model} model")
    for layers in arguments.layers:
        failed |= _measure(arguments, layers, known, deadline)
    asked = {side: {n: known[side][n] for n in arguments.layers if n in known[side]}
             for side in arguments.sides if side in known}  # fmt: skip
    found = {side: runs for side, runs in asked.items() if runs}
    for side, runs in found.items():
        _table(side, runs)
    return _judge(arguments, found) | failed


def _measure(arguments: argparse.Namespace, layers: int, known: Figures, deadline: float) -> bool:
    """Measure at `layers` the sides that `known` lacks, and add their figures. True when a side failed."""
    folder, failed = arguments.folder / f"layers-{layers}", False
    for side in arguments.sides:
        if layers in known.get(side, {}):
            print(f"{layers} layers: {side} from {arguments.json}, measured {known[side][layers]['measured']}")
    missing = [side for side in arguments.sides if layers not in known.get(side, {})]
    files: dict[str, str] = {}
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        since = time.monotonic()
        files = write_files(arguments, folder, layers)
        print(f"{layers} layers: files in {time.monotonic() - since:.0f} s", flush=True)
    for side in missing:
        since = time.monotonic()
        # A run that would be cut off is not worth the figures measured so far.
        limit = min(arguments.limit, deadline - since)
        try:
            if limit <= 0:
                raise RuntimeError(f"the {arguments.budget:.0f} s of --budget are used up")
            if side == _REFERENCE:
                figures = clip_runs.reference(arguments, files, folder, limit)
            else:
                figures = clip_runs.ours(arguments, files, folder, limit, precision=side.split()[1])
        except (RuntimeError, AssertionError, OSError) as error:
            print(f"{layers} layers: {side} FAILED after {time.monotonic() - since:.0f} s: {error}", flush=True)
            failed = True
            continue
        known.setdefault(side, {})[layers] = {**figures, "measured": time_and_commit()}
        print(f"{layers} layers: {side} in {time.monotonic() - since:.0f} s", flush=True)
        save_figures(arguments.json, _identity(arguments), known)
    if not arguments.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return failed


def _identity(arguments: argparse.Namespace) -> str:
    """The settings in which comparable figures agree."""
    depths = f"{arguments.gemma_layers or 'as many'} layers of Gemma, {arguments.connector_layers} of the connectors"
    return (
        f"{device_name(arguments.device)}, {arguments.case}, {arguments.clips} clips, {arguments.model} model, {depths}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers",
        default="6,12",
        help="numbers of blocks, comma-separated; two or more allow extrapolating to 48 by a line",
    )
    parser.add_argument("--clips", type=int, default=4, help="clips in a run of ours; at least 3 for a steady one")
    parser.add_argument("--shape", default="1088x1920x121", help="height x width x frames")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument(
        "--precision", default="bf16", help="of ours, comma-separated: bf16, fp8; the reference has bf16"
    )
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ltx-ray-clip"), help="24 GB at 12 layers, 77 at 48")
    parser.add_argument("--against", choices=["reference", "none"], default="reference")
    parser.add_argument(
        "--reference", type=Path, default=ROOT / ".ref", help="folder with the reference's packages/ltx-core/src …"
    )
    parser.add_argument("--model", choices=["real", "toy"], default="real", help="toy: to try out the benchmark itself")
    parser.add_argument("--gemma-layers", type=int, help="blocks of Gemma (default: as many as --layers says)")
    parser.add_argument("--connector-layers", type=int, default=8)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds that one run may take")
    parser.add_argument(
        "--budget", type=float, default=560.0, help="seconds for all runs; the table is printed when they are used up"
    )
    parser.add_argument("--keep", action="store_true", help="leave files, clips and logs in --folder")
    parser.add_argument("--json", type=Path, help="file for the figures; those that it holds are not measured again")
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure is worse than its baseline")
    parser.add_argument("--record", action="store_true", help="make the figures the baselines of this GPU model")
    arguments = parser.parse_args()
    arguments.layers = sorted({int(n) for n in arguments.layers.split(",")})
    precisions = list(dict.fromkeys(name.strip() for name in arguments.precision.split(",")))
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json: {arguments.json}, the folder does not exist")
    if not set(precisions) <= {"bf16", "fp8"}:
        parser.error(f"--precision: {arguments.precision}, legal: bf16, fp8, or both with a comma")
    arguments.sides = [f"ours {name}" for name in precisions]
    arguments.sides += [_REFERENCE] if arguments.against == "reference" else []
    arguments.size = tuple(int(n) for n in arguments.shape.split("x"))
    arguments.reference, arguments.folder = arguments.reference.resolve(), arguments.folder.resolve()
    if arguments.against == "reference" and not (arguments.reference / "packages" / "ltx-core" / "src").is_dir():
        parser.error(f"--reference: {arguments.reference}, has no packages/ltx-core/src; or give --against none")
    arguments.case = f"{arguments.shape} {arguments.steps} steps"
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
