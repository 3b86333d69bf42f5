"""Random schedules of faults, interruptions and layouts for the real driver in virtual time, without Ray or a model.

A seed determines a schedule, which renders a manifest into a folder in as many runs as that takes.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq

from ltx_ray.config import EngineSpec, ModelFiles, Numerics, PoolSpec, RunLimits
from ltx_ray.dataset.fold import fold_dataset
from ltx_ray.dataset.identity import dataset_id
from ltx_ray.dataset.parts import list_segments, read_segment, segment_table
from ltx_ray.dataset.writer import DatasetWriter
from ltx_ray.driver.events import EventLog
from ltx_ray.driver.joined_cluster import JoinedCluster
from ltx_ray.driver.loop import Driver
from ltx_ray.driver.progress import Progress
from ltx_ray.driver.publisher import Publisher
from ltx_ray.driver.tracker import RowTracker
from ltx_ray.manifest.rules import RowRules
from ltx_ray.planning.identity import item_id, recipe_digest
from ltx_ray.planning.plan import Plan
from ltx_ray.pools.pool import StartFailed
from ltx_ray.pools.protocol import CallFinished, InputsLost, ReplicaLost
from ltx_ray.pools.simulated import Faults, SimulatedReplicaSet
from ltx_ray.records import Clip, ErrorKind, RenderRequest, RowError, StoredLatentsGone, WorkItem
from ltx_ray.stages import FULL_PATH, OUTPUT_STAGES
from ltx_ray.storage.reasons import TEMPORARY
from ltx_ray.storage.store import Store
from tests.support.checkpoint_files import RELEASED
from tests.support.datasets import row_log
from tests.support.metrics_of_runs import RecordedMetrics
from tests.support.samples import recipe, request, write_jsonl

SECONDS = {"text": 0.1, "stage1": 46.0, "load_latents": 0.2, "stage2": 17.0, "decode": 1.75, "save_latents": 0.3}
#: A run with more waits than this counts as endless; the longest here have about 3,000.
ENDLESS = 30_000
INJECTED = re.compile(r"\[\[(\w+):(\w+)\]\]")
#: Messages with which a row may fail here; `_TOLD` are those of an exception in the engine.
_TOLD = re.compile("told to fail")
_REASONS = re.compile("told to fail|by chance|rank 0 died|took longer than|node was lost|no inputs|legal")
SPEC = EngineSpec("", ModelFiles("", "", ""), Numerics(), "")


class Killed(BaseException):
    """Stands for the death of the driver's process."""


class HashingBuilder:
    """Builds work items without the files of a model."""

    checkpoint = SimpleNamespace(transformer=RELEASED)

    def item(self, request: RenderRequest) -> WorkItem:
        made_with = recipe()
        return WorkItem(item_id(request, made_with), request, made_with, recipe_digest(made_with))


def hashed(*parts: str) -> str:
    return hashlib.sha256(":".join(parts).encode()).hexdigest()


def undisturbed(item_id: str) -> str:
    """The hash that stands for the final latents of an item."""
    made = hashed("text", item_id)
    for stage in ("stage1", "stage2"):
        made = hashed(stage, item_id, made)
    return made


class Stages:
    """The work of the replicas: each stage hashes the item and the previous result, and decode writes a file."""

    def __init__(self, store: Store):
        self.store, self.decoded = store, Counter()

    def __call__(self, stage: str, item: WorkItem, *inputs: str) -> Any:
        name = item.item_id
        if f"[[{stage}:row]]" in item.request.prompt:
            raise RowError(f"{stage}: this row was told to fail")
        latents = f"latents/{name[:2]}/{name}.safetensors"
        if stage == "text":
            return hashed("text", name)
        if stage == "stage1":
            (context,) = inputs
            return hashed("stage1", name, context)
        if stage == "stage2":
            context, stage1 = inputs
            assert context == hashed("text", name)
            return hashed("stage2", name, stage1)
        if stage == "save_latents":
            self.store.write_bytes(latents, inputs[0].encode())
            return latents
        if stage == "load_latents":
            if name[0] < "8" or not self.store.exists(latents):
                raise StoredLatentsGone(f"{latents}: not there")
            return self.store.read_bytes(latents).decode()
        *_, stage2 = inputs
        self.decoded[name] += 1
        path = f"clips/{name[:2]}/{name}.mp4"
        self.store.write_bytes(path, stage2.encode())
        return Clip(path, hashlib.sha256(stage2.encode()).hexdigest(), stage2, (), "stage_1")


class WatchedReplicas(SimulatedReplicaSet):
    """Injects the faults that prompts ask for, counts what happens, and interrupts the driver at a given wait."""

    driver: Driver
    drain_at = kill_at = -1

    def watched(self, seen: Counter[str]) -> WatchedReplicas:
        self.seen, self.waits, self.called = seen, 0, Counter()
        return self

    def submit(self, replica, stage, item, inputs, timeout):
        self.called[item.item_id] += 1
        super().submit(replica, stage, item, inputs, timeout)

    def fault(self, stage, item):
        drawn = super().fault(stage, item)
        for where, fault in INJECTED.findall(item.request.prompt):
            if where == stage and fault != "row":
                drawn = fault
        if drawn is not None:
            self.seen[drawn] += 1
        return drawn

    def wait(self, timeout):
        self.waits += 1
        assert self.waits < ENDLESS, "the run does not end"
        known = {name for pool in self.driver.pools for name in pool.replicas}
        assert known == set(self._replicas), "the driver and the replica set disagree on the replicas"
        if self.waits == self.kill_at:
            raise Killed
        if self.waits == self.drain_at:
            self.driver.request_drain("SIGTERM")
        events = super().wait(timeout)
        for event in events:
            if isinstance(event, InputsLost) or (isinstance(event, ReplicaLost) and event.inputs_lost):
                self.seen["inputs lost"] += 1
            elif isinstance(event, ReplicaLost):
                kind = "died idle" if event.idle else "node lost" if "node" in event.reason else "gang lost"
                self.seen[kind if event.served else "failed start"] += 1
            elif isinstance(event, CallFinished) and (error := event.report.error) is not None:
                if error.kind in (ErrorKind.ROW, ErrorKind.STORED_LATENTS_GONE):
                    self.seen[error.type] += 1
        return events


class Schedule:
    """One manifest, one output folder, and the faults and interruptions of the runs that render it."""

    def __init__(self, seed: int, folder: Path, seen: Counter[str]):
        self.dice = dice = random.Random(seed)
        self.seen, self.store = seen, Store(str(folder / "out"))
        self.k = dice.choice([1, 2, 3, 3])
        self.pools = self._pools()
        scale = dice.choice([0.0, 0.3, 1.0])
        chances = {name: scale * dice.choice([0, 0.02, 0.1]) for name in ("crash", "hang", "out_of_memory")}
        chances |= {name: scale * dice.choice([0, 0.05]) for name in ("error", "store")}
        self.faults = Faults(
            no_start=scale * dice.choice([0, 0.2]), node_seconds=scale and dice.choice([0, 300, 1500]), **chances
        )
        self.rows = self._rows()
        self.manifest = write_jsonl(folder / "rows.jsonl", self.rows)
        self.runs = 0

    def _pools(self) -> list[PoolSpec]:
        dice, ranks = self.dice, self.dice.choice([1, 1, 2])
        self.layout = dice.choice(["split", "switching", "shared"])
        self.seen[self.layout] += 1

        def pool(name: str, roles: tuple[str, ...], replicas: int) -> PoolSpec:
            return PoolSpec(name, roles, replicas, ranks if roles[0] in ("stage1", "stage2") else 1, SPEC)

        first, second = dice.randint(1, 8), dice.randint(1, 4)
        pools = [pool("text", ("text",), dice.randint(1, 2))]
        if self.layout == "shared":
            pools.append(pool("diffusion", ("stage1", "stage2"), first))
        else:
            switching = self.layout == "switching"
            pools.append(pool("stage1", ("stage1", "stage2") if switching else ("stage1",), first))
            pools.append(pool("stage2", ("stage2", "stage1") if switching else ("stage2",), second))
        return [*pools, pool("decode", OUTPUT_STAGES, dice.randint(1, 2))]

    def _rows(self) -> list[dict]:
        dice, rows = self.dice, []
        for n in range(dice.randint(10, 30)):
            row = {"id": f"r{n}", "prompt": f"clip {n}"}
            kind = dice.random()
            if rows and kind < 0.12:
                row["prompt"] = dice.choice(rows)["prompt"]
                self.seen["copy"] += 1
            elif kind < 0.2:
                stage = dice.choice(FULL_PATH)
                fault = dice.choice(["crash", "hang", "out_of_memory", "error", "store", "row"])
                row["prompt"] += f" [[{stage}:{fault}]]"
                self.seen["injected"] += 1
            elif kind < 0.24:
                row["prompt"] = ""
                self.seen["illegal"] += 1
            elif rows and kind < 0.28:
                row = dict(dice.choice(rows))
                if not row["prompt"]:  # an illegal row is recorded once for each of its lines
                    continue
                self.seen["repeated"] += 1
            if kind > 0.9 and row["prompt"]:
                row["loras"] = []  # not planned by a template
            rows.append(row)
        return rows

    # --- runs ------------------------------------------------------------------------------------

    def run_to_the_end(self) -> None:
        """Run again and again until a run ends undisturbed."""
        interruptions = [
            self.dice.choice(["drain", "kill", "none", "fraction"]) for _ in range(self.dice.randint(0, 3))
        ]
        for interruption in itertools.chain(interruptions, itertools.repeat("none", 40)):
            if self.run(interruption):
                return
        raise AssertionError("no run ended")

    def run(self, interruption: str = "none", manifest: str | None = None) -> bool:
        """Run once. True when nothing is left to do. Asserts that no row of the index is rendered again."""
        self.runs += 1
        before = {row["item_id"] for row in (*self.index(), *self.pending())}
        replica_set = self._replica_set()
        at = self.dice.randint(1, 150)
        replica_set.drain_at, replica_set.kill_at = (at if interruption == how else -1 for how in ("drain", "kill"))
        limits = RunLimits(
            max_attempts=self.k, queue_depth=self.dice.randint(1, 4),
            max_failed_fraction=self.dice.choice([0.0, 0.1]) if interruption == "fraction" else None,
        )  # fmt: skip
        log = row_log(self.store, f"run{self.runs}", part_rows=self.dice.choice([2, 10, 10_000]))
        fold_dataset(self.store, log.existing, dataset_id(self.store), f"run{self.runs}", lambda message: None)
        plan = Plan(manifest or self.manifest, RowRules(), HashingBuilder(), log.existing)  # type: ignore[arg-type]
        events = EventLog(self.store, f"run{self.runs}")
        self.tracker = RowTracker(plan, DatasetWriter(log), Publisher(log), events, Progress(io.StringIO()), "{}")
        self.tracker.metrics = RecordedMetrics()
        preflight = None
        if self.dice.random() < 0.3:
            preflight = self._preflight(plan)
        max_bytes = self.dice.choice([float("inf"), 3.0])
        replica_set.driver = driver = Driver(
            tracker=self.tracker,
            join_cluster=lambda: JoinedCluster(
                replica_set,
                self.pools,
                "{}",
                lambda: max_bytes,
                preflight=preflight,
                elastic=self.layout != "split" and self.runs % 2 == 0,
            ),
            path=FULL_PATH,
            limits=limits,
            noise_device="cpu",
            use_stored=True,
        )
        try:
            left = driver.run(plan.open())
            log.close()
            self.seen["too many failed"] += driver.too_many_failed
            self.seen["drained"] += left and driver.drain_requested is not None
            ended = not left
        except Killed:
            self.seen["killed"] += 1
            ended = False
        except StartFailed:
            log.close()
            self.seen["gave up starting"] += 1
            ended = False
        assert replica_set.alive == 0, "a replica outlived its run"
        assert not before & set(replica_set.called), "a row of the index was rendered again"
        assert not [name for name, times in replica_set.make.decoded.items() if times > 1], "an item was decoded twice"
        if ended and interruption == "none" and driver.drain_requested is None:
            assert not self.tracker.items, "items are left over"
        return ended

    def _replica_set(self) -> WatchedReplicas:
        replica_set = WatchedReplicas(
            times=lambda stage, item, dice: SECONDS[stage] * dice.uniform(0.7, 1.5),
            make=Stages(self.store),
            seed=self.dice.randrange(2**32),
            faults=self.faults,
            node_count=self.dice.randint(1, 4),
        )
        return replica_set.watched(self.seen)

    def _preflight(self, plan: Plan) -> WorkItem:
        self.seen["preflight"] += 1
        return replace(plan.builder.item(request(prompt="preflight")), preflight=True)

    # --- the result ------------------------------------------------------------------------------

    def index(self) -> list[dict]:
        return self._parts("index")

    def pending(self) -> list[dict]:
        paths = (path for path in list_segments(self.store) if segment_table(path) == "index")
        return [row for path in paths for row in read_segment(self.store, path).to_pylist()]

    def failed(self) -> list[dict]:
        return self._parts("failed")

    def _parts(self, folder: str) -> list[dict]:
        names = [f"{folder}/{name}" for name in self.store.list_names(folder) if name.startswith("part-")]
        return [row for name in names for row in pq.read_table(io.BytesIO(self.store.read_bytes(name))).to_pylist()]

    def check(self) -> None:
        index, failed = self.index(), self.failed()
        expected = {row["id"]: row for row in self.rows}
        ids = [row["id"] or json.loads(row["manifest_row"])["id"] for row in failed] + [row["id"] for row in index]
        assert sorted(ids) == sorted(expected), "each row must be there once, in the index or among the failures"
        injected = {row["id"] for row in self.rows if INJECTED.search(row["prompt"])}
        for row in index:
            assert row["latents_sha256"] == undisturbed(row["item_id"])
            assert self.store.read_bytes(row["clip"]).decode() == row["latents_sha256"]
            assert 1 <= row["attempts"] <= self.k
            assert row["id"] not in injected and expected[row["id"]]["prompt"]
        for row in failed:
            self._check_failure(row)
        left = [p for p in Path(self.store.root).rglob("*") if TEMPORARY.fullmatch(p.name) or p.name == "_tmp"]
        assert not left, "temporary files"
        assert not list_segments(self.store), "rows are not folded"

    def _check_failure(self, row: dict) -> None:
        assert row["traceback"] or not _TOLD.search(row["message"])
        assert _REASONS.search(row["message"]), "an unexpected reason"
        if not row["prompt"]:
            assert (row["stage"], row["attempts"]) == ("plan", 0)
            return
        assert 1 <= row["attempts"] <= self.k
        found = INJECTED.search(row["prompt"])
        if found is None:
            assert self.faults != Faults(), f"{row['id']} failed with nothing wrong: {row['message']}"
            return
        stage, fault = found.groups()
        assert FULL_PATH.index("stage1" if row["stage"] == "load_latents" else row["stage"]) <= FULL_PATH.index(stage)
        if self.faults == Faults():
            assert (row["stage"], row["attempts"]) == (stage, 1 if fault == "row" else self.k)
            assert row["error_class"] == ("row" if fault in ("row", "error") else "infrastructure")
            assert bool(row["traceback"]) == (fault == "row")
