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
#: What holds for all rows.
DATASET = "dataset.json"
#: Records of the newest run. Those of older ones are below `RUNS`.
RUN_RECORD = "run.json"
EVENTS = "events.jsonl"
REPORT = "report.html"
RUNS = "runs"
#: What runs keep for themselves and for later runs.
STATE = "state"

ITEM_ID_DIGITS, KEY_DIGITS = "([0-9a-f]{32})", "([0-9a-f]{8})"
#: Names of parts of index/ and previews/, with the item_id and the row's key as groups.
PART = re.compile(rf"part-{ITEM_ID_DIGITS}-{KEY_DIGITS}\.parquet")
#: Names of parts of failed/, with the kind of failure, the item_id and the row's key as groups.
FAILED_PART = re.compile(rf"part-(row|infra|illegal)-{ITEM_ID_DIGITS}-{KEY_DIGITS}\.parquet")

_TABLES = (INDEX, FAILED, PREVIEWS)
_OWN_FOLDERS = frozenset({*_TABLES, CLIPS, LATENTS, THUMBS, RUNS, STATE})
_OWN_FILES = frozenset({DATASET, RUN_RECORD, EVENTS, REPORT})


def names_of_an_output(
    folders: Iterable[str], files: Iterable[str], read: Callable[[str], bytes], names: Callable[[str], Iterable[str]]
) -> frozenset[str]:
    """Those names of the `folders` and `files` in one folder that a run wrote there; none when it is no output.

    `read` gives the bytes of one of the files, and `names` the names of the files in one of the folders.
    """
    folders, files = set(folders), set(files)
    if (RUN_RECORD in files and _is_run_record(read(RUN_RECORD))) or any(
        PART.fullmatch(name) or FAILED_PART.fullmatch(name)
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
