"""Names of what a run writes into its output, by which the reader of manifests tells an output from a manifest.

dataset/layout.py has the paths that are made of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable

CLIPS = "clips"
LATENTS = "latents"
THUMBS = "thumbs"
INDEX = "index"
FAILED = "failed"
PREVIEWS = "previews"
#: What runs need to go on, their events, and what was taken out of the tables.
STATE = "state"
#: What holds for all rows.
DATASET = "dataset.json"
#: Records of the newest run. Those of older ones are below `RUNS`.
RUN_RECORD = "run.json"
EVENTS = "events.jsonl"
REPORT = "report.html"
COMPARISON = "compare.html"
RUNS = "runs"

ITEM_ID_DIGITS, KEY_DIGITS = "([0-9a-f]{32})", "([0-9a-f]{8})"
#: Names of parts, with the dataset's id and the part's number as groups.
NUMBERED_PART = re.compile(r"part-([0-9a-f]{8})-([0-9]{8})\.parquet")
#: Names of parts of one row in index/ and previews/, which earlier versions wrote, with item_id and key as groups.
PART = re.compile(rf"part-{ITEM_ID_DIGITS}-{KEY_DIGITS}\.parquet")
#: The same in failed/, with the kind of failure, the item_id and the row's key as groups.
FAILED_PART = re.compile(rf"part-(row|infra|illegal)-{ITEM_ID_DIGITS}-{KEY_DIGITS}\.parquet")

_TABLES = (INDEX, FAILED, PREVIEWS)
_OWN_FOLDERS = frozenset({*_TABLES, CLIPS, LATENTS, THUMBS, RUNS, STATE})
_OWN_FILES = frozenset({DATASET, RUN_RECORD, EVENTS, REPORT, COMPARISON})


def names_of_an_output(
    folders: Iterable[str], files: Iterable[str], read: Callable[[str], bytes], names: Callable[[str], Iterable[str]]
) -> frozenset[str]:
    """Those names of the `folders` and `files` in one folder that a run wrote there; none when it is no output.

    `read` gives the bytes of one of the files, and `names` the names of the files in one of the folders.
    """
    folders, files = set(folders), set(files)
    if (RUN_RECORD in files and _is_run_record(read(RUN_RECORD))) or any(
        any(pattern.fullmatch(name) for pattern in (NUMBERED_PART, PART, FAILED_PART))
        for table in _TABLES if table in folders
        for name in names(table)
    ):  # fmt: skip
        return frozenset(folders & _OWN_FOLDERS | files & _OWN_FILES)
    return frozenset()


def _is_run_record(data: bytes) -> bool:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "run_id" in record
