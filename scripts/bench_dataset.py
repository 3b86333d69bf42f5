#!/usr/bin/env python
"""Benchmark the dataset's tables without GPUs: bytes and objects a row, the start of a run, and folding.

    scripts/bench_dataset.py --rows N [--store local|s3] [--folder FOLDER] [--json FILE]
    scripts/bench_dataset.py --rows 10000000 --keys [--latency-ms 30] [--latents 1000000]

Rows have prompts of 40 random words and digests of their own, and are written as a run writes them: made by
`DatasetWriter`, committed in groups of 64, and folded by `RowLog` whenever that is due. Clips are left out: neither a
start nor a fold reads them. `--store s3` is moto's server on this machine, so its times are not those of a network; its
requests are counted. `--keys --latency-ms` measures a start over HTTP from a server that answers each request so late,
and `--latents` what it takes to know whether rows have latents where so many are stored.

rows                    finished rows
bytes_per_row           bytes below index/, over the rows. Target: 600
objects_per_row         objects below index/ and state/, over the rows
finish_rows_per_second  making and committing rows, folding left out
fold_rows_per_second    folding alone. Target: 20,000. `fold_rows_per_cpu_second` is steadier on a busy machine
start_seconds           listing what a run needs at its start, in a process of its own. Target at 1M rows: 5
start_mb                anonymous memory that it holds then, above the start of the process; `start_peak_mb` at most
                        and with all mapped files. Tables of more than 4 MiB lie in temporary files
start_requests          requests to the store at the start, with --store s3
one_row_*               the same of the way of 0.1.0, a Parquet file for each row, of at most 2,000 rows (--compare)
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import logging
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.bench_driver import MB, held_bytes, run_isolated, verdict

_GROUP, _COMPARED = 64, 2000
TARGET_BYTES, TARGET_FOLD, TARGET_START = 600, 20_000, 5.0


def rows_of(count: int, seed: int = 0) -> Iterator[tuple[str, Any, Any]]:
    """(item_id, request, rendered) of finished rows."""
    from ltx_ray.records import Clip, NoiseLedger, PictureMeasures, SoundMeasures, canonical_json

    dice = random.Random(seed)
    words = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(2, 9))) for _ in range(2000)]
    base, recipe, rendered = _example()
    for number in range(count):
        item_id, sha, latents = (hashlib.sha256(f"{seed} {kind} {number}".encode()).hexdigest() for kind in "abc")
        picture = PictureMeasures(dice.uniform(16, 235), 0.0, dice.random() / 4, dice.random(), dice.random() * 500, 0)
        sound = SoundMeasures(-20 - dice.random(), 0, dice.random())
        path = f"clips/{item_id[:2]}/{item_id[:32]}.mp4"
        seconds = {f"{stage}_seconds": dice.uniform(1, 50) for stage in ("text", "stage1", "stage2", "decode")}
        yield (
            item_id[:32],
            replace(base, id=f"row-{number:09d}", prompt=" ".join(dice.choices(words, k=40)), seed=number),
            replace(
                rendered,
                clip=Clip(path, sha, latents, (), "stage_1", picture, sound),
                seconds=seconds | {"gpu_seconds": sum(seconds.values())},
                recipe=recipe,
                noise_ledger=canonical_json(NoiseLedger(number, "cuda", "NVIDIA H100 80GB HBM3")),
                stage1_replica=f"stage1-{dice.randrange(60)}",
                stage2_replica=f"stage2-{dice.randrange(20)}",
            ),
        )


def _example() -> tuple[Any, str, Any]:
    from ltx_ray.config import Numerics
    from ltx_ray.dataset.writer import Rendered
    from ltx_ray.manifest.raw import RawRow
    from ltx_ray.manifest.rules import LegalRow, RowRules, judge
    from ltx_ray.planning.identity import recipe_json
    from ltx_ray.records import Clip, Recipe, canonical_json

    row = judge(RawRow("m.jsonl", 1, {"prompt": "a cat"}), RowRules())
    assert isinstance(row, LegalRow)
    digests = {name: hashlib.sha256(name.encode()).hexdigest()[:32] for name in ("checkpoint", "gemma", "upsampler")}
    recipe = Recipe(
        pipeline="hq", dtype="bfloat16", precision="bf16", noise_device="model", checkpoint=digests["checkpoint"],
        gemma=digests["gemma"], upsampler=digests["upsampler"], distilled_lora="d" * 32,
        distilled_lora_strengths=(0.25, 0.5), loras=(),
    )  # fmt: skip
    numerics = canonical_json(Numerics(dtype="bfloat16", precision="bf16", attention="fa3", compile="fused"))
    versions = canonical_json({"ltx_ray": "0.2.0", "torch": "2.11.0+cu130", "ray": "2.60.0", "av": "16.0.1"})
    rendered = Rendered(
        clip=Clip(None, "", "", (), "stage_1"), attempts=1, recipe="", recipe_digest="e" * 16, numerics=numerics,
        noise_ledger="", versions=versions, device="NVIDIA H100 80GB HBM3", seconds={}, switches=1,
    )  # fmt: skip
    return row.request, recipe_json(recipe), rendered


def write(output: str, rows: int) -> dict[str, float]:
    """Finish `rows` rows into `output`: seconds of making and committing them, and of folding."""
    from ltx_ray.dataset.existing import list_existing
    from ltx_ray.dataset.identity import dataset_id
    from ltx_ray.dataset.row_log import RowLog
    from ltx_ray.dataset.writer import DatasetWriter
    from ltx_ray.storage.store import Store

    store = Store(output)
    log = RowLog(store, list_existing(store), dataset_id(store), "bench")
    writer = DatasetWriter(log)
    spent = {"finish": 0.0, "finish_cpu": 0.0, "fold": 0.0, "fold_cpu": 0.0}

    def timed(what: str, call: Any) -> None:
        began, cpu = time.perf_counter(), time.process_time()
        call()
        spent[what] += time.perf_counter() - began
        spent[f"{what}_cpu"] += time.process_time() - cpu

    def commit(group: list[tuple[str, Any, Any]]) -> None:
        for row in group:
            writer.write_index(*row)
        log.commit()

    group: list[tuple[str, Any, Any]] = []
    for number, row in enumerate(rows_of(rows), 1):
        group.append(row)
        if len(group) == _GROUP or number == rows:
            timed("finish", functools.partial(commit, group))
            group = []
            if log.fold_is_due:
                timed("fold", log.fold)
    timed("fold", log.close)
    names = {folder: list(store.names(folder)) for folder in ("index", "state")}
    size = sum(store.size(f"index/{name}") or 0 for name in names["index"])
    return {**spent, "bytes": size, "objects": sum(map(len, names.values()))}


def write_keys(output: str, rows: int) -> None:
    """Parts with the two columns that a start reads, and no others."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ltx_ray.dataset.layout import part_name

    generator, part = np.random.default_rng(0), 10_000
    folder = Path(output, "index")
    folder.mkdir(parents=True)
    for number in range(rows // part):
        digits = generator.bytes(16 * part).hex()
        items = sorted(digits[at : at + 32] for at in range(0, len(digits), 32))
        ids = [f"row-{number * part + at:09d}" for at in range(part)]
        table = pa.table({"item_id": items, "id": ids})
        pq.write_table(table, folder / part_name("0badcafe", number), compression="zstd")


def start(output: str) -> dict[str, float]:
    """What a run does at its start to know which rows are done."""
    import pyarrow as pa

    from ltx_ray.dataset.existing import list_existing
    from ltx_ray.storage.store import Store

    pa.array([1])
    before = held_bytes()
    began = time.perf_counter()
    existing = list_existing(Store(output))
    seconds = time.perf_counter() - began
    held = held_bytes() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"rows": existing.row_count, "seconds": seconds, "held": held, "peak": peak}


def look_up_latents(output: str) -> dict[str, float]:
    """What the first rows of a run wait for, to know whether they have latents."""
    from ltx_ray.dataset.stored_latents import StoredLatents
    from ltx_ray.storage.store import Store

    latents = StoredLatents(Store(output))
    began = time.perf_counter()
    rows = latents.prefetched(iter([f"{number:032x}" for number in range(64)]), lambda item_id: item_id)
    found = sum(latents.has(item_id) for item_id in rows)
    return {"seconds": time.perf_counter() - began, "found": found}


def measure_keys(folder: Path, rows: int, latency: float | None, latents: int) -> None:
    """A start alone, with parts of keys alone."""
    from scripts.bench.slow_store import BUCKET, slow_store

    run_isolated("scripts.bench_dataset:write_keys", output=str(folder / "out"), rows=rows)
    if latency is None:
        started, requests = run_isolated("scripts.bench_dataset:start", output=str(folder / "out")), ""
    else:
        names = "out/latents/{head}/{item}.safetensors", latents
        with slow_store(str(folder), latency, names) as (environment, counter):
            output = f"s3://{BUCKET}/out"
            started = run_isolated("scripts.bench_dataset:start", environment, output=output)
            before = counter()
            requests = f", {before:,} requests of {1000 * latency:g} ms"
            if latents:
                looked = run_isolated("scripts.bench_dataset:look_up_latents", environment, output=output)
                asked = counter() - before
                print(f"64 rows with {latents:,} stored latents: {looked['seconds']:.1f} s, {asked:,} requests")
    mb, peak = started["held"] / MB, started["peak"] / MB
    print(
        f"start with {started['rows']:,} rows: {started['seconds']:.1f} s, {mb:.0f} MB, at most {peak:.0f} MB{requests}"
    )


def one_row_files(folder: str, rows: int) -> dict[str, float]:
    """The same rows as a Parquet file each, as 0.1.0 wrote them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ltx_ray.dataset.layout import INDEX_SCHEMA
    from ltx_ray.dataset.writer import _rendered_row

    Path(folder).mkdir(parents=True)
    began, size = time.perf_counter(), 0
    for number, row in enumerate(rows_of(rows)):
        buffer, values = io.BytesIO(), _rendered_row(*row)
        pq.write_table(pa.Table.from_pylist([values], schema=INDEX_SCHEMA), buffer, compression="zstd")
        path = Path(folder, f"part-{number}.parquet")
        with path.open("wb") as file:
            file.write(buffer.getvalue())
            os.fsync(file.fileno())
        size += path.stat().st_size
    return {"seconds": time.perf_counter() - began, "bytes": size}


@contextmanager
def _output(store: str, folder: Path) -> Iterator[tuple[str, Any, dict[str, str]]]:
    """(output, a counter of requests or None, variables for other processes)."""
    if store == "local":
        yield str(folder / "out"), None, {}
        return
    import pyarrow.fs as pafs
    from moto.server import ThreadedMotoServer

    from tests.support.s3_faults import Proxy

    keys = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1"}
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    proxy = Proxy(f"http://{host}:{port}")
    fs = pafs.S3FileSystem(
        access_key=keys["AWS_ACCESS_KEY_ID"], secret_key=keys["AWS_SECRET_ACCESS_KEY"], region=keys["AWS_REGION"],
        endpoint_override=f"http://{host}:{port}", allow_bucket_creation=True,
    )  # fmt: skip
    fs.create_dir("bench")
    try:
        yield "s3://bench/out", lambda: len(proxy.requests), {**keys, "AWS_ENDPOINT_URL": proxy.url}
    finally:
        proxy.close()
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--store", choices=("local", "s3"), default="local")
    parser.add_argument("--folder", type=Path, help="where a local output goes (default: a temporary folder)")
    parser.add_argument("--compare", action="store_true", help="write rows as a Parquet file each, too")
    parser.add_argument("--keys", action="store_true", help="measure only a start, with parts of keys alone; local")
    parser.add_argument("--latency-ms", type=float, help="with --keys: from a server that answers so late")
    parser.add_argument("--latents", type=int, default=0, help="with --latency-ms: names below latents/")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rows = arguments.rows
    with tempfile.TemporaryDirectory(prefix="ltx-ray-bench-") as temporary:
        folder = arguments.folder or Path(temporary)
        if arguments.keys:
            latency = None if arguments.latency_ms is None else arguments.latency_ms / 1000
            return measure_keys(folder, rows, latency, arguments.latents)
        with _output(arguments.store, folder) as (output, counter, environment):
            written = run_isolated("scripts.bench_dataset:write", environment, output=output, rows=rows)
            before = counter() if counter else 0
            started = run_isolated("scripts.bench_dataset:start", environment, output=output)
            requests = counter() - before if counter else None
        assert started["rows"] == rows, started
        figures: dict[str, Any] = {
            "rows": rows,
            "store": arguments.store,
            "bytes_per_row": written["bytes"] / rows,
            "objects_per_row": written["objects"] / rows,
            "finish_rows_per_second": rows / written["finish"],
            "finish_rows_per_cpu_second": rows / written["finish_cpu"],
            "fold_rows_per_second": rows / written["fold"],
            "fold_rows_per_cpu_second": rows / written["fold_cpu"],
            "start_seconds": started["seconds"],
            "start_mb": started["held"] / MB,
            "start_peak_mb": started["peak"] / MB,
            "start_requests": requests,
        }
        if arguments.compare:
            count = min(rows, _COMPARED)
            before_us = run_isolated(
                "scripts.bench_dataset:one_row_files", environment, folder=str(folder / "one-row"), rows=count
            )
            figures["one_row_bytes_per_row"] = before_us["bytes"] / count
            figures["one_row_rows_per_second"] = count / before_us["seconds"]
    for name, value in figures.items():
        print(f"{name:28}{value:,.5g}" if isinstance(value, float) else f"{name:28}{value}")
    small, quick = figures["bytes_per_row"] <= TARGET_BYTES, figures["fold_rows_per_second"] >= TARGET_FOLD
    print(f"bytes a row, target {TARGET_BYTES}: {verdict(small)}; folding, target {TARGET_FOLD:,}: {verdict(quick)}")
    if rows == 1_000_000:
        print(f"start, target {TARGET_START:g} s: {verdict(figures['start_seconds'] <= TARGET_START)}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
