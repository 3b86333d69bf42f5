"""Exports to a Hugging Face video folder: mp4 files, a table of their rows beside them, and a card."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ltx_ray.dataset import layout
from ltx_ray.dataset.export import ExportJob, ExportRecord, Place, Row, begin, in_order, sample_name

#: Clips of a folder. The Hub takes no more than 10,000 files in one.
FOLDER_CLIPS = 5_000
#: The column by which the folder's builder finds a row's clip.
_SCHEMA = pa.schema([("file_name", pa.string()), *layout.INDEX_SCHEMA])
_CARD = "README.md"


def export_hf(job: ExportJob, folder_clips: int = FOLDER_CLIPS) -> ExportRecord:
    """Write `train/<number>/<clip>.mp4` with their `metadata.parquet`, and the card; returns what there is by now.

    A folder counts when its table is there, which is written last. A later export begins a new folder.
    """
    record = begin(job, "hf")
    exported = record.exported
    places = dict(exported.places)
    rows: list[Row] = []

    def write(entry: tuple[Any, Place, Row, bytes, str]) -> None:
        *_, row, clip, folder = entry
        job.target.write_bytes(f"{folder}/{sample_name(row)}.mp4", clip)

    def entries() -> Any:
        for taken, entry in enumerate(job.clips(dict(places))):
            yield *entry, f"train/{exported_files + taken // folder_clips:06d}"

    exported_files = exported.files
    for (part, place, row, _, folder), _ in in_order(write, entries()):
        rows.append({"file_name": f"{sample_name(row)}.mp4", **row})
        places[part.dataset] = place
        if len(rows) == folder_clips:
            _finish_folder(job, record, folder, rows, places)
            rows = []
    if rows:
        _finish_folder(job, record, f"train/{exported.files:06d}", rows, places)
    job.target.write_bytes(_CARD, _card(job, record).encode())
    return record


def _finish_folder(
    job: ExportJob, record: ExportRecord, folder: str, rows: list[Row], places: dict[str, Place]
) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink, compression="zstd")
    job.target.write_bytes(f"{folder}/metadata.parquet", sink.getvalue())
    exported = record.exported
    exported.files += 1
    exported.rows += len(rows)
    exported.places = dict(places)
    record.write()


def _card(job: ExportJob, record: ExportRecord) -> str:
    """The dataset's card: what the Hub shows, and what its loader goes by."""
    try:
        described = json.loads(job.source.read_bytes(layout.DATASET))
    except (OSError, ValueError):
        described = {}
    rows = record.exported.rows
    recipes = "\n".join(f"* `{digest}`" for digest in described.get("recipe_digests") or [])
    return f"""---
license: other
task_categories:
- text-to-video
size_categories:
- {_size_category(rows)}
configs:
- config_name: default
  data_files:
  - split: train
    path: train/**
---

# {record.exported.dataset}

{rows:,} clips with sound, made from prompts with LTX-2.3 by ltx-ray. Each row has its clip in `video`, its `prompt`,
seed and all other settings, what was measured of the clip, and flags such as `frozen` or `silent`.

```python
from datasets import load_dataset

clips = load_dataset("<this folder or repository>", split="train")
```

## Licence

{described.get("license") or "Not stated."}

## Recipes

The digests of what made the clips (weights, LoRAs and strengths, precision), as in the column `recipe_digest`:

{recipes or "None is recorded."}
"""


def _size_category(rows: int) -> str:
    """The Hub's name of the size."""
    names = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M"]
    return names[min(len(names) - 1, max(0, len(str(rows)) - 3))]
