#!/usr/bin/env python
"""Benchmark a pass of the DiT against ltx_core, diffusers, and its own matrix products and attention, in one run.

    scripts/bench_dit.py --stage 2 --against ltx-core,diffusers --compile-peers [--precision fp8] [--graphs]

Needs one CUDA GPU. All sides have the same random weights at the released widths, generated from the parameters' names,
so that only one side's are in memory at a time. Passes are text-to-video at sigma 0.7, batch 1, 1,024 text tokens. In
stage 1, with half the height and width of --shape, two passes are measured: the full pass ("cond") and the pass without
attention between the streams ("isolated"). Times are medians of CUDA events between consecutive passes without a pause.
With --tp, --sequence-parallel or --guidance-parallel a gang of as many cards is measured beside one of them
(scripts/bench/gang.py), with --rank-alone one of its ranks without the others (scripts/bench/rank_alone.py). Of these,
and of the one card beside them, passes of up to 20,000 tokens a rank are CUDA graphs, as in a run. --step measures a
call of stage 1 with all its guidance passes (scripts/bench/guided_step.py).
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
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_ray.model.attention_backends import BACKENDS, attention_backend
from ltx_ray.model.divided_attention import head_groups
from ltx_ray.model.fused import row_pieces
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
    as_in_a_run,
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
from scripts.bench.rank_alone import OneRank, RankAlone, counted
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

    def run_alone(self, layouts: Sequence[tuple[str, int]]) -> dict[tuple[str, str], RankAlone]:
        """Measure one card, then for each of `layouts` ("tp" or "sp", ranks) a rank without the others of its gang.

        Keys are passes and layouts, such as ("cond", "tp2").
        """
        whole = self._run_alone("one card", SINGLE_RANK, SINGLE_RANK)
        found = {}
        for kind, ranks in layouts:
            transport = Alone(ranks)
            group = RankGroup(0, ranks, transport)
            tp, tokens = (group, SINGLE_RANK) if kind == "tp" else (SINGLE_RANK, group)
            rank = self._run_alone(f"{kind}{ranks}", tp, tokens, transport)
            for name in self.passes:
                of_rank, of_whole = rank[name], whole[name]
                found[name, f"{kind}{ranks}"] = RankAlone(
                    ranks, of_whole.ours, of_whole.skeleton, of_rank.ours, of_rank.skeleton,
                    of_rank.calls, of_rank.nbytes, self.case.config.num_layers, self._pieces(kind, ranks, name),
                )  # fmt: skip
        return found

    def _pieces(self, kind: str, ranks: int, name: str) -> int:
        """The exchanges of a block that only continue another one, as rows and heads are exchanged in pieces."""
        tokens, heads = self.case.shape.video_tokens, self.case.config.video.heads
        if kind == "tp":
            return (row_pieces(tokens) - 1) * (8 if name == "cond" else 6)
        return (head_groups(heads // ranks, tokens) - 1) * 2

    def _run_alone(
        self, side: str, tp: RankGroup, tokens: RankGroup, transport: Alone | None = None
    ) -> dict[str, OneRank]:
        case, a = self.case, self.arguments
        lengths = Lengths(case.shape.video_tokens, case.shape.audio_latents, TEXT)
        attend = attention_backend(a.attention, case.device)
        model = build_ours(case, a.precision, tp)
        call = call_ours(case, model, a.attention, False, tokens)
        found = {}
        for name in self.passes:
            calls = plan(model, lengths, name == "isolated", tokens.size)
            if transport is None:
                self.flops[name] = flops(calls)
            times: list[float] = []
            for which, launched in (("ours", partial(call, name == "isolated")), ("skeleton", Skeleton(calls, attend))):
                run, label = as_in_a_run(launched, case, tp.size * tokens.size)
                times.append(self._time(name, f"{which}, {side}{label}", run).ms)
                del run
            exchanges: tuple[dict[str, int], dict[str, int]] = ({}, {})
            if transport is not None:
                counted(transport)
                call(name == "isolated")
                exchanges = counted(transport)
            found[name] = OneRank(times[0], times[1], *exchanges)
        del model, call
        self._free()
        return found

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


def _numbers(text: str) -> list[int]:
    """Numbers of ranks, separated by commas."""
    return [int(number) for number in text.split(",")]


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
    parser.add_argument(
        "--graphs", action="store_true", help="also run ours and the skeleton as CUDA graphs, on one card"
    )
    parser.add_argument("--tp", type=_numbers, default=[1], help="ranks that share the weights")
    parser.add_argument("--sequence-parallel", type=_numbers, default=[1], help="ranks that share the tokens")
    parser.add_argument("--guidance-parallel", type=int, default=1, help="ranks that share the passes of a --step")
    parser.add_argument(
        "--rank-alone", action="store_true", help="one of these ranks without the others; --tp 2,4 takes turns"
    )
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
    a.alone = [(kind, n) for kind, ranks in (("tp", a.tp), ("sp", a.sequence_parallel)) for n in ranks if n > 1]
    if not a.rank_alone and len(a.tp) * len(a.sequence_parallel) > 1:
        parser.error("several numbers of ranks take turns with --rank-alone only")
    a.tp, a.sequence_parallel = a.tp[0], a.sequence_parallel[0]
    a.ranks = a.tp * a.sequence_parallel * a.guidance_parallel
    if a.plain and (a.precision == "fp8" or a.ranks > 1 or a.step):
        parser.error("--plain has no fp8, no --step and no gangs")
    if a.rank_alone and (not a.alone or a.step):
        parser.error("--rank-alone takes --tp N or --sequence-parallel N, and no --step")
    if a.step and a.stage != 1:
        parser.error("--step and --guidance-parallel are of --stage 1")
    if (a.ranks > 1 or a.step) and a.against:
        parser.error("--against is for passes of one card")
    if a.graphs and (a.rank_alone or a.ranks > 1 or a.step):
        parser.error("--graphs is for passes of one card; those of gangs are graphs where a run's are")
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
    for (name, layout), found in bench.run_alone(a.alone).items():
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
