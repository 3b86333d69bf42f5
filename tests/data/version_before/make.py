#!/usr/bin/env python
"""Make what is kept in this folder with the version in CHECKOUT: tests/data/version_before/make.py CHECKOUT

The manifests, images and LoRAs are inputs and stay. The command line is all that is used of the version, so that a
later version can take the place of this one on the day when a change of behaviour is meant.
"""

from __future__ import annotations

import json
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file

from tests.support import version_before as kept
from tests.support.version_before import DATA, DTYPES, MANIFESTS, PLANS, Version

#: Rows of the dataset, by their ids in rows.jsonl.
FINISHED, BLOCKED, MISSING = ("negative-none", "image-first", "base-stg", "extra"), "seed-0", "unicode"
BLOCKED_OF_SECOND, PREVIEWS = "seed-largest", ("loras-none", "guidance-1")
#: Guidance so strong that no latent stays finite.
FAULTY = {"id": "faulty", "prompt": "too much", "video_cfg_scale": 1e38}
ILLEGAL = {"id": "illegal", "prompt": "an odd width", "width": 300}
SMALL = {"height": 64, "width": 128, "num_frames": 1, "num_inference_steps": 2}


def main() -> None:
    [checkout] = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        version = Version(Path(checkout), Path(folder) / "made")
        write("plan.json", {name: version.plan(name) for name in PLANS})
        ids = rendered(version)
        dataset(Version(Path(checkout), Path(folder) / "dataset"), ids)


def rendered(version: Version) -> dict[str, str]:
    """Write ids.json and latents.safetensors; returns the item_ids in float32 of rows.jsonl."""
    found: dict[str, Any] = {"machine": [kept.machine()], "toy": version.toy_digests(), "bfloat16": {}, "float32": {}}
    latents = {}
    for dtype in DTYPES:
        for manifest in MANIFESTS:
            output = version.folder / f"out-{manifest}-{dtype}"
            kept.finish(version.start_render(manifest, dtype, output.name))
            index = kept.by_label(manifest, kept.rows_of(output))
            if dtype == "bfloat16":
                found[dtype] |= {label: row["item_id"] for label, row in index.items()}
                continue
            found[dtype] |= {label: kept.kept_columns(row) for label, row in index.items()}
            for item_id in {row["item_id"]: None for row in index.values()}:
                stored = load_file(kept.latents_path(output, item_id))
                latents |= {f"{item_id}/{name}": tensor for name, tensor in stored.items()}
            if manifest == "rows":
                found["numerics"] = json.loads(index["plain"]["numerics"])
                schema = pq.read_schema(next((output / "index").glob("part-*.parquet")))
                found["index_columns"] = {field.name: str(field.type) for field in schema}
    write("ids.json", found)
    save_file(latents, DATA / "latents.safetensors")
    return {label: found["float32"][label]["item_id"] for label in kept.labels("rows")}


def dataset(version: Version, ids: dict[str, str]) -> None:
    """Write dataset.tar.xz: three manifests, and what runs of them left in out/."""
    rows = {row["id"]: row for row in kept.manifest_rows("rows") if "id" in row}
    again = {**rows[FINISHED[0]], "id": "again"}
    write_manifest(
        version.folder / "first.jsonl",
        *(rows[label] for label in FINISHED), again, rows[BLOCKED], {**FAULTY, **SMALL}, {**SMALL, **ILLEGAL},
        rows[MISSING],
    )  # fmt: skip
    write_manifest(version.folder / "second.jsonl", rows[BLOCKED_OF_SECOND])
    write_manifest(version.folder / "previews.jsonl", *(rows[label] for label in PREVIEWS))
    out = version.folder / "out"
    # A file where a folder of clips should be is a store that refuses: decoding fails when stage 1 is long done.
    blocked = [out / "clips" / ids[label][:2] for label in (BLOCKED, BLOCKED_OF_SECOND)]
    assert not {path.name for path in blocked} & {ids[label][:2] for label in (*FINISHED, *PREVIEWS, MISSING)}
    (out / "clips").mkdir(parents=True)
    for path in blocked:
        path.touch()
    for manifest, code, more in (
        ("first.jsonl", 3, ("--limit", "8")),
        ("second.jsonl", 3, ()),
        ("previews.jsonl", 0, ("--stop-after", "stage1")),
    ):
        print(version.run("render", manifest, "--output", "out", *version.of_dataset(), *more, codes=(code,)))
    for path in blocked:
        path.unlink()
    # Pages of pictures are large, and nothing reads them again.
    for page in out.rglob("report.html"):
        page.unlink()
    print(version.run("status", "out"))
    print(version.run("verify", "out"))
    with tarfile.open(DATA / "dataset.tar.xz", "w:xz") as archive:
        for name in ("first.jsonl", "second.jsonl", "previews.jsonl", "out"):
            archive.add(version.folder / name, name, filter=anonymous)


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def write_manifest(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write(name: str, value: Any) -> None:
    """A JSON file with a line for each entry of the second level, so that a change of one shows as one."""
    lines = []
    for key, inner in value.items():
        entries = inner.items() if isinstance(inner, dict) else enumerate(inner)
        one = [("" if isinstance(inner, list) else f"{json.dumps(k)}: ") + dumped(v) for k, v in entries]
        opening, closing = "[]" if isinstance(inner, list) else "{}"
        lines.append(f"{json.dumps(key)}: {opening}\n  " + ",\n  ".join(one) + f"\n{closing}")
    (DATA / name).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    main()
