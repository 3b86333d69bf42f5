"""What `dataset.json` says of the dataset's content, for those who use it: brought up to date when rows are folded."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pyarrow as pa

from ltx_ray.dataset import layout
from ltx_ray.dataset.existing import ExistingRows
from ltx_ray.dataset.identity import read_identity, write_identity
from ltx_ray.storage.locations import split_options
from ltx_ray.storage.store import Store

_THREADS = 8
#: What stands in `license` until somebody writes something else there.
_LICENSE_NOTE = (
    "The clips were made with LTX-2.3. Its licence, and those of the LoRAs and images that were used, say what may be "
    "done with them; ltx-ray adds no terms."
)


def describe(store: Store, existing: ExistingRows, before: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a dataset whose rows are `existing`, after that of `before`, which may be empty.

    Parts that `before` covers are not read again.
    """
    covered, digests = before.get("described_parts"), before.get("recipe_digests")
    if not isinstance(covered, int) or not isinstance(digests, list):
        covered, digests = 0, []
    numbers = {
        name: int(match[2])
        for name in store.names(layout.INDEX)
        if (match := layout.NUMBERED_PART.fullmatch(name)) is not None
    }
    new = sorted(name for name, number in numbers.items() if number >= covered)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _recipe_digests(store, name), new)
        recipes = set(map(str, digests)).union(*found)
    license_note = before.get("license")
    return {
        "schema_version": layout.SCHEMA_VERSION,
        "root": split_options(store.name)[0],
        "rows": {
            "index": existing.row_count - existing.index.pending_count,
            "previews": existing.preview_count - existing.previews.pending_count,
            "failed": existing.failed_count,
        },
        "recipe_digests": sorted(recipes),
        #: All parts of lower numbers have been read for that.
        "described_parts": max([covered, *(number + 1 for number in numbers.values())]),
        "license": license_note if isinstance(license_note, str) else _LICENSE_NOTE,
        "described_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def describe_dataset(store: Store, existing: ExistingRows, *, anew: bool = False) -> None:
    """Bring the description in `dataset.json` up to date, under the lease. `anew`: rows have left parts."""
    identity = read_identity(store)
    before = {**identity.description, "described_parts": None} if anew else identity.description
    write_identity(store, replace(identity, description=describe(store, existing, before)))


def _recipe_digests(store: Store, name: str) -> set[str]:
    try:
        column = store.read_columns(f"{layout.INDEX}/{name}", ["recipe_digest"])["recipe_digest"]
    except (FileNotFoundError, pa.ArrowException):
        return set()  # `verify` finds damage.
    return {digest for digest in column.unique().to_pylist() if digest is not None}
