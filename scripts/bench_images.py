#!/usr/bin/env python
"""What rows with images from S3 cost the driver's loop: the part of its time in which it takes rows.

    scripts/bench_images.py [--rate 16] [--seconds 20] [--images 1] [--latency-ms 40] [--repeat 1]

Rows are planned and taken as `driver.loop` does it, --rate of them a second, from a manifest whose rows have --images
images each, all different. They lie in a local S3 server in a process of its own, which answers a request after
--latency-ms, as S3 does. Three runs take turns: rows without images, rows whose images are read when the row is taken,
and rows whose images are read ahead, as in a run. Each prints the loop's wall time in taking rows and its own CPU time,
as parts of the run, and the longest that one row has held the loop up. Target: 5 % with the look-ahead.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.bench_driver import run_isolated, verdict

TARGET_SHARE = 0.05
_BUCKET = "images"
_SERVER = """
import sys, threading, time
from moto.moto_server.werkzeug_app import DomainDispatcherApplication
from moto.server import ThreadedMotoServer
serve, latency = DomainDispatcherApplication.__call__, float(sys.argv[1])
def late(self, environ, start_response):
    if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
        time.sleep(latency)
    return serve(self, environ, start_response)
DomainDispatcherApplication.__call__ = late
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
threading.Event().wait()
"""
#: By name: whether rows have images, and how many rows ahead they are read (None: as in a run).
VARIANTS: dict[str, tuple[bool, int | None]] = {
    "no images": (False, None), "read when taken": (True, 0), "read ahead": (True, None),
}  # fmt: skip


def take(manifest: str, rate: float, depth: int | None) -> dict[str, float]:
    """Take every row of a manifest at `rate` a second; what that costs the thread that does it."""
    from ltx_ray.config import ModelFiles
    from ltx_ray.dataset.writer import DatasetWriter
    from ltx_ray.driver.events import EventLog
    from ltx_ray.driver.progress import Progress
    from ltx_ray.driver.publisher import Publisher
    from ltx_ray.driver.tracker import RowTracker
    from ltx_ray.planning.image_lookahead import ImageLookAhead
    from ltx_ray.planning.row_images import digest_of_image
    from ltx_ray.run import Options, prepare
    from ltx_ray.storage.store import Store
    from scripts.bench import sleeping_stages

    model = ModelFiles("", "", "", provider=sleeping_stages.TOY)
    plan = prepare(Options(manifest, None, model, image_roots=(f"s3://{_BUCKET}",))).plan
    if depth is not None:
        plan._images = ImageLookAhead(digest_of_image, depth)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        log: Any = SimpleNamespace(store=store)
        tracker = RowTracker(
            plan, DatasetWriter(log), Publisher(log), EventLog(store, "bench"), Progress(io.StringIO()), "{}"
        )
        rows, taken, walls = plan.open(), 0, []
        list(tracker.take(rows, 1))  # Opening the manifest and the first connection are no row's.
        began, cpu = time.perf_counter(), time.thread_time()
        while not tracker.exhausted:
            due = began + (taken + 1) / rate
            time.sleep(max(due - time.perf_counter(), 0.0))
            at = time.perf_counter()
            # Other rows are in flight, so that the loop waits for none; it looks again soon.
            got = len(list(tracker.take(rows, max(int((at - began) * rate) - taken, 1), wait=depth == 0)))
            walls.append(time.perf_counter() - at)
            taken += got
            if tracker.waits_for_images:
                time.sleep(0.025)
        seconds = time.perf_counter() - began
        cpu = time.thread_time() - cpu
        tracker.publisher.close(finish=False)
    return {
        "rows": taken + 1, "illegal": tracker.counts["illegal"], "rate": taken / seconds,
        "wall": sum(walls) / seconds, "cpu": cpu / seconds, "longest": max(walls),
    }  # fmt: skip


def _put_images(count: int, width: int, height: int) -> int:
    """Upload images with different names, and return the bytes of one."""
    import numpy as np
    import pyarrow.fs as pafs
    from PIL import Image

    # Smooth noise, whose JPEG has about the size of a photograph's.
    small = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(data, "JPEG", quality=92)
    store = pafs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], allow_bucket_creation=True)
    store.create_dir(_BUCKET)
    for number in range(count):
        with store.open_output_stream(f"{_BUCKET}/{number:06d}.jpg") as file:
            file.write(data.getvalue())
    return data.tell()


def _manifest(path: Path, rows: int, images: int) -> str:
    with path.open("w") as file:
        for n in range(rows):
            row: dict[str, Any] = {"id": f"r{n}", "prompt": f"clip {n}", "seed": n}
            if images:
                names = range(n * images, (n + 1) * images)
                row["images"] = [
                    {"path": f"s3://{_BUCKET}/{name:06d}.jpg", "frame_idx": 0, "strength": 1.0} for name in names
                ]
            file.write(json.dumps(row) + "\n")
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=16.0, help="rows a second")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run")
    parser.add_argument("--images", type=int, default=1, help="of a row")
    parser.add_argument("--latency-ms", type=float, default=40.0, help="of a GET or HEAD request")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each kind, in turns; medians count")
    arguments = parser.parse_args()
    os.environ.update(AWS_ACCESS_KEY_ID="bench", AWS_SECRET_ACCESS_KEY="bench", AWS_DEFAULT_REGION="us-east-1")
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(arguments.latency_ms / 1000)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{int(server.stdout.readline())}"
        _compare(arguments)
    finally:
        server.kill()


def _compare(arguments: argparse.Namespace) -> None:
    rows = int(arguments.rate * arguments.seconds)
    size = _put_images(rows * arguments.images, 1920, 1088)
    print(
        f"{arguments.rate:g} rows/s for {arguments.seconds:g} s, {arguments.images} images of {size / 1e3:,.0f} kB a "
        f"row, {arguments.latency_ms:g} ms a request; load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'':18}{'rows/s':>8}{'loop, wall':>12}{'loop, CPU':>11}{'longest, ms':>13}")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="ltx-ray-bench-") as folder:
        for _ in range(arguments.repeat):
            for name, (images, depth) in VARIANTS.items():
                manifest = _manifest(Path(folder, "rows.jsonl"), rows, arguments.images if images else 0)
                figures = run_isolated(
                    "scripts.bench_images:take", manifest=manifest, rate=arguments.rate, depth=depth
                )  # fmt: skip
                assert figures["rows"] == rows and not figures["illegal"], figures
                runs[name].append(figures)
                print(
                    f"{name:18}{figures['rate']:8.1f}{figures['wall']:12.1%}{figures['cpu']:11.1%}"
                    f"{1000 * figures['longest']:13.1f}",
                    flush=True,
                )
    shares = {name: median(run["wall"] for run in each) for name, each in runs.items()}
    before, share = shares["read when taken"], shares["read ahead"]
    print(
        f"read ahead: {share:.1%} of the loop, target {TARGET_SHARE:.0%}: {verdict(share < TARGET_SHARE)}; "
        f"{before / share:.0f} times less than when each row reads its images"
    )


if __name__ == "__main__":
    main()
