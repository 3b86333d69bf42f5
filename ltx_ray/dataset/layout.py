"""The tables of a dataset and the names of everything in it."""

from __future__ import annotations

import hashlib

import pyarrow as pa

from ltx_ray.manifest.columns import COLUMNS
from ltx_ray.manifest.reader import FAILED_ROW_COLUMN

SECONDS_COLUMNS = ("text_seconds", "stage1_seconds", "stage2_seconds", "decode_seconds", "gpu_seconds")
INDEX_SCHEMA = pa.schema(
    [(column.name, column.type) for column in COLUMNS.values()]
    + [
        ("extra", pa.string()),
        ("item_id", pa.string()),
        ("clip", pa.string()),
        ("clip_sha256", pa.string()),
        ("latents_sha256", pa.string()),
        ("audio_stage", pa.string()),
        ("flags", pa.list_(pa.string())),
        ("attempts", pa.int32()),
        ("stage1_replica", pa.string()),
        ("stage2_replica", pa.string()),
        ("switches", pa.int32()),
        *((name, pa.float64()) for name in SECONDS_COLUMNS),
        ("device", pa.string()),
        ("numerics", pa.string()),
        ("recipe", pa.string()),
        ("recipe_digest", pa.string()),
        ("noise_ledger", pa.string()),
        ("versions", pa.string()),
        ("finished_at", pa.timestamp("us", tz="UTC")),
    ]
)
#: A preview is itself a manifest row, as a failed row is.
PREVIEW_SCHEMA = INDEX_SCHEMA.append(pa.field("source", pa.string())).append(pa.field(FAILED_ROW_COLUMN, pa.string()))
FAILED_SCHEMA = pa.schema(
    [(column.name, column.type) for column in COLUMNS.values()]
    + [
        ("extra", pa.string()),
        ("item_id", pa.string()),
        ("source", pa.string()),
        ("stage", pa.string()),
        ("attempts", pa.int32()),
        ("error_class", pa.string()),
        ("message", pa.string()),
        ("traceback", pa.string()),
        ("failed_at", pa.timestamp("us", tz="UTC")),
        (FAILED_ROW_COLUMN, pa.string()),
    ]
)


def index_part(item_id: str, key: str) -> str:
    """Name of the part of `index/` that holds the row with this key of the item."""
    return f"part-{item_id}-{key}.parquet"


def row_key(row_id: str | None) -> str:
    """8 hex digits that tell apart the manifest rows of one item."""
    return hashlib.sha256((row_id or "").encode()).hexdigest()[:8]
