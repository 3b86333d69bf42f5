#!/usr/bin/env python
"""Try the protocol of the dataset's tables with random schedules of crashes, with one driver and with two at once.

    scripts/try_fold.py [--schedules 40000] [--first 0] [--processes 2]

The real code runs over a store in memory that is interrupted at any operation (tests/support/fold_model.py). Names the
seeds and ends with 1 when a row was there twice, was lost, or had a sha256 that is not its clip's.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.fold_model import run_schedules

_AT_ONCE = 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=40_000, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    last, failed = arguments.first + arguments.schedules, False
    for drivers in (1, 2):
        began = time.monotonic()
        seeds = [range(n, min(n + _AT_ONCE, last)) for n in range(arguments.first, last, _AT_ONCE)]
        with ProcessPoolExecutor(arguments.processes) as pool:
            wrong = {
                seed: why
                for found in pool.map(run_schedules, seeds, [drivers] * len(seeds))
                for seed, why in found.items()
            }
        failed = failed or bool(wrong)
        counts = dict(sum(wrong.values(), Counter()))
        what = "two drivers at once" if drivers == 2 else "one driver at a time"
        print(
            f"{what}: {len(wrong)} of {arguments.schedules:,} schedules went wrong {counts or ''} "
            f"{sorted(wrong)[:10] or ''} ({time.monotonic() - began:.0f} s)",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
