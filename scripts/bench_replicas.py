#!/usr/bin/env python
"""How fast many replicas start on real Ray, and what the driver's loop costs with them.

    scripts/bench_replicas.py [--replicas 200] [--rate 16] [--rows 1000] [--only bare,run]

bare  As many actors of the same size without our driver, from asking for them until each has answered: what Ray alone
      takes on this machine.
run   `ltx_ray.run.render` with --replicas single-rank replicas, whose engine imports next to nothing and sleeps
      (scripts/bench/idle_engine.py). Stages take the seconds of an HQ clip on an H100, divided so that the replicas of
      stage 1 make --rate rows a second. Printed are the seconds from asking for the first replica until all are ready,
      their ratio to `bare`, and the CPU time of the loop's thread and of the whole driver, as parts of the time in
      which rows are finished at that rate. Target: the loop takes at most a quarter of a core.

Each runs on a private cluster of logical CPUs, which has workers of Ray's own kind.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ltx_ray.stages import FULL_PATH, TRAITS, Stage
from scripts.bench.idle_engine import SPEEDUP
from scripts.bench_driver import manifest_of, run_isolated, verdict

TARGET_LOOP = 0.25
_TOY = "ltx_ray.toy:ensure_toy_model"
_ENGINE = "scripts.bench.idle_engine:IdleEngine"


def split(replicas: int) -> dict[Stage, int]:
    """Replicas of each stage, in the proportion of the stages' seconds; text and decode have some to spare."""
    whole = sum(TRAITS[stage].seconds for stage in FULL_PATH)
    counts = {stage: max(1, round(replicas * TRAITS[stage].seconds / whole)) for stage in FULL_PATH}
    counts[Stage.TEXT] += 1
    counts[Stage.DECODE] += max(1, counts[Stage.DECODE] // 4)
    counts[Stage.STAGE1] = replicas - sum(n for stage, n in counts.items() if stage != Stage.STAGE1)
    return counts


def start_bare(actors: int) -> dict[str, float]:
    """Seconds until `actors` bare actors of one CPU each have answered, on a private cluster."""
    from ltx_ray.placement.private_cluster import PrivateCluster

    cluster = PrivateCluster()
    cluster.prepare()
    cluster.launch()
    import ray

    class Bare:
        def ping(self) -> None:
            pass

    try:
        ray.init(
            address=cluster.start(num_cpus=actors + 1, include_dashboard=False, object_store_memory=512 * 2**20),
            log_to_driver=False,
        )
        began = time.perf_counter()
        actor = ray.remote(Bare)
        handles: list[Any] = [actor.options(num_cpus=1).remote() for _ in range(actors)]
        ray.get([handle.ping.remote() for handle in handles])
        return {"seconds": time.perf_counter() - began}
    finally:
        ray.shutdown()
        cluster.end()


class _Watch:
    """When replicas were asked for and became ready, when decode calls ended, and the driver's CPU time then."""

    def __init__(self) -> None:
        self.asked: float | None = None
        self.ready: list[float] = []
        #: (time, CPU seconds of the loop's thread, CPU seconds of the process) at the end of each clip.
        self.clips: list[tuple[float, float, float]] = []

    def install(self) -> None:
        """Watch the replica sets that are made from now on. The loop's thread is the one that calls them."""
        from ltx_ray.pools import ray_replicas
        from ltx_ray.pools.protocol import CallFinished, ReplicaStarted

        watch, plain = self, ray_replicas.RayReplicaSet

        class Watched(plain):  # type: ignore[valid-type, misc]
            def start(self, name: str, spec: Any) -> None:
                watch.asked = watch.asked or time.perf_counter()
                super().start(name, spec)

            def wait(self, timeout: float) -> list[Any]:
                events = super().wait(timeout)
                for event in events:
                    if isinstance(event, ReplicaStarted):
                        watch.ready.append(time.perf_counter())
                    elif isinstance(event, CallFinished) and event.replica.startswith("decode"):
                        watch.clips.append((time.perf_counter(), time.thread_time(), time.process_time()))
                return events

        ray_replicas.RayReplicaSet = Watched  # type: ignore[misc]


def render_rows(manifest: str, output: str, replicas: int) -> dict[str, float]:
    """Render with the idle engine, and measure the time between the first and the last sixth of the clips."""
    from ltx_ray.config import ModelFiles
    from ltx_ray.placement.sizing import ParallelConfig
    from ltx_ray.run import Options, render

    assert threading.current_thread() is threading.main_thread()
    counts = split(replicas)
    parallel = ParallelConfig(
        text=counts[Stage.TEXT], stage1=counts[Stage.STAGE1], stage2=counts[Stage.STAGE2], decode=counts[Stage.DECODE]
    )
    engines = dict.fromkeys(("text", "diffusion", "decode"), _ENGINE)
    watch = _Watch()
    watch.install()
    model = ModelFiles("", "", "", provider=_TOY)
    code = render(Options(manifest, output, model, parallel=parallel, engines=engines, preflight=False))
    assert code == 0, f"render ended with {code}"
    assert watch.asked is not None and len(watch.ready) == replicas, len(watch.ready)
    # Clips count once every replica is ready, and without the end, when rows run out.
    full = [clip for clip in watch.clips if clip[0] > watch.ready[-1] + 5.0]
    (began, loop, whole), (ended, loop_then, whole_then) = full[0], full[-len(full) // 6]
    seconds = ended - began
    return {
        "ready": watch.ready[-1] - watch.asked, "half": watch.ready[len(watch.ready) // 2] - watch.asked,
        "rate": (len(full) - len(full) // 6) / seconds, "seconds": seconds,
        "loop": (loop_then - loop) / seconds, "driver": (whole_then - whole) / seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=200)
    parser.add_argument("--rate", type=float, default=16.0, help="rows a second")
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--only", default="bare,run", help="some of bare, run")
    arguments = parser.parse_args()
    chosen, bare = arguments.only.split(","), None
    if "bare" in chosen:
        load = os.getloadavg()[0]
        bare = run_isolated("scripts.bench_replicas:start_bare", actors=arguments.replicas)["seconds"]
        print(
            f"bare  {arguments.replicas} actors have answered after {bare:.1f} s (load before {load:.1f})", flush=True
        )
    if "run" not in chosen:
        return
    counts = split(arguments.replicas)
    speedup = arguments.rate * TRAITS[Stage.STAGE1].seconds / counts[Stage.STAGE1]
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="ltx-ray-bench-") as folder:
        figures = run_isolated(
            "scripts.bench_replicas:render_rows", {SPEEDUP: str(speedup)},
            manifest=manifest_of(Path(folder), arguments.rows), output=str(Path(folder, "out")),
            replicas=arguments.replicas,
        )  # fmt: skip
    ratio = f", {figures['ready'] / bare:.2f} of bare actors" if bare else ""
    print(
        f"run   {', '.join(f'{stage} {count}' for stage, count in counts.items())}: all ready after "
        f"{figures['ready']:.1f} s{ratio}; half of them after {figures['half']:.1f} s (load before {load:.1f})"
    )
    print(
        f"run   {figures['rate']:.1f} rows/s for {figures['seconds']:.0f} s: the loop takes {figures['loop']:.1%} of a "
        f"core, the driver {figures['driver']:.1%}; target {TARGET_LOOP:.0%}: {verdict(figures['loop'] <= TARGET_LOOP)}"
    )


if __name__ == "__main__":
    main()
