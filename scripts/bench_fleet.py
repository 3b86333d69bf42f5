#!/usr/bin/env python
"""How much of a fleet's GPUs a run uses: the real plan, driver and policy over simulated nodes in virtual time.

    scripts/bench_fleet.py --gpus 64 --stage1-seconds 40 --stage2-seconds 19.1 --decode-seconds 5 [--json FILE] ...

A stage costs what its call takes. `bound_clips_per_hour` is what the cards that work would make if they did nothing but
the stages of the DiT and the GPU work of decoding: 3600 / (stage 1 + stage 2 + 1.8 s) for each. The clock runs from the
first call of stage 1 of a row to the last clip, so that growing and draining count. The pools are laid out by
`ltx_ray.placement.sizing`, and the driver starts, sizes and replaces replicas as in a run on Ray. The nodes are those
of scripts/bench/simulated_fleet.py: x264 with too few CPUs is slower in proportion, a decode slows the rank on its
card, a replica does not start on a bad card, a lost node is back empty after 60 s, and a start takes 30 s.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ltx_ray.placement.sizing import ParallelConfig
from scripts.bench.fleet_run import Figures, Workload, run_fleet
from scripts.bench.simulated_fleet import Fleet

#: Lines of the run's log that are printed.
_LINES = 12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--stage1-seconds", type=float, default=40.0, help="a call of stage 1")
    parser.add_argument("--stage2-seconds", type=float, default=19.1, help="a call of stage 2")
    parser.add_argument("--decode-seconds", type=float, default=5.0, help="a call of decode, with 8 CPUs to itself")
    parser.add_argument("--cpus-per-gpu", type=float, default=8.0)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--bad-cards", type=int, default=0, help="cards on which no replica starts")
    parser.add_argument("--lose-nodes-per-hour", type=float, default=0.0)
    parser.add_argument("--clips", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0, help="of the nodes that fail, and of the times of calls")
    parser.add_argument("--share-cards", choices=("on", "off"), default="on", help="text and decode beside the DiT")
    parser.add_argument("--text-replicas", type=int, help="a fixed number (default: as the run needs them)")
    parser.add_argument("--decode-replicas", type=int, help="a fixed number (default: as the run needs them)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    for name in ("gpus", "clips", "gpus_per_node"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: {getattr(arguments, name)}, legal: a number from 1")
    if not 0 <= arguments.bad_cards < arguments.gpus:
        parser.error(f"--bad-cards: {arguments.bad_cards}, legal: from 0 to one less than --gpus")
    fleet = Fleet(
        gpus=arguments.gpus,
        gpus_per_node=arguments.gpus_per_node,
        cpus_per_gpu=arguments.cpus_per_gpu,
        bad_cards=arguments.bad_cards,
        node_losses_per_hour=arguments.lose_nodes_per_hour,
    )
    workload = Workload(
        clips=arguments.clips,
        stage1_seconds=arguments.stage1_seconds,
        stage2_seconds=arguments.stage2_seconds,
        decode_seconds=arguments.decode_seconds,
        share_cards=arguments.share_cards == "on",
        parallel=ParallelConfig(text=arguments.text_replicas, decode=arguments.decode_replicas),
    )
    try:
        with tempfile.TemporaryDirectory(prefix="ltx-ray-fleet-") as folder:
            figures = run_fleet(fleet, workload, arguments.seed, folder)
    except ValueError as error:
        parser.error(str(error))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures.record(), indent=2) + "\n")
    _show(figures)
    return figures.exit_code


def _show(figures: Figures) -> None:
    print(
        f"{figures.clips_per_hour:,.0f} clips/h of {figures.bound_clips_per_hour:,.0f}: ratio {figures.ratio:.3f}; "
        f"{figures.rows_lost} rows lost, {figures.rows_twice} made twice, exit code {figures.exit_code} "
        f"({figures.virtual_seconds:,.0f} virtual seconds in {figures.seconds:.1f} s)"
    )
    print("replicas at the end: " + ", ".join(f"{name} {count}" for name, count in figures.replicas.items()))
    for line in figures.waits:
        print(line)
    for line in figures.said[:_LINES]:
        print(f"said: {line}")
    if len(figures.said) > _LINES:
        print(f"said: {len(figures.said) - _LINES} more lines")


if __name__ == "__main__":
    sys.exit(main())
