"""The output's layout: schemas of its tables, and the names of everything in it.

All paths are relative to the output's root, with '/'. docs/operations.md describes them for users. The files of a run
in progress belong to storage: the lease (lease.py) and temporary files (store.py).
"""

from __future__ import annotations

import hashlib
import re

import pyarrow as pa

from ltx_ray.manifest.columns import COLUMNS
from ltx_ray.manifest.reader import FAILED_ROW_COLUMN

# --- folders and files -------------------------------------------------------------------------------------------

CLIPS = "clips"
LATENTS = "latents"
INDEX = "index"
FAILED = "failed"
PREVIEWS = "previews"
#: What holds for all rows.
DATASET = "dataset.json"
#: Records of the newest run. Those of older ones are below `RUNS`.
RUN_RECORD = "run.json"
EVENTS = "events.jsonl"
REPORT = "report.html"
RUNS = "runs"
#: A folder that holds one of these is a dataset.
DATASET_MARKS = (RUN_RECORD, INDEX, FAILED, PREVIEWS)

_ITEM_ID, _KEY = "([0-9a-f]{32})", "([0-9a-f]{8})"
#: Names of parts of index/ and previews/, with the item_id and the row's key as groups.
PART = re.compile(rf"part-{_ITEM_ID}-{_KEY}\.parquet")
#: Names of parts of failed/, with the kind of failure, the item_id and the row's key as groups.
FAILED_PART = re.compile(rf"part-(row|infra|illegal)-{_ITEM_ID}-{_KEY}\.parquet")
#: Names of files of latents, with the item_id as group.
LATENTS_FILE = re.compile(rf"{_ITEM_ID}\.safetensors")
ITEM_ID = re.compile(_ITEM_ID)
#: Kinds of failure in names of parts: the row's own fault, the infrastructure's, and rows that are no legal request
#: (for which the name has 32 digits of the row's content in place of an item_id).
ROW, INFRASTRUCTURE, ILLEGAL = "row", "infra", "illegal"


def clip_path(item_id: str) -> str:
    return f"{CLIPS}/{shard(item_id)}/{clip_name(item_id)}"


def preview_path(item_id: str) -> str:
    """The clip that is made of stage 1 alone."""
    return f"{PREVIEWS}/{shard(item_id)}/{clip_name(item_id)}"


def clip_name(item_id: str) -> str:
    return f"{item_id}.mp4"


def latents_path(item_id: str) -> str:
    return f"{LATENTS}/{shard(item_id)}/{item_id}.safetensors"


def shard(item_id: str) -> str:
    """The folder, of 256, that holds an item's files below clips/, latents/ and previews/."""
    return item_id[:2]


def row_key(row_id: str | None) -> str:
    """8 hex digits that tell the manifest rows of one item apart."""
    return hashlib.sha256((row_id or "").encode()).hexdigest()[:8]


def item_of_part(name: str) -> str:
    """The item_id in a name that matches `PART`."""
    return name[len("part-") : len("part-") + 32]


def shard_of_part(name: str) -> str:
    return shard(item_of_part(name))


def part_name(item_id: str, key: str) -> str:
    """Name of a row's part of index/ or previews/."""
    return f"part-{item_id}-{key}.parquet"


def index_path(item_id: str, key: str) -> str:
    return f"{INDEX}/{part_name(item_id, key)}"


def preview_row_path(item_id: str, key: str) -> str:
    return f"{PREVIEWS}/{part_name(item_id, key)}"


def failed_name(kind: str, item_id: str, key: str) -> str:
    """Name of a row's part of failed/. `kind`: ROW, INFRASTRUCTURE or ILLEGAL."""
    return f"part-{kind}-{item_id}-{key}.parquet"


def failed_path(kind: str, item_id: str, key: str) -> str:
    return f"{FAILED}/{failed_name(kind, item_id, key)}"


def is_illegal_part(name: str) -> bool:
    """Whether the part `name` of failed/ holds an illegal row."""
    return name.startswith(f"part-{ILLEGAL}-")


def set_aside_path(name: str, why: str) -> str:
    """Where the part `name` of index/ goes that readers are to pass over."""
    return f"{INDEX}/_{why}-{name}"


def is_part(name: str) -> bool:
    """Whether readers of a table take the file `name`: files of other names are no parts, or were set aside."""
    return name.startswith("part-") and name.endswith(".parquet")


def is_visible(name: str) -> bool:
    """Whether readers of a whole folder, such as pyarrow's datasets, take the file `name`."""
    return not name.startswith(("_", "."))


def older_record(run_id: str, name: str) -> str:
    """Where the record `name` (RUN_RECORD, EVENTS, REPORT) of an older run is."""
    return f"{RUNS}/{run_id}/{name}"


# --- schemas -----------------------------------------------------------------------------------------------------

_MANIFEST_COLUMNS = [*((column.name, column.type) for column in COLUMNS.values()), ("extra", pa.string())]
SECONDS_COLUMNS = ("text_seconds", "stage1_seconds", "stage2_seconds", "decode_seconds", "gpu_seconds")
INDEX_SCHEMA = pa.schema(
    [
        *_MANIFEST_COLUMNS,
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
    [
        *_MANIFEST_COLUMNS,
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
