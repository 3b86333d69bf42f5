"""The output's layout: schemas of its tables, and the names of everything in it.

All paths are relative to the output's root, with '/'. docs/dataset.md describes them for users. The files of a run
in progress belong to storage: the lease (lease.py) and temporary files (store.py). The names of folders, records and
parts are in manifest/outputs.py, because the reader of manifests must know an output when it meets one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection

import pyarrow as pa

from ltx_ray.manifest.columns import COLUMNS
from ltx_ray.manifest.outputs import CLIPS as CLIPS
from ltx_ray.manifest.outputs import COMPARISON as COMPARISON
from ltx_ray.manifest.outputs import DATASET as DATASET
from ltx_ray.manifest.outputs import EVENTS as EVENTS
from ltx_ray.manifest.outputs import FAILED as FAILED
from ltx_ray.manifest.outputs import FAILED_PART as FAILED_PART
from ltx_ray.manifest.outputs import INDEX as INDEX
from ltx_ray.manifest.outputs import ITEM_ID_DIGITS
from ltx_ray.manifest.outputs import LATENTS as LATENTS
from ltx_ray.manifest.outputs import NUMBERED_PART as NUMBERED_PART
from ltx_ray.manifest.outputs import PART as PART
from ltx_ray.manifest.outputs import PREVIEWS as PREVIEWS
from ltx_ray.manifest.outputs import REPORT as REPORT
from ltx_ray.manifest.outputs import RUN_RECORD as RUN_RECORD
from ltx_ray.manifest.outputs import RUNS as RUNS
from ltx_ray.manifest.outputs import STATE as STATE
from ltx_ray.manifest.outputs import THUMBS as THUMBS
from ltx_ray.manifest.raw import FAILED_ROW_COLUMN

# --- folders and files -------------------------------------------------------------------------------------------

#: A folder that holds one of these is a dataset.
DATASET_MARKS = (RUN_RECORD, INDEX, FAILED, PREVIEWS, f"{STATE}/wal")
#: The GPU time that all runs have reserved.
GPU_TIME = f"{STATE}/gpu_time.json"
#: What replicas have computed for known-answer clips.
ANSWERS = f"{STATE}/answers.json"
#: Names of files of latents, with the item_id as group.
LATENTS_FILE = re.compile(rf"{ITEM_ID_DIGITS}\.safetensors")
ITEM_ID = re.compile(ITEM_ID_DIGITS)
#: Kinds of failure: the row's own fault, the infrastructure's, rows that are no legal request, and rows that have no
#: item because the store of their image did not answer, which is the infrastructure's fault, too.
ROW, INFRASTRUCTURE, ILLEGAL, UNREAD = "row", "infra", "illegal", "unread"
#: What a mark in a segment of failures says: the row's failure was overcome, or those that it had as other items.
OVERCOME, AS_OTHER_ITEMS = "overcome", "as other items"
#: Segments: rows that are finished and in no part yet.
SEGMENTS = f"{STATE}/wal"
#: What was taken out of the dataset.
ASIDE = f"{STATE}/aside"
#: Records of what was taken down.
REMOVED = f"{STATE}/removed"
#: Names of segments below `SEGMENTS`, with their table as group.
SEGMENT = re.compile(rf"[^/]+/[0-9]{{8}}-({INDEX}|{PREVIEWS}|{FAILED})\.rows")


def clip_path(item_id: str) -> str:
    return f"{CLIPS}/{shard(item_id)}/{clip_name(item_id)}"


def preview_path(item_id: str) -> str:
    """The clip that is made of stage 1 alone."""
    return f"{PREVIEWS}/{shard(item_id)}/{clip_name(item_id)}"


def clip_name(item_id: str) -> str:
    return f"{item_id}.mp4"


def latents_path(item_id: str) -> str:
    return f"{LATENTS}/{shard(item_id)}/{item_id}.safetensors"


def thumb_path(item_id: str) -> str:
    """Some frames of the clip in one small picture."""
    return f"{THUMBS}/{shard(item_id)}/{item_id}.webp"


def shard(item_id: str) -> str:
    """The folder, of 256, that holds an item's files below clips/, latents/, thumbs/ and previews/."""
    return item_id[:2]


def row_key(row_id: str | None) -> str:
    """8 hex digits that tell the manifest rows of one item apart."""
    return hashlib.sha256((row_id or "").encode()).hexdigest()[:8]


def part_name(dataset: str, number: int) -> str:
    """Name of a part of any table. `dataset`: the id of the dataset, 8 hex digits."""
    return f"part-{dataset}-{number:08d}.parquet"


def one_row_part(item_id: str, key: str) -> str:
    """Name of a part of index/ or previews/ as earlier versions wrote them, one for each row."""
    return f"part-{item_id}-{key}.parquet"


def segment_path(run_id: str, number: int, table: str) -> str:
    return f"{SEGMENTS}/{run_id}/{number:08d}-{table}.rows"


def is_part(name: str) -> bool:
    """Whether the file `name` of a table's folder is a part: files of other names were set aside, or are foreign."""
    return name.startswith("part-") and name.endswith(".parquet")


def is_visible(name: str) -> bool:
    """Whether readers of a whole folder, such as pyarrow's datasets, take the file `name`."""
    return not name.startswith(("_", "."))


def older_record(run_id: str, name: str) -> str:
    """Where the record `name` (RUN_RECORD, EVENTS, REPORT) of an older run is."""
    return f"{RUNS}/{run_id}/{name}"


def event_segments(run_id: str) -> str:
    """The folder of a run's full segments of events."""
    return f"{STATE}/events/{run_id}"


def timeline_path(run_id: str) -> str:
    """What each replica of a run did over time (`timeline.Timeline` as JSON)."""
    return f"{event_segments(run_id)}/timeline.json"


# --- schemas -----------------------------------------------------------------------------------------------------

#: Of the tables: 1 lacks ADDED_COLUMNS. A change that readers notice raises it.
SCHEMA_VERSION = 2
_MANIFEST_COLUMNS = [*((column.name, column.type) for column in COLUMNS.values()), ("extra", pa.string())]
SECONDS_COLUMNS = ("text_seconds", "stage1_seconds", "stage2_seconds", "decode_seconds", "gpu_seconds")
#: What is measured of a clip (`records.PictureMeasures` and `SoundMeasures`, whose fields these are).
_MEASURE_COLUMNS = [
    ("loudness_lufs", pa.float64()),
    ("clipped_samples", pa.int64()),
    ("motion", pa.float64()),
    ("sharpness", pa.float64()),
    ("mean_luma", pa.float64()),
    ("cuts", pa.int32()),
    ("sound_seconds", pa.float64()),
    ("still_share", pa.float64()),
    ("black_share", pa.float64()),
]
#: Columns that parts of earlier versions lack. Readers take them for null there.
ADDED_COLUMNS = frozenset(name for name, _ in _MEASURE_COLUMNS)
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
        *_MEASURE_COLUMNS,
    ]
)


def index_schema(names: Collection[str]) -> pa.Schema:
    """The schema of a part of index/ with the columns `names`: all of them, but for those that its version lacked."""
    return pa.schema([field for field in INDEX_SCHEMA if field.name in names or field.name not in ADDED_COLUMNS])


#: A preview is itself a manifest row, as a failed row is.
PREVIEW_SCHEMA = INDEX_SCHEMA.append(pa.field("source", pa.string())).append(pa.field(FAILED_ROW_COLUMN, pa.string()))
#: A failure's schema in parts. In segments, rows with a `mark` stand for failures that were overcome.
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
FAILED_SEGMENT_SCHEMA = FAILED_SCHEMA.append(pa.field("mark", pa.string()))
#: Schemas of the tables' parts, and of their segments.
PART_SCHEMAS = {INDEX: INDEX_SCHEMA, PREVIEWS: PREVIEW_SCHEMA, FAILED: FAILED_SCHEMA}
SEGMENT_SCHEMAS = {**PART_SCHEMAS, FAILED: FAILED_SEGMENT_SCHEMA}
