"""Random schedules of failures on a real Ray cluster, each drawn from a seed. `scripts/chaos` runs this module."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from ltx_ray.config import RunLimits
from ltx_ray.placement.sizing import ParallelConfig
from tests.support.local_cluster import SIZE, Driver, Job, LocalCluster, wait_for

KINDS = ("rank", "leader", "raylet", "driver", "sigterm")
ENGINES = ("toy", "fake")
_ROWS = 6
_NO_GUIDANCE = {"cfg": 1.0, "stg": 0.0, "modality": 1.0}
#: Two steps, each with one pass of the model instead of four.
_QUICK = {
    "num_inference_steps": 2,
    **{f"{av}_{what}_scale": value for av in ("video", "audio") for what, value in _NO_GUIDANCE.items()},
}
#: Calls of the shortest schedule: text, stage 1, stage 2 and decode of five rows.
_CALLS = 20


@dataclass
class Outcome:
    """What happened in one schedule, and what was wrong afterwards."""

    seed: int
    failures: list[str] = field(default_factory=list)
    lost: int = 0
    retries: int = 0
    rows: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Trials:
    """Schedules with one engine on one cluster, each compared bit for bit with an undisturbed run."""

    def __init__(self, cluster: LocalCluster, engine: str, folder: Path, tp: int = 2):
        assert engine in ENGINES, engine
        self._cluster, self._fake, self._folder, self._tp = cluster, engine == "fake", folder, tp
        orders = "[[stage1:big]] [[stage1:slow:0.3]] [[stage2:slow:0.2]]" if self._fake else "a ball, take"
        quick = {} if self._fake else _QUICK
        self._rows = [{"id": f"r{n}", "prompt": f"{orders} {n}", "seed": n, **SIZE, **quick} for n in range(_ROWS)]
        undisturbed = Job(cluster, folder / "undisturbed")
        self._start(undisturbed, self._rows).ends(0)
        index = undisturbed.out.index()
        self.expected = {name: row["latents_sha256"] for name, row in index.items()}
        assert len(set(self.expected.values())) == _ROWS
        assert undisturbed.check(self.expected, self.expected) == []

    def _count_failures(self, draw: random.Random) -> int:
        return draw.randint(2, 3) if self._tp > 1 else 2

    def _start(self, job: Job, rows: list[dict]) -> Driver:
        # Every rank with the toy model imports torch; sharing replicas between the stages halves their number.
        parallel = ParallelConfig(tp=self._tp) if self._fake else ParallelConfig(tp=self._tp, stage1=1, stage2=0)
        return job.start(rows, parallel=parallel, fake=self._fake, dtype="float32", limits=RunLimits(max_attempts=6))

    def run(self, seed: int) -> Outcome:
        """Run one schedule, whose rows, failures and times are drawn from `seed`."""
        self._cluster.heal()
        draw, began = random.Random(seed), time.monotonic()
        rows = self._rows[: draw.randint(_ROWS - 1, _ROWS)]
        moments = sorted((draw.randrange(_CALLS), draw.random() / 2) for _ in range(self._count_failures(draw)))
        # Drawn before anything runs, so that a seed always means the same failures, whatever the targets.
        failures = [(*moment, draw.choice(KINDS), draw.random()) for moment in moments]
        job, outcome = Job(self._cluster, self._folder / f"seed-{seed}"), Outcome(seed)
        try:
            driver = self._start(job, rows)
            for calls, pause, kind, which in failures:
                if self._wait_for_failure(job, driver, kind, calls):
                    time.sleep(pause)
                    outcome.failures.append(f"{kind}@{calls}")
                    driver = self._cause(job, driver, kind, which, rows)
            if (code := driver.wait()) != 0:
                outcome.wrong.append(f"exit {code}:\n{driver.log}")
            outcome.lost = len(job.out.events("gang_lost", every_run=True))
            outcome.retries = len(job.out.events("retry", every_run=True))
            outcome.rows = len(job.out.index())
            outcome.wrong += job.check([row["id"] for row in rows], self.expected)
            if job.out.failed():
                outcome.wrong.append(f"failed: {[row['message'] for row in job.out.failed().values()]}")
        finally:
            job.close()
        outcome.seconds = time.monotonic() - began
        return outcome

    def _wait_for_failure(self, job: Job, driver: Driver, kind: str, calls: int) -> bool:
        """Wait until `calls` calls have ended and the failure has a target. False when the run ends before."""

        def due() -> bool:
            target = kind in ("driver", "sigterm") or self._targets(job, kind)
            return not driver.running or (len(job.out.events("call", every_run=True)) >= calls and bool(target))

        wait_for(due, f"{calls} calls and a {kind}")
        return driver.running

    def _targets(self, job: Job, kind: str) -> list[dict]:
        """The ranks of living gangs; as leaders, with `tp` above 1, only those of gangs with several ranks."""
        gone = {e["replica"] for what in ("gang_lost", "gang_given_back") for e in job.out.events(what)}
        gangs = [e for e in job.out.events("gang_started") if e["replica"] not in gone]
        if kind == "leader" and self._tp > 1:
            return [gang["ranks"][0] for gang in gangs if len(gang["ranks"]) > 1]
        nodes = set(self._cluster.nodes())
        return [rank for gang in gangs for rank in gang["ranks"] if rank["node"] in nodes]

    def _cause(self, job: Job, driver: Driver, kind: str, which: float, rows: list[dict]) -> Driver:
        """Cause the failure. Returns the driver that runs afterwards."""
        if kind in ("driver", "sigterm"):
            if kind == "driver":
                driver.kill()
            else:
                driver.signal(signal.SIGTERM)
            code = driver.wait()
            # -15 means that it got SIGTERM before it had a handler; 0, that it had just finished.
            assert code in (-signal.SIGKILL, -signal.SIGTERM, 4, 0), f"exit {code}:\n{driver.log}"
            return driver if code == 0 else self._start(job, rows)
        if targets := self._targets(job, kind):
            target = targets[int(which * len(targets))]
            if kind == "raylet":
                self._cluster.remove_node(target["node"])
                time.sleep(which)
                self._cluster.heal()
            else:
                try:
                    os.kill(target["pid"], signal.SIGKILL)
                except ProcessLookupError:
                    pass  # its run ended at the same moment
        return driver


_ROW = "{:>6}  {:<38} {:>5} {:>8} {:>5}  {:<10} {:<6} {:>8}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description="Random failures on a cluster of four nodes.")
    parser.add_argument("--schedules", type=int, default=20, help="number of schedules (default: 20)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first schedule; the others count up from it (default: 0)"
    )
    parser.add_argument(
        "--engine", choices=ENGINES, default="toy", help="the toy model or the fake engine (default: toy)"
    )
    parser.add_argument("--tp", type=int, default=2, help="ranks in a replica (default: 2)")
    arguments = parser.parse_args()
    cluster, violations = LocalCluster(), 0
    try:
        with tempfile.TemporaryDirectory(prefix="ltx-ray-chaos-") as folder:
            trials = Trials(cluster, arguments.engine, Path(folder), arguments.tp)
            print(_ROW.format("seed", "events (at call)", "lost", "retries", "rows", "equal bits", "leaks", "seconds"))
            for seed in range(arguments.seed, arguments.seed + arguments.schedules):
                outcome = trials.run(seed)
                other = sum("latents" in what for what in outcome.wrong)
                leaks = sum(what.startswith(("actor", "placement", "process", "file")) for what in outcome.wrong)
                events = ", ".join(outcome.failures) or "none in time"
                print(
                    _ROW.format(
                        seed, events, outcome.lost, outcome.retries, outcome.rows, "no" if other else "yes",
                        leaks or "none", f"{outcome.seconds:.1f}",
                    ),
                    flush=True,
                )  # fmt: skip
                for what in outcome.wrong:
                    print(f"        {what}", flush=True)
                violations += bool(outcome.wrong)
    finally:
        cluster.close()
    print(f"{arguments.schedules} schedules with the {arguments.engine} engine, {violations} with a violation")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
