#!/usr/bin/env python
"""Benchmark a pass of the DiT against ltx_core, diffusers, and its own matrix products and attention, in one run.

    scripts/bench_dit.py --stage 2 --against ltx-core,diffusers --compile-peers [--precision fp8] [--graphs]

Needs one CUDA GPU. All sides have the same random weights at the released widths, generated from the parameters' names,
so that only one side's are in memory at a time. Passes are text-to-video at sigma 0.7, batch 1, 1,024 text tokens. In
stage 1, with half the height and width of --shape, two passes are measured: the full pass ("cond") and the pass without
attention between the streams ("isolated"). Times are medians of CUDA events between consecutive passes without a pause.
With --tp, --sequence-parallel or --guidance-parallel a gang of as many cards is measured beside one of them
(scripts/bench/gang.py), with --rank-alone one of its ranks without the others (scripts/bench/rank_alone.py). --step
measures a call of stage 1 with all its guidance passes (scripts/bench/guided_step.py).
The skeleton (scripts/bench/skeleton.py) runs before and after ours to reveal drifting clocks. ltx_core is the reference
v1.2.0 from PYTHONPATH, called as its pipelines call it: with the attention backend that it chooses itself, and with a
timestep for every token (--peer-levels one: one for all).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import itertools
import json
import statistics
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_ray.model.attention_backends import BACKENDS, attention_backend
from ltx_ray.parallel.collectives import SINGLE_RANK, Alone, RankGroup
from ltx_ray.parallel.fp8 import row_scale_of
from scripts.bench import dit_implementations, gang, guided_step
from scripts.bench.baselines import Baselines, check
from scripts.bench.dit_implementations import Case
from scripts.bench.passes import (
    GIB,
    Call,
    Row,
    Velocities,
    best_attention,
    build_ours,
    call_ours,
    errors,
    graphed,
    measure,
    on_host,
    pass_names,
    random_case,
    weights_gib,
)
from scripts.bench.rank_alone import RankAlone, counted
from scripts.bench.skeleton import Lengths, Skeleton, flops, plan

TEXT = 1024


class Bench:
    """The measurements of each pass, and the velocities that each side computed."""

    def __init__(self, case: Case, arguments: argparse.Namespace):
        self.case, self.arguments = case, arguments
        self.passes = pass_names(arguments.stage)
        self.rows: dict[str, list[Row]] = {name: [] for name in self.passes}
        self.outputs: dict[str, dict[str, Velocities]] = {name: {} for name in self.passes}
        self.flops: dict[str, int] = {}
        self.failed = False

    def run_ours(self) -> frozenset[str]:
        """Measure the skeleton, ours, and the skeleton again. Returns the names of the layers stored in fp8."""
        fp8 = self._run_ours()
        self._free()
        return fp8

    def _run_ours(self) -> frozenset[str]:
        case, a = self.case, self.arguments
        model = build_ours(case, a.precision)
        attend = attention_backend(a.attention, case.device)
        lengths = Lengths(case.shape.video_tokens, case.shape.audio_latents, TEXT)
        call = call_ours(case, model, a.attention, a.plain)
        for name in self.passes:
            calls = plan(model, lengths, name == "isolated")
            self.flops[name] = flops(calls)
            skeleton, ours = Skeleton(calls, attend), partial(call, name == "isolated")
            self._time(name, "skeleton", skeleton)
            self.outputs[name]["ours"] = on_host(ours())
            self._time(name, "ours", ours).weights_gib = weights_gib(model)
            if a.graphs:
                with self._recorded_failure("the CUDA graph"):
                    replay = graphed(ours)
                    self._time(name, "ours, graph", replay)
                    self.outputs[name]["ours, graph"] = on_host(replay())
                    self._time(name, "skeleton, graph", graphed(skeleton))
                    del replay
            self._time(name, "skeleton again", skeleton)
        return frozenset(k.removesuffix(".weight") for k, p in model.named_parameters() if row_scale_of(p) is not None)

    def run_alone(self, tp: int, sequence: int) -> dict[str, RankAlone]:
        """Measure one card, then a rank without the others of its gang."""
        case, a = self.case, self.arguments
        attend = attention_backend(a.attention, case.device)
        lengths = Lengths(case.shape.video_tokens, case.shape.audio_latents, TEXT)
        transport = Alone(tp * sequence)
        group = RankGroup(0, tp * sequence, transport)
        measured: dict[str, list[float]] = {name: [] for name in self.passes}
        exchanges = {}
        for ranks in (1, tp * sequence):
            alone = ranks > 1
            model = build_ours(case, a.precision, group if alone and tp > 1 else SINGLE_RANK)
            call = call_ours(case, model, a.attention, False, group if alone and sequence > 1 else SINGLE_RANK)
            for name in self.passes:
                calls = plan(model, lengths, name == "isolated", sequence if alone else 1)
                self.flops[name] = flops(calls)
                side = f" of {ranks}" if alone else ""
                for which, run in (("ours", partial(call, name == "isolated")), ("skeleton", Skeleton(calls, attend))):
                    rows = [self._time(name, which + side, run)]
                    if a.graphs:
                        rows.append(self._time(name, f"{which}{side}, graph", graphed(run)))
                    measured[name].append(min(row.ms for row in rows))
                counted(transport)
                call(name == "isolated")
                exchanges[name] = counted(transport)
            del model, call
            self._free()

        def of_pass(name: str) -> RankAlone:
            whole, whole_skeleton, rank, rank_skeleton = measured[name]
            found = tp * sequence, whole, whole_skeleton, rank, rank_skeleton
            return RankAlone(*found, *exchanges[name], case.config.num_layers)

        return {name: of_pass(name) for name in self.passes}

    def run_peer(self, name: str, fp8: frozenset[str]) -> None:
        missing = [module for module in dit_implementations.NEEDS[name] if importlib.util.find_spec(module) is None]
        if missing:
            print(f"{name}: SKIPPED, not installed: {', '.join(missing)}")
            return
        with self._recorded_failure(name):
            self._run_peer(name, fp8)
        self._free()

    def _run_peer(self, name: str, fp8: frozenset[str]) -> None:
        a = self.arguments
        peer = dit_implementations.BUILDERS[name](self.case, fp8=fp8, compiled=a.compile_peers, levels=a.peer_levels)
        print(f"{name}: {peer.note}", flush=True)
        for which in self.passes:
            isolated = which == "isolated"
            if isolated in peer.exact:
                self.outputs[which][f"{name} in bf16"] = on_host(peer.exact[isolated])
            self.outputs[which][peer.side] = on_host(peer.call(isolated))
            row = self._time(which, peer.side, partial(peer.call, isolated))
            row.weights_gib = weights_gib(peer.model)
            row.error = errors(self.outputs[which]["ours"], self.outputs[which][peer.side])

    @contextlib.contextmanager
    def _recorded_failure(self, what: str) -> Iterator[None]:
        """Print an exception and make the exit code 1, but let the other sides be measured."""
        try:
            yield
        except Exception:
            traceback.print_exc()
            print(f"{what}: FAILED, see above", flush=True)
            self.failed = True

    def _free(self) -> None:
        torch.compiler.reset()
        gc.collect()
        if self.case.device.type == "cuda":
            torch.cuda.empty_cache()
            held = torch.cuda.memory_allocated(self.case.device) / GIB
            if held > 1:
                print(f"note: {held:.1f} GiB are still allocated between two sides")

    def _time(self, name: str, side: str, call: Call) -> Row:
        a = self.arguments
        row = measure(side, call, self.case.device, a.repeat, a.warm)
        self.rows[name].append(row)
        print(f"  {name:8} {side:18} {row.ms:9.2f} ms  ({min(row.passes):.2f} to {max(row.passes):.2f})", flush=True)
        return row

    def _row(self, name: str, side: str) -> Row:
        return next(row for row in self.rows[name] if row.side == side)

    def floor(self, name: str) -> float:
        """The skeleton's milliseconds: the median of both its runs, or its graph's when that is less."""
        both = [ms for row in self.rows[name] if row.side in ("skeleton", "skeleton again") for ms in row.passes]
        return min([statistics.median(both), *(row.ms for row in self.rows[name] if row.side == "skeleton, graph")])

    def figures(self) -> dict[str, float]:
        """Case -> figure of our side, for the baselines; lower is better for all of them."""
        found: dict[str, float] = {}
        for name in self.passes:
            key = self.arguments.key + ("" if name == "cond" else f".{name}")
            ours = self._row(name, "ours")
            found |= {f"{key}.ms": ours.ms, f"{key}.x_skeleton": ours.ms / self.floor(name)}
            if ours.pass_gib is not None:
                found[f"{key}.pass_gib"] = ours.pass_gib
            found |= {f"{key}.graph_ms": row.ms for row in self.rows[name] if row.side == "ours, graph"}
        return found

    def table(self) -> str:
        lines = []
        for name in self.passes:
            ours, floor = self._row(name, "ours").ms, self.floor(name)
            lines += [
                "", f"stage {self.arguments.stage}, {name}: {self.flops[name] / 1e12:.5g} TFLOP",
                f"{'side':20} {'ms':>9} {'TFLOP/s':>8} {'/skeleton':>9} {'/ours':>6} "
                f"{'weights':>8} {'pass':>8} {'our error':>19}",
            ]  # fmt: skip
            for row in self.rows[name]:
                error = "/".join(f"{e:.2e}" for e in row.error) if row.error else ""
                gib = ["" if g is None else f"{g:.2f}" for g in (row.weights_gib, row.pass_gib)]
                lines.append(
                    f"{row.side:20} {row.ms:9.2f} {self.flops[name] / row.ms / 1e9:8.0f} {row.ms / floor:9.3f} "
                    f"{row.ms / ours:6.3f} {gib[0]:>8} {gib[1]:>8} {error:>19}"
                )
        return "\n".join(lines)

    def distances(self) -> dict[str, tuple[float, float]]:
        """Relative L2 error (video, audio) between any two sides: ours to a peer, and the peers to each other."""
        return {
            f"{name}: {found} against {expected}": errors(self.outputs[name][found], self.outputs[name][expected])
            for name in self.passes
            for found, expected in itertools.combinations(self.outputs[name], 2)
        }


def parse() -> argparse.Namespace:
    """The command line, with defaults resolved and `key`, the name of the case in the baselines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True)
    parser.add_argument("--against", default="", help="ltx-core, diffusers, or both with a comma")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp8"))
    parser.add_argument("--attention", default="auto", choices=(*BACKENDS, "auto"))
    parser.add_argument("--shape", help="HxWxFRAMES in pixels of the final clip (default: 1088x1920x121)")
    parser.add_argument("--compile-peers", action="store_true")
    parser.add_argument("--peer-levels", default="token", choices=("token", "one"))
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--warm", type=float, default=2.0, help="seconds of passes before those that are timed")
    parser.add_argument("--graphs", action="store_true", help="also run ours and the skeleton as CUDA graphs")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share the weights")
    parser.add_argument("--sequence-parallel", type=int, default=1, help="ranks that share the tokens")
    parser.add_argument("--guidance-parallel", type=int, default=1, help="ranks that share the passes of a --step")
    parser.add_argument("--rank-alone", action="store_true", help="one of these ranks, without the others")
    parser.add_argument("--step", choices=guided_step.PIPELINES, help="a guided call of this pipeline's stage 1")
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure is 5 %% worse than its baseline")
    parser.add_argument("--record", action="store_true", help="write the figures to scripts/baselines.json")
    parser.add_argument("--json", type=Path)
    # To try out the script on any device, at small widths, or with the plain forward.
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help="use our plain forward in place of the fused one")
    a = parser.parse_args()
    a.against = [name for name in a.against.split(",") if name]
    if unknown := set(a.against) - set(dit_implementations.BUILDERS):
        parser.error(f"--against {','.join(sorted(unknown))}; legal: {', '.join(dit_implementations.BUILDERS)}")
    a.shape = a.shape or ("128x192x17" if a.tiny else "1088x1920x121")
    if a.guidance_parallel > 1:
        a.step = a.step or "hq"
    a.ranks = a.tp * a.sequence_parallel * a.guidance_parallel
    if a.plain and (a.precision == "fp8" or a.ranks > 1 or a.step):
        parser.error("--plain has no fp8, no --step and no gangs")
    if a.rank_alone and (a.ranks == 1 or a.step or (a.tp > 1 and a.sequence_parallel > 1)):
        parser.error("--rank-alone takes --tp N or --sequence-parallel N, and no --step")
    if a.step and a.stage != 1:
        parser.error("--step and --guidance-parallel are of --stage 1")
    if (a.ranks > 1 or a.step) and a.against:
        parser.error("--against is for passes of one card")
    on_cuda = torch.device(a.device).type == "cuda"
    if on_cuda and not torch.cuda.is_available():
        print("bench_dit needs a CUDA GPU, and torch finds none", file=sys.stderr)
        raise SystemExit(2)
    if on_cuda and not a.rank_alone and a.ranks > torch.cuda.device_count():
        print(f"{a.ranks} ranks need as many GPUs, and torch finds {torch.cuda.device_count()}", file=sys.stderr)
        raise SystemExit(2)
    best = best_attention(torch.device(a.device))
    chosen = best if a.attention == "auto" else a.attention
    a.key = f"dit.stage{a.stage}.{a.precision}.{a.shape}.layers{a.layers}"
    # Settings that make this a case of its own, with other baselines.
    unusual = {chosen: chosen != best, "plain": a.plain, "tiny": a.tiny, a.dtype: a.dtype != "bfloat16"}
    a.key += "".join(f".{word}" for word, holds in unusual.items() if holds)
    a.attention = chosen
    return a


def alone(bench: Bench, device: str) -> int:
    """Measure, print and record a rank without the others of its gang."""
    a, figures = bench.arguments, dict[str, float]()
    layout = f"tp{a.tp}" if a.tp > 1 else f"sp{a.sequence_parallel}"
    for name, found in bench.run_alone(a.tp, a.sequence_parallel).items():
        key = a.key + ("" if name == "cond" else f".{name}") + f".{layout}.alone"
        figures |= {f"{key}.{figure}": value for figure, value in found.figures.items()}
        print(found.table(f"stage {a.stage}, {name}, {layout}"))
    return reported(a, device, figures, {"flops": bench.flops})


def of_gang(a: argparse.Namespace, device: str) -> int:
    """Measure, print and record a gang of ranks on cards of their own, or a guided step."""
    figures = dict[str, float]()
    for name, found in gang.measure_gang(a, TEXT).items():
        key = a.key + ("" if name == "cond" else f".{name}") + (f".{found.layout}" if a.ranks > 1 else "")
        figures |= {f"{key}.{figure}": value for figure, value in found.figures.items()}
        print(found.table(f"stage {a.stage}, {name}"))
    return reported(a, device, figures)


def reported(a: argparse.Namespace, device: str, figures: dict[str, float], more: dict[str, object] = {}) -> int:  # noqa: B006 (read only)
    """Record the figures where that is asked for. Returns the exit code."""
    baselines = Baselines(device)
    timed = {key: value for key, value in figures.items() if key.endswith((".ms", ".x_skeleton"))}
    if a.record:
        baselines.record(timed)
    if a.json:
        about = {"device": device, "torch": torch.__version__, "case": a.key, "attention": a.attention}
        a.json.write_text(json.dumps(about | more | {"figures": figures}, indent=1))
    return check(baselines, timed) if a.check else 0


@torch.inference_mode()
def main() -> int:
    a = parse()
    device = torch.device(a.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    case = random_case(a, TEXT, device)
    tokens = f"{case.shape.video_tokens} video, {case.shape.audio_latents} audio and {TEXT} text tokens"
    print(f"{name}, torch {torch.__version__}: {tokens}, {a.key}, attention {a.attention}")
    bench = Bench(case, a)
    if a.rank_alone:
        return alone(bench, name)
    if a.ranks > 1 or a.step:
        return of_gang(a, name)
    fp8 = bench.run_ours()
    for peer in a.against:
        bench.run_peer(peer, fp8)
    print("\nrelative L2 error (video, audio) between ours and the peers, and between the peers:")
    distances = bench.distances()
    for pair, (video, audio) in distances.items():
        print(f"  {pair:60} {video:.3e} {audio:.3e}")
    figures, baselines = bench.figures(), Baselines(name)
    code = check(baselines, figures) if a.check else 0
    if a.record:
        baselines.record(figures)
    if a.json:
        rows = {which: [asdict(row) | {"ms": row.ms} for row in rows] for which, rows in bench.rows.items()}
        found = {"device": name, "torch": torch.__version__, "case": a.key, "attention": a.attention, "rows": rows}
        found |= {"flops": bench.flops, "figures": figures, "distances": distances}
        a.json.write_text(json.dumps(found, indent=1))
    print(bench.table())
    return 1 if bench.failed else code


if __name__ == "__main__":
    sys.exit(main())
