"""Runs the driver in this process on a Ray cluster, and reads its dataset back."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq

from ltx_ray.config import ModelFiles, RequestedNumerics, RunLimits
from ltx_ray.placement.sizing import ParallelConfig
from ltx_ray.run import Options, render

FAKE = {name: "ltx_ray.engine.fake:FakeEngine" for name in ("text", "diffusion", "decode")}


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
        dtype: str = RequestedNumerics.dtype,
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
                numerics=RequestedNumerics(dtype=dtype),
                parallel=ParallelConfig(tp=tp, stage1=stage1, stage2=stage2),
                ray_address=self.cluster,
                limits=limits,
                **options,
            )
        )

    def index(self, output: Path | None = None) -> dict[str, dict]:
        return rows_by_id((output or self.output) / "index")

    def failed(self, output: Path | None = None) -> dict[str, dict]:
        return rows_by_id((output or self.output) / "failed")

    def is_up(self, *roles: str) -> bool:
        """Whether a replica of each role has started."""
        return {*roles} <= {event["role"] for event in self.events() if event["event"] == "gang_started"}

    def made(self, name: str) -> int:
        """How many files the fake engine has made whose names match."""
        return len(list(self.output.glob(f"_fake/{name}")))

    def events(self, output: Path | None = None) -> list[dict]:
        return [json.loads(line) for line in ((output or self.output) / "events.jsonl").read_text().splitlines()]


def rows_by_id(folder: Path) -> dict[str, dict]:
    rows = [row for part in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows), "a row appears twice"
    return {row["id"]: row for row in rows}
