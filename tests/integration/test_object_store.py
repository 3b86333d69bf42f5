"""Manifest, images and dataset in an object store, rendered on real Ray with the toy model."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ltx_ray.cli import main
from ltx_ray.cli.status import status_lines
from ltx_ray.storage.requests import REQUESTS, Counted
from ltx_ray.storage.store import Store
from tests.support.datasets import rows_in
from tests.support.local_cluster import wait_for
from tests.support.scraped_metrics import values

IMAGE = (Path(__file__).parents[1] / "parity" / "goldens" / "a.png").read_bytes()


def events(store: Store) -> list[dict]:
    """Those of the newest run."""
    folder = f"state/events/{json.loads(store.read_bytes('run.json'))['run_id']}"
    names = [name for name in store.list_names(folder) if name.endswith(".jsonl.zst")]
    segments = [io.BytesIO(store.read_bytes(f"{folder}/{name}")) for name in names]
    return [
        json.loads(line) for file in segments for line in pa.CompressedInputStream(file, "zstd").read().splitlines()
    ]


class OfRanks:
    """Takes in what ranks say of their requests, and keeps it."""

    def __init__(self) -> None:
        self.told: Counter[tuple[str, str]] = Counter()

    def add(self, counted: Iterable[Counted]) -> None:
        for kind, outcome, number in counted:
            self.told[kind, outcome] += number
        REQUESTS.add(counted)


def test_manifest_images_and_dataset_in_a_bucket(runner, bucket, monkeypatch):
    monkeypatch.setattr("ltx_ray.pools.gang.REQUESTS", of_ranks := OfRanks())
    REQUESTS.take()
    row = {"prompt": "a tree", "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
    rows = [
        {"id": "image", "images": [{"path": "img/a 1.png"}, {"path": f"{bucket}/set/img/a 1.png", "frame_idx": 8}]},
        {"id": "elsewhere", "images": [{"path": f"{bucket}/set-other/a.png"}]},
        {"id": "text", "images": [{"path": "rows.jsonl"}]},
        {"id": "half", "images": [{"path": "img/half.png"}]},
    ]
    store, out = Store(bucket), Store(f"{bucket}/out")
    lines = [json.dumps({**row, **r}) + "\n" for r in rows]
    store.write_bytes("set/rows.jsonl", "".join(lines).encode())
    store.write_bytes("set/img/a 1.png", IMAGE)
    store.write_bytes("set/img/half.png", IMAGE[: len(IMAGE) // 2])
    store.write_bytes("set-other/a.png", IMAGE)
    manifest = f"{bucket}/set/rows.jsonl"

    def render() -> int:
        return runner.render(manifest, out.uri, fake=False, dtype="float32", save_latents=True, stage1=1, stage2=0)

    assert render() == 3
    (rendered,) = rows_in(out, "index")
    assert rendered["id"] == "image" and [i["path"] for i in rendered["images"]] == [f"{bucket}/set/img/a 1.png"] * 2
    told: dict[tuple[str, str], float] = {}

    def requests_are_told() -> bool:
        found = values(json.loads(out.read_bytes("run.json"))["run_id"])
        told.update({tuple(labels): n for (name, *labels), n in found.items() if name.startswith("ltx_ray_store_")})
        # The driver creates, too: the segments of rows.
        return (
            bool(of_ranks.told["creating", "ok"]) and told.get(("creating", "ok"), 0) > of_ranks.told["creating", "ok"]
        )

    wait_for(requests_are_told, lambda: f"the requests of ranks, {of_ranks.told}, in {told}", 60)
    assert ("reading", "missing") in told or ("looking up", "ok") in told
    assert {outcome for _, outcome in told} <= {"ok", "missing"}
    clip = out.read_bytes(rendered["clip"])
    assert hashlib.sha256(clip).hexdigest() == rendered["clip_sha256"] and b"ftyp" in clip[:12]
    assert out.exists(f"latents/{rendered['item_id'][:2]}/{rendered['item_id']}.safetensors")
    failed = {r["id"]: r for r in rows_in(out, "failed")}
    refused = f"{bucket}/set/rows.jsonl:2:images (elsewhere): '{bucket}/set-other/a.png', legal: a path inside an --im"
    assert failed["elsewhere"]["message"].startswith(refused)
    assert f"'{manifest}', legal: an image that can be read (not a known image format;" in failed["text"]["message"]
    half = f"images: {bucket}/set/img/half.png cannot be decoded (image file is truncated)"
    assert (failed["half"]["message"], failed["half"]["attempts"]) == (half, 1)
    assert (failed["half"]["stage"], failed["half"]["error_class"]) == ("text", "row")
    assert "gang_started" in {e["event"] for e in events(out)}
    summary = "1 rows in the index, 3 in failed/ (2 illegal, 1 of their own fault, 0 of infrastructure's)"
    said = status_lines(out.uri)
    assert summary in said and any(": last finished decode of image, " in line for line in said)
    assert not out.exists("events.jsonl") and "stage 1 + 2" in out.read_bytes("report.html").decode()

    # a second run finds nothing to do
    assert render() == 3
    assert rows_in(out, "index") == [rendered]
    assert [e["event"] for e in events(out)] == ["run_started", "row_illegal", "row_illegal", "run_finished"]

    # the manifest is corrected
    store.write_bytes("set/rows.jsonl", lines[0].encode())
    assert render() == 0
    assert rows_in(out, "index") == [rendered] and [r["id"] for r in rows_in(out, "failed")] == ["half"]
    assert json.loads(out.read_bytes("run.json"))["counts"]["already_done"] == 1
    assert len([name for name in out.list_names("runs", recursive=True) if name == "run.json"]) == 2


KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


def test_credentials_in_uris_are_used_and_stand_nowhere(runner, bucket, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = bucket.replace("s3://", f"s3://{KEY}:{SECRET}@")
    row = {"prompt": "a tree", "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
    rows = [
        {"id": "relative", "images": [{"path": "pics/a.png"}]},
        {"id": "whole", "images": [{"path": f"{bucket}/set/pics/a.png"}]},
        {"id": "text", "images": [{"path": "rows.jsonl"}]},
        {"id": "illegal", "width": 65, "images": [{"path": f"{place}/other/a.png"}]},
        {"id": "gone", "images": [{"path": f"{place}/set/pics/none.png"}]},
    ]
    store = Store(bucket)
    store.write_bytes("set/rows.jsonl", "".join(json.dumps({**row, **r}) + "\n" for r in rows).encode())
    store.write_bytes("set/pics/a.png", IMAGE)
    (tmp_path / "run.yaml").write_text(f"image-root: {place}/set\n")

    def run(command: str, *arguments: str) -> int:
        with pytest.raises(SystemExit) as caught:
            main([command, *arguments])
        return caught.value.code

    options = ("--model", "toy", "--stage1-replicas", "1", "--stage2-replicas", "0", "--save-latents")
    monkeypatch.setattr("sys.argv", ["ltx-ray", "render", f"{place}/set/rows.jsonl", f"--output={place}/out"])
    common = (*options, "--config", "run.yaml")
    assert run("plan", f"{place}/set/rows.jsonl", *common) == 3
    cluster = ("--ray-address", runner.cluster)
    assert run("render", f"{place}/set/rows.jsonl", "--output", f"{place}/out", *common, *cluster) == 3
    out = Store(f"{bucket}/out")
    assert {r["id"] for r in rows_in(out, "index")} == {"relative", "whole"}
    assert {i["path"] for r in rows_in(out, "index") for i in r["images"]} == {f"{bucket}/set/pics/a.png"}
    # The row of a failure has what a retry with credentials needs.
    assert run("retry", f"{place}/out", *common, *cluster) == 3
    assert {r["id"] for r in rows_in(out, "failed")} == {"text", "illegal", "gone"}
    assert run("verify", f"{place}/out") == 0 and run("status", f"{place}/out") == 0
    assert run("report", f"{place}/out") == 0
    assert run("render", f"{place}/none.jsonl", "--output", f"{place}/out", *common) == 2
    assert json.loads(out.read_bytes("run.json"))["output"] == f"{bucket}/out"

    console = "".join(capfd.readouterr())
    written = {name: out.read_bytes(name) for name in _every_file(out)}
    assert "run.json" in written and "report.html" in written and any(n.startswith("failed/") for n in written)
    written = {**written, "console": console.encode()}
    for name, data in written.items():
        content = repr(pq.read_table(io.BytesIO(data)).to_pylist()).encode() if name.endswith(".parquet") else data
        for secret in (KEY, SECRET, SECRET[:12], SECRET.replace("/", "%2F").replace("+", "%2B")):
            assert secret.encode() not in content, (name, content)


def _every_file(store: Store, folder: str = "") -> list[str]:
    within = f"{folder}/" if folder else ""
    files = [within + name for name in store.list_names(folder)]
    return files + [name for inner in store.folders(folder) for name in _every_file(store, within + inner)]
