"""A real local Ray cluster with logical slots, and runs on it in this process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ltx_ray.config import ModelFiles, RunLimits
from ltx_ray.placement.sizing import Wanted
from ltx_ray.run import Options, render
from tests.clusters import QUICK, SYSTEM

FAKE = {name: "ltx_ray.engine.fake:FakeEngine" for name in ("text", "diffusion", "decode")}


@pytest.fixture(scope="session")
def cluster(s3):
    """Address of a cluster of 16 logical CPU slots, shared by the tests of a session; its workers know `s3`."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ["OMP_NUM_THREADS"] = "1"
    node = {**QUICK, "num_cpus": 16, "include_dashboard": False, "object_store_memory": 256 * 2**20}
    clusters.append(Cluster(initialize_head=True, head_node_args={**node, "_system_config": SYSTEM}))
    ray.init(address=clusters[0].address, log_to_driver=False, logging_level="error")
    yield clusters[0].address
    end_cluster()


#: The cluster while there is one.
clusters: list[Any] = []


def end_cluster() -> None:
    if clusters:
        sys.modules["ray"].shutdown()
        clusters.pop().shutdown()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The cluster ends with this folder's last test: others that come later in the process must not find one."""
    folder = Path(__file__).parent
    if nextitem is None or folder not in nextitem.path.parents:
        end_cluster()


class Runner:
    """Renders rows into a folder and reads the dataset back."""

    def __init__(self, cluster: str, folder: Path):
        self.cluster, self.folder = cluster, folder
        self.output = folder / "out"

    def manifest(self, rows: list[dict], name: str = "rows.jsonl") -> str:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def render(
        self,
        rows: list[dict] | str,
        output: Path | None = None,
        *,
        tp: int = 1,
        stage1: int | None = None,
        stage2: int | None = None,
        fake: bool = True,
        limits: RunLimits = RunLimits(),  # noqa: B008 (frozen)
        **options,
    ) -> int:
        manifest = rows if isinstance(rows, str) else self.manifest(rows)
        if fake:
            options["engines"] = FAKE
        options.setdefault("model", ModelFiles("", "", "", provider="ltx_ray.toy:ensure_toy_model"))
        return render(
            Options(
                manifest=manifest,
                output=str(output or self.output),
                wanted=Wanted(tp=tp, stage1=stage1, stage2=stage2),
                ray_address=self.cluster,
                limits=limits,
                **options,
            )
        )

    def index(self, output: Path | None = None) -> dict[str, dict]:
        return _rows((output or self.output) / "index")

    def failed(self, output: Path | None = None) -> dict[str, dict]:
        return _rows((output or self.output) / "failed")

    def events(self, output: Path | None = None) -> list[dict]:
        return [json.loads(line) for line in ((output or self.output) / "events.jsonl").read_text().splitlines()]


def _rows(folder: Path) -> dict[str, dict]:
    rows = [row for part in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows), "a row appears twice"
    return {row["id"]: row for row in rows}


@pytest.fixture
def runner(cluster, tmp_path) -> Runner:
    return Runner(cluster, tmp_path)
