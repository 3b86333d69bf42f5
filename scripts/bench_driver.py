#!/usr/bin/env python
"""Benchmark the driver without GPUs: planning, memory, decisions, and a comparison with Ray Data.

    scripts/bench_driver.py [--only planning,memory,policy,simulation,ray-data] [--rows 1000000] ...
    scripts/bench_driver.py --against CLONE [--rows 100000] [--completions 20000] [--repeat 5]

planning   Rows a second from a Parquet manifest to planned rows: `Plan.open` until it is exhausted. Target: 50,000.
memory     Anonymous and shared memory of the process and its children, after garbage collection and trimming: what
           planning holds above the start at --rows rows, and what each row adds from there to twice as many. Targets:
           300 MB at a million rows, 24 bytes for each row beyond.
policy     Rows a second that the real driver takes from a plan through four stages, with replicas in virtual time and
           no output but its event log (scripts/bench/simulated_driver.py), and the memory it holds for each finished
           row. Targets: 1,000 rows a second, 24 bytes per row.
simulation --simulated replicas in virtual time with the call times of an H100, clips of three sizes, twice the steps in
           the second half of the manifest, crashes, and lost nodes. Measures the useful share of the time of the
           diffusion replicas, with replicas that switch stages and with several fixed splits. Targets: 97 %, and
           no less than the best fixed split.
ray-data   Rows a second of `ltx_ray.run.render` and of a Ray Data pipeline of `map_batches` actor stages, one after the
           other, on private clusters with the same logical slots (scripts/bench/sleeping_stages.py). Stages sleep for
           an HQ clip's seconds on an H100, divided by --speedup; our replicas also sleep when they switch stages. Ray
           Data has the best fixed split and the best of --settings; our driver chooses its own split unless --fixed
           is given. Target: a ratio of 1.0 with the pipeline full, which is between the first and the last tenth of
           the clips. A second comparison without any sleep shows the drivers' own cost of a row; it has no target.
           "children CPU" is the CPU time of all processes of the cluster but the driver.

With --against, planning and policy run in turns with the code of another clone and of this one, --repeat times. The
medians of both and the ratio of their speeds are printed. CPU time is the steadier figure on a busy machine.

Every measurement runs in a process of its own. Ray Data needs pandas (scripts/requirements-bench.txt), which is
installed into a cache folder that only Ray Data's process sees.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ltx_ray.stages import TRAITS, Stage
from scripts.bench import sleeping_stages

MB = 10**6
TARGET_ROWS, TARGET_PLANNING, TARGET_MEMORY, TARGET_SLOPE, TARGET_RATIO = 10**6, 50_000, 300 * MB, 24, 1.0
TARGET_COMPLETIONS, TARGET_USEFUL = 1000, 0.97
_REQUIREMENTS = ROOT / "scripts" / "requirements-bench.txt"
_CALL = """
import importlib, json, sys
module, function, keywords, answer = sys.argv[1:]
figures = getattr(importlib.import_module(module), function)(**json.loads(keywords))
open(answer, "w").write(json.dumps(figures))
"""


def run_isolated(
    function: str, environment: Mapping[str, str] | None = None, *, root: Path = ROOT, **keywords: Any
) -> dict[str, Any]:
    """What `module:function` of the clone `root` returns in a process of its own.

    When it fails, prints the end of its log and exits.
    """
    module, _, name = function.partition(":")
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), **(environment or {})}
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder, "answer"), Path(folder, "log")
        with log.open("wb") as output:
            code = subprocess.run(
                [sys.executable, "-c", _CALL, module, name, json.dumps(keywords), str(answer)],
                env=inherited | settings, stdout=output, stderr=subprocess.STDOUT, cwd=root,
            ).returncode  # fmt: skip
        if code:
            sys.exit(f"{function} ended with {code}:\n{log.read_text(errors='replace')[-4000:]}")
        return json.loads(answer.read_text())


def verdict(good: bool) -> str:
    return "met" if good else "MISSED"


def prepared(manifest: str) -> Any:
    """A run of `manifest` with the toy model, validated and not started."""
    from ltx_ray.config import ModelFiles
    from ltx_ray.run import Options, prepare

    return prepare(Options(manifest=manifest, output=None, model=ModelFiles("", "", "", provider=sleeping_stages.TOY)))


# --- planning ------------------------------------------------------------------------------------


def plan_all(manifest: str) -> dict[str, float]:
    plan = prepared(manifest).plan
    began, cpu = time.perf_counter(), time.process_time()
    rows = sum(row.status == "todo" for row in plan.open())
    return {"rows": rows, "seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}


def planning(arguments: argparse.Namespace, folder: Path) -> None:
    manifest = manifest_of(folder, arguments.rows)
    figures = run_isolated("scripts.bench_driver:plan_all", manifest=manifest)
    assert figures["rows"] == arguments.rows, figures
    rate = figures["rows"] / figures["seconds"]
    print(
        f"planning  {figures['rows']:,} rows in {figures['seconds']:.1f} s ({figures['cpu']:.1f} s of CPU): "
        f"{rate:,.0f} rows/s, target {TARGET_PLANNING:,}: {verdict(rate >= TARGET_PLANNING)}"
    )


# --- memory --------------------------------------------------------------------------------------


def held_bytes(trim: bool = True) -> int:
    """Anonymous and shared memory of this process and its children, each shared page counted once.

    Pages of mapped files are left out, because they belong to the page cache.
    """
    import psutil
    import pyarrow as pa

    if trim:
        gc.collect()
        pa.default_memory_pool().release_unused()
        ctypes.CDLL(None).malloc_trim(0)
    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = dict(line.split(":", 1) for line in lines)
        total += 1024 * sum(int(fields[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem"))
    return total


def plan_and_weigh(manifest: str, marks: list[int]) -> dict[str, Any]:
    """Bytes above the start that planning holds after each number of rows in `marks`, and the most it held."""
    plan = prepared(manifest).plan
    start, held, most = held_bytes(), [], 0
    for count, _ in enumerate(plan.open(), 1):
        if count % 50_000 == 0:
            most = max(most, held_bytes(trim=False) - start)
        if count in marks:
            held.append(held_bytes() - start)
    return {"start": start, "held": held, "most": max(most, *held)}


def memory(arguments: argparse.Namespace, folder: Path) -> None:
    marks = [arguments.rows, 2 * arguments.rows]
    figures = run_isolated("scripts.bench_driver:plan_and_weigh", manifest=manifest_of(folder, marks[1]), marks=marks)
    first, second = figures["held"]
    slope = (second - first) / arguments.rows
    judgement = verdict(first <= TARGET_MEMORY) if arguments.rows == TARGET_ROWS else f"not run at {TARGET_ROWS:,}"
    print(
        f"memory    {first / MB:.0f} MB above the start ({figures['start'] / MB:.0f} MB) at {marks[0]:,} rows, "
        f"target {TARGET_MEMORY / MB:.0f}: {judgement}; {second / MB:.0f} MB at {marks[1]:,}; "
        f"at most {figures['most'] / MB:.0f} MB untrimmed"
    )
    print(f"memory    {slope:.1f} bytes per row from there, target {TARGET_SLOPE}: {verdict(slope <= TARGET_SLOPE)}")


# --- the driver in virtual time ------------------------------------------------------------------


def complete(manifest: str, rows: int) -> dict[str, Any]:
    """Drive the first `rows` rows with 40 replicas, and weigh the process halfway and near the end."""
    from ltx_ray.config import Selection
    from scripts.bench import simulated_driver

    plan = prepared(manifest).plan
    plan.selection = Selection(limit=rows)
    start, held = held_bytes(), {}

    def weigh(number: int) -> None:
        if number in (rows // 2, rows - 5000):
            held[number] = held_bytes() - start

    figures = simulated_driver.drive(plan, simulated_driver.lay_out(40, None), weigh=weigh)
    (first, low), (last, high) = sorted(held.items())
    return figures | {"held": high, "slope": (high - low) / (last - first)}


def policy(arguments: argparse.Namespace, folder: Path) -> None:
    rows = arguments.completions
    figures = run_isolated("scripts.bench_driver:complete", manifest=manifest_of(folder, rows), rows=rows)
    assert figures["counts"]["rendered"] == rows, figures
    rate, slope = rows / figures["seconds"], figures["slope"]
    print(
        f"policy    {rows:,} rows through four stages in {figures['seconds']:.1f} s ({figures['cpu']:.1f} s of CPU): "
        f"{rate:,.0f} rows/s, target {TARGET_COMPLETIONS:,}: {verdict(rate >= TARGET_COMPLETIONS)}; "
        f"{figures['held'] / MB:.0f} MB above the start, {slope:.1f} bytes a finished row, planning included, "
        f"target {TARGET_SLOPE}: {verdict(slope <= TARGET_SLOPE)}"
    )


def simulate(manifest: str, replicas: int, split: tuple[int, int] | None) -> dict[str, Any]:
    from ltx_ray.pools.simulated import Faults
    from scripts.bench import simulated_driver

    # Every quarter of an hour a node of eight replicas is lost; one call in a thousand fails or kills its gang.
    faults = Faults(crash=0.0005, error=0.0003, out_of_memory=0.0002, node_seconds=900.0)
    return simulated_driver.drive(
        prepared(manifest).plan, simulated_driver.lay_out(replicas, split), faults=faults, mixed=True
    )


def simulation(arguments: argparse.Namespace, folder: Path) -> None:
    replicas = arguments.simulated
    manifest = manifest_of(folder, replicas * 40)
    parts: dict[str, float] = {}
    print(f"simulation  {replicas:,} replicas, {replicas * 40:,} clips, in virtual time")
    for stage2 in (None, *(round(replicas * part) for part in (0.15, 0.19, 0.23, 0.27))):
        split = None if stage2 is None else (replicas - stage2, stage2)
        figures = run_isolated("scripts.bench_driver:simulate", manifest=manifest, replicas=replicas, split=split)
        window = figures["window"]
        name = "switching replicas" if split is None else "fixed split {} + {}".format(*split)
        parts[name] = window["useful"] / window["there"]
        print(
            f"  {name:24}{parts[name]:8.1%} useful, {window.get('switching', 0) / window['there']:.2%} switching, "
            f"{window.get('lost', 0) / window['there']:.2%} lost with replicas; "
            f"{figures['counts']['rendered']:,} rendered, "
            f"{figures['counts'].get('failed', 0)} failed in {figures['virtual'] / 3600:.2f} virtual hours "
            f"({figures['seconds']:.0f} s)",
            flush=True,
        )
    own, *fixed = parts.values()
    print(
        f"simulation  {own:.1%} useful, target {TARGET_USEFUL:.0%}: {verdict(own >= TARGET_USEFUL)}; against the best "
        f"fixed split {own / max(fixed):.3f}: {verdict(own >= max(fixed))}"
    )


# --- against Ray Data ----------------------------------------------------------------------------


def ray_data(arguments: argparse.Namespace, folder: Path) -> None:
    packages, manifest = _requirements(), manifest_of(folder, arguments.clips)
    split = sleeping_stages.best_split(arguments.replicas)
    stage1, stage2 = TRAITS[Stage.STAGE1].seconds, TRAITS[Stage.STAGE2].seconds
    fixed, free = min(split[0] / stage1, split[1] / stage2), arguments.replicas / (stage1 + stage2)
    print(
        f"ray-data  {arguments.clips:,} rows; text 1, {arguments.replicas} replicas, decode 1; an H100's seconds over "
        f"{arguments.speedup:g}\n          at most {fixed * arguments.speedup:.2f} rows/s with the best fixed split "
        f"{split[0]} + {split[1]}, {free * arguments.speedup:.2f} with switching replicas"
    )
    common = {"manifest": manifest, "replicas": arguments.replicas}

    def ours(speed: dict[str, str]) -> dict[str, float]:
        return run_isolated(
            "scripts.bench.sleeping_stages:run_ours", speed, **common, output=_empty(folder / "ours"),
            split=split if arguments.fixed else None, queue_depth=arguments.queue_depth,
        )  # fmt: skip

    def theirs(speed: dict[str, str], rows_a_block: int, in_flight: int) -> dict[str, float]:
        return run_isolated(
            "scripts.bench.sleeping_stages:run_ray_data",
            speed | {"PYTHONPATH": f"{ROOT}{os.pathsep}{packages}"},
            **common,
            output=_empty(folder / "theirs"),
            split=split,
            rows_a_block=rows_a_block,
            in_flight=in_flight,
        )

    def compare(speedup: float, settings: list[tuple[int, int]]) -> tuple[float, float]:
        """Our rate over the best of Ray Data's: with the pipeline full, and over the whole run."""
        speed = {sleeping_stages.SPEEDUP: str(speedup)}
        runs: dict[str, list[dict[str, float]]] = {}
        print(_COLUMNS)
        # The runs alternate, so that other load on the machine affects both sides.
        for _ in range(arguments.repeat):
            for setting in (None, *settings):
                if setting is None:
                    name, figures = f"ours, {'fixed' if arguments.fixed else 'own'} split", ours(speed)
                else:
                    name, figures = (
                        "Ray Data, {} rows per block, {} in flight".format(*setting),
                        theirs(speed, *setting),
                    )
                assert figures["rows"] == figures["recorded"] == arguments.clips, figures
                runs.setdefault(name, []).append(figures)
                print(
                    f"  {name:40}{figures['steady']:15.2f}{figures['first_clip']:14.1f}{figures['seconds']:14.1f}"
                    f"{figures['driver_cpu']:15.1f}{figures['children_cpu']:17.1f}",
                    flush=True,
                )
        mine, *others = ({key: median(run[key] for run in each) for key in each[0]} for each in runs.values())
        return mine["steady"] / max(o["steady"] for o in others), min(o["seconds"] for o in others) / mine["seconds"]

    full, whole = compare(arguments.speedup, arguments.settings)
    print(
        f"ray-data  ours / Ray Data: {full:.3f} with the pipeline full, target {TARGET_RATIO}: "
        f"{verdict(full >= TARGET_RATIO)}; {whole:.3f} over the whole run, actor start included"
    )
    print("ray-data  the same rows without any sleep, for information: the drivers' own cost of a row")
    full, whole = compare(0, arguments.empty_settings)
    print(f"ray-data  ours / Ray Data without sleep: {full:.3f} with the pipeline full, {whole:.3f} over the whole run")


_COLUMNS = (
    f"{'':42}{'full, rows/s':>15}{'first clip, s':>14}{'last row, s':>14}{'driver CPU, s':>15}{'children CPU, s':>17}"
)


def _requirements() -> str:
    """A folder with the packages that Ray Data needs beyond ours; installed once."""
    digest = hashlib.sha256(_REQUIREMENTS.read_bytes()).hexdigest()[:12]
    cache = Path(os.environ.get("LTX_RAY_CACHE") or Path.home() / ".cache" / "ltx-ray")
    target = cache / f"bench-{digest}-{sys.implementation.cache_tag}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder, "packages")
            subprocess.run(
                [
                    sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q", "install",
                    "--no-deps", "--only-binary", ":all:", "--target", str(made), "-r", str(_REQUIREMENTS),
                ],
                check=True,
            )  # fmt: skip
            made.rename(target)
    return str(target)


# --- against another clone -----------------------------------------------------------------------


def against(arguments: argparse.Namespace, folder: Path) -> None:
    manifest, rows = manifest_of(folder, arguments.rows), arguments.completions
    calls: dict[str, dict[str, Any]] = {
        "plan_all": {"manifest": manifest},
        "complete": {"manifest": manifest_of(folder, rows), "rows": rows},
    }
    clones = {"other": arguments.against.resolve(), "this": ROOT}
    print(f"other: {clones['other']}\nthis:  {ROOT}\n{'':10}{'clone':8}{'seconds':>10}{'CPU s':>10}")
    for function, keywords in calls.items():
        name = {"plan_all": "planning", "complete": "policy"}[function]
        runs: dict[str, list[dict[str, float]]] = {clone: [] for clone in clones}
        for number in range(arguments.repeat):
            # Each goes first in turn, so that neither gains from what the other leaves in caches.
            for clone in list(clones)[:: 1 if number % 2 else -1]:
                figures = run_isolated(f"scripts.bench_driver:{function}", root=clones[clone], **keywords)
                runs[clone].append(figures)
                print(f"{name:10}{clone:8}{figures['seconds']:10.2f}{figures['cpu']:10.2f}", flush=True)
        medians = {
            clone: {key: median(run[key] for run in runs[clone]) for key in ("seconds", "cpu")} for clone in runs
        }
        for clone, figures in medians.items():
            print(f"{name:10}{clone:8}{figures['seconds']:10.2f}{figures['cpu']:10.2f}  medians of {arguments.repeat}")
        ratio = {key: medians["other"][key] / medians["this"][key] for key in ("seconds", "cpu")}
        print(f"{name:10}this over other: {ratio['seconds']:.3f} in speed, {ratio['cpu']:.3f} in speed by CPU time")


# --- all -----------------------------------------------------------------------------------------


def manifest_of(folder: Path, rows: int) -> str:
    path = folder / f"rows-{rows}.parquet"
    if not path.exists():
        sleeping_stages.write_manifest(str(path), rows)
    return str(path)


def _empty(folder: Path) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return str(folder)


def _pairs(text: str) -> list[tuple[int, int]]:
    """Parse "1x4,4x2"; argparse reports the ValueError."""
    pairs = []
    for pair in text.split(","):
        first, second = pair.split("x")
        pairs.append((int(first), int(second)))
    return pairs


#: The sections that --only may name. Each takes (arguments, folder for manifests and outputs) and prints its results.
SECTIONS = {
    "planning": planning, "memory": memory, "policy": policy, "simulation": simulation, "ray-data": ray_data,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--folder", type=Path, help="folder for manifests and outputs (default: a temporary one)")
    parser.add_argument("--against", type=Path, metavar="CLONE", help="compare planning and policy with another clone")
    parser.add_argument("--rows", type=int, default=TARGET_ROWS, help="rows of planning and memory")
    parser.add_argument("--completions", type=int, default=100_000, help="rows of policy")
    parser.add_argument("--simulated", type=int, default=1000, help="replicas of simulation")
    parser.add_argument("--clips", type=int, default=1000, help="rows of ray-data")
    parser.add_argument("--replicas", type=int, default=10, help="replicas of the diffusion model in ray-data")
    parser.add_argument("--speedup", type=float, default=100.0)
    parser.add_argument(
        "--repeat",
        type=int,
        default=1,
        help="alternating runs of each side in ray-data and with --against; medians count",
    )
    parser.add_argument("--fixed", action="store_true", help="let our driver, too, use the best fixed split")
    parser.add_argument("--queue-depth", type=int, help="of our driver (default: its own)")
    parser.add_argument(
        "--settings",
        type=_pairs,
        default="1x4,4x2,4x4",
        help="Ray Data's: rows in a block x tasks in flight for each actor",
    )
    parser.add_argument(
        "--empty-settings", type=_pairs, default="4x2,64x2", help="the same for the comparison without sleep"
    )
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"--only: {', '.join(sorted(unknown))}; legal: {', '.join(SECTIONS)}")
    with tempfile.TemporaryDirectory(prefix="ltx-ray-bench-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.against is not None:
            return against(arguments, folder)
        for name in chosen:
            SECTIONS[name](arguments, folder)


if __name__ == "__main__":
    main()
