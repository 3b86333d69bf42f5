"""Drivers over replicas in virtual time, ready to render rows into a folder."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace

from ltx_ray.config import PoolSpec, RunLimits
from ltx_ray.dataset.writer import DatasetWriter
from ltx_ray.driver.events import EventLog
from ltx_ray.driver.joined_cluster import JoinedCluster
from ltx_ray.driver.loop import Driver
from ltx_ray.driver.progress import Progress
from ltx_ray.driver.publisher import Publisher
from ltx_ray.driver.tracker import RowTracker
from ltx_ray.manifest.rules import RowRules
from ltx_ray.planning.plan import Plan
from ltx_ray.stages import FULL_PATH, OUTPUT_STAGES, PREVIEW_PATH
from ltx_ray.storage.store import Store
from tests.support.datasets import row_log
from tests.support.metrics_of_runs import RecordedMetrics
from tests.support.samples import request, write_jsonl
from tests.support.schedules import SECONDS, SPEC, HashingBuilder, Stages, WatchedReplicas


def pools(n=1):
    return [
        PoolSpec(name, roles, k, 1, SPEC)
        for name, roles, k in (
            ("text", ("text",), 1),
            ("stage1", ("stage1",), n),
            ("stage2", ("stage2",), n),
            ("decode", OUTPUT_STAGES, 1),
        )
    ]


def run(
    tmp_path,
    rows,
    replica_set_class=WatchedReplicas,
    *,
    preflight=None,
    the_pools=None,
    latents_only=False,
    publisher=Publisher,
    **limits,
):
    """A driver that is ready to render `rows` into tmp_path/out, and the store of its output."""
    store = Store(str(tmp_path / "out"))
    manifest = write_jsonl(tmp_path / "m.jsonl", rows)
    log = row_log(store)
    plan = Plan(manifest, RowRules(), HashingBuilder(), log.existing, latents_only=latents_only)
    events = EventLog(store, "run")
    tracker = RowTracker(plan, DatasetWriter(log), publisher(log), events, Progress(io.StringIO()), "{}")
    tracker.metrics = RecordedMetrics()
    replica_set = replica_set_class(times=lambda stage, item, dice: SECONDS[stage], make=Stages(store)).watched(
        Counter()
    )
    item = replace(HashingBuilder().item(request(**preflight)), preflight=True) if preflight else None
    replica_set.driver = driver = Driver(
        tracker=tracker,
        join_cluster=lambda: JoinedCluster(replica_set, the_pools or pools(), "{}", preflight=item),
        path=PREVIEW_PATH if latents_only else FULL_PATH,
        limits=RunLimits(**limits),
        noise_device="cpu",
        use_stored=not latents_only,
    )
    drive = driver.run

    def run_and_fold(planned):
        try:
            return drive(planned)
        finally:
            log.close()

    driver.run = run_and_fold
    return driver, store


def rows(n, what="clip"):
    return [{"id": f"r{i}", "prompt": f"{what} {i}"} for i in range(n)]
