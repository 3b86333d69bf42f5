"""`ltx-ray verify`: index against clips by sha256, and a sample rendered again to compare its latents."""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import io
import itertools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ltx_ray.dataset import layout
from ltx_ray.dataset.existing import list_existing
from ltx_ray.dataset.layout import FAILED_SCHEMA, INDEX_SCHEMA, row_key
from ltx_ray.dataset.repair import repair, set_aside
from ltx_ray.dataset.writer import read_rows
from ltx_ray.manifest.columns import COLUMNS
from ltx_ray.presets import PIPELINES
from ltx_ray.records import plain
from ltx_ray.run import Options, render
from ltx_ray.storage.lease import Lease
from ltx_ray.storage.store import Store, parent

_THREADS = 8
_AGAIN = "run ltx-ray verify --repair, then ltx-ray render: it is rendered again"
_ASIDE = "run ltx-ray verify --repair: it is set aside, and its row has a part of its own"


@dataclass(frozen=True)
class Finding:
    """What is wrong with a file of the dataset. `aside`: how its part is to be renamed so that it is mended."""

    file: str
    id: str | None
    what: str
    todo: str
    aside: str | None = None

    def __str__(self) -> str:
        return f"{self.file}{f' ({self.id})' if self.id else ''}: {self.what}; {self.todo}"


@dataclass
class _Found:
    """What the check of the index has met; of a million rows 200 bytes each stay in memory."""

    counts: Counter[str] = field(default_factory=Counter)
    ids: set[int] = field(default_factory=set)
    #: Rows to be rendered again, as a heap of (order, file, row) that gives away the last in order.
    sample: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)
    last_item: str | None = None


def verify(
    output: str,
    say: Callable[[str], None],
    sample: int = 0,
    mend: bool = False,
    options: Callable[[str, str], Options] | None = None,
) -> int:
    """Check the dataset at `output` and say what is wrong, one line a problem; returns how many there are.

    sample: so many rows are rendered again, with `options(manifest, output)` and each row's own dtype, precision
    and noise device. mend: parts of bad rows are moved aside. Raises ValueError when there is no dataset.
    """
    store = Store(output)
    if not store.exists(layout.INDEX) and not store.exists(layout.RUN_RECORD):
        raise ValueError(f"{output}: no dataset; legal: the --output of a run")
    lease = Lease(store, f"verify-{os.getpid()}")
    if mend:
        lease.acquire(say)
    try:
        if mend:
            repair(store, list_existing(store), say)
        found, problems, mended = _Found(), 0, 0
        for problem in itertools.chain(_check_index(store, found, sample), _check_failed(store, found)):
            problems += 1
            if mend and problem.aside is not None:
                name = os.path.basename(problem.file)
                set_aside(store, name, problem.aside)
                mended += 1
                now = layout.set_aside_path(name, problem.aside)
                problem = dataclasses.replace(problem, todo=f"moved aside as {now}")
            say(str(problem))
    finally:
        if mend:
            lease.release()
    counts = found.counts
    if counts["stray"]:
        say(f"note: {counts['stray']} clips have no row in the index (a run was cut between the two, or goes on now)")
    if counts["shared"]:
        say(f"note: {counts['shared']} rows have the id of another row with other content (of several manifests)")
    if sample:
        assert options is not None
        for problem in _render_again([row for *_, row in sorted(found.sample, reverse=True)], options, say):
            problems += 1
            say(str(problem))
    say(
        f"{counts['rows']} rows and {counts['clips']} clips checked, {counts['failed']} rows in failed/: "
        + (f"{problems} problems" if problems else "all well")
        + (f", {mended} parts moved aside; ltx-ray render renders their rows again" if mended else "")
    )
    return problems


# --- the index against the clips --------------------------------------------------------------------


def _check_index(store: Store, found: _Found, sample: int) -> Iterator[Finding]:
    names = [name for name in store.list_names(layout.INDEX) if layout.is_visible(name)]
    by_folder = {folder: list(group) for folder, group in itertools.groupby(names, layout.shard_of_part)}
    with ThreadPoolExecutor(_THREADS) as pool:
        for folder in sorted({*by_folder, *store.folders(layout.CLIPS)}):
            parts = by_folder.pop(folder, [])
            items = set()
            # a window, so that not all clips of a folder are under way at once
            for some in _batched(parts):
                for name, rows, problems in pool.map(lambda name: _check_part(store, name), some):
                    yield from problems
                    for row in rows:
                        items.add(row["item_id"])
                        yield from _count(row, name, found, good=not problems, sample=sample)
            clips = {name for name in store.list_names(f"{layout.CLIPS}/{folder}") if name.endswith(".mp4")}
            found.counts["stray"] += len(clips - {layout.clip_name(item_id) for item_id in items})


def _batched(names: list[str]) -> Iterator[list[str]]:
    size = 8 * _THREADS
    return (names[start : start + size] for start in range(0, len(names), size))


def _check_part(store: Store, name: str) -> tuple[str, list[dict[str, Any]], list[Finding]]:
    """Its rows, and what is wrong with it."""
    file = f"{layout.INDEX}/{name}"
    try:
        table = pq.read_table(io.BytesIO(store.read_bytes(file)))
    except (pa.ArrowException, ValueError) as error:
        what = f"cannot be read as Parquet ({_line(error)})"
        return name, [], [Finding(file, None, what, _AGAIN, "unreadable")]
    schema = table.schema.remove_metadata()
    if not schema.equals(INDEX_SCHEMA):
        wrong = [c.name for c in INDEX_SCHEMA if c.name not in schema.names or schema.field(c.name).type != c.type]
        what = f"has not the columns of an index ({', '.join(wrong) or 'more, or another order'})"
        return name, [], [Finding(file, None, what, _AGAIN, "unreadable")]
    rows = table.to_pylist()
    if len(rows) != 1:
        return name, rows, [Finding(file, None, f"holds {len(rows)} rows, legal: 1", _AGAIN, "unreadable")]
    [row] = rows
    if not row["item_id"] or not row["id"]:
        return name, [], [Finding(file, row["id"], "its row has no id or no item_id", _AGAIN, "unreadable")]
    if name != (due := layout.part_name(row["item_id"], row_key(row["id"]))):
        what = f"is not named after its row (that would be {due})"
        return name, rows, [Finding(file, row["id"], what, _ASIDE, "duplicate")]
    if (what := _wrong_clip(store, row)) is not None:
        return name, rows, [Finding(file, row["id"], what, _AGAIN, "lost")]
    return name, rows, []


def _wrong_clip(store: Store, row: dict[str, Any]) -> str | None:
    clip = row["clip"]
    if clip is None:
        return None
    if clip != layout.clip_path(row["item_id"]):
        return f"its clip is {clip!r}, which is not that of its item"
    try:
        data = store.read_bytes(clip)
    except FileNotFoundError:
        return f"its clip {clip} is missing"
    if (sha256 := hashlib.sha256(data).hexdigest()) != row["clip_sha256"]:
        return f"its clip {clip} has sha256 {sha256}, the index has {row['clip_sha256']}"
    if row["item_id"].encode() not in data:
        return f"its clip {clip} is of another item: its metadata does not name {row['item_id']}"
    return None


def _count(row: dict[str, Any], name: str, found: _Found, good: bool, sample: int) -> Iterator[Finding]:
    found.counts["rows"] += 1
    found.counts["clips"] += row["clip"] is not None
    both = _short_hash(f"{row['item_id']} {row['id']}")
    if both in found.ids and good:
        yield Finding(f"{layout.INDEX}/{name}", row["id"], "the row is in another part too", _ASIDE, "duplicate")
    alone = _short_hash(row["id"])
    found.counts["shared"] += alone in found.ids and both not in found.ids
    found.ids |= {both, alone}
    # one row an item, whose parts follow each other; hashes come in no order, so that the sample is spread
    if good and sample and row["clip"] is not None and row["item_id"] != found.last_item:
        found.last_item = row["item_id"]
        add = heapq.heappush if len(found.sample) < sample else heapq.heappushpop
        add(found.sample, (-_short_hash(row["item_id"]), name, row))


def _check_failed(store: Store, found: _Found) -> Iterator[Finding]:
    for name in store.list_names(layout.FAILED):
        if not layout.is_visible(name):
            continue
        try:
            table = pq.read_table(io.BytesIO(store.read_bytes(f"{layout.FAILED}/{name}")))
            table.select(FAILED_SCHEMA.names)
            found.counts["failed"] += table.num_rows
        except FileNotFoundError:
            continue  # rendered since
        except (pa.ArrowException, ValueError, KeyError) as error:
            what = f"cannot be read as a table of failed rows ({_line(error)})"
            yield Finding(
                f"{layout.FAILED}/{name}", None, what, "delete it; ltx-ray render of its manifest tries the row again"
            )


# --- a sample rendered again ------------------------------------------------------------------------


def _render_again(
    rows: list[dict[str, Any]], options: Callable[[str, str], Options], say: Callable[[str], None]
) -> Iterator[Finding]:
    """Render `rows` once more, each by its own recipe's numbers, and compare what can be compared."""

    def numbers(row: dict[str, Any]) -> tuple[str, str, str]:
        recipe = json.loads(row["recipe"])
        return recipe["dtype"], recipe["precision"], recipe["noise_device"]

    for (dtype, precision, noise_device), group in itertools.groupby(sorted(rows, key=numbers), numbers):
        again = {row["item_id"]: row for row in group}
        with tempfile.TemporaryDirectory(prefix="ltx-ray-verify-") as folder:
            manifest, output = os.path.join(folder, "sample.jsonl"), os.path.join(folder, "out")
            with open(manifest, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(_manifest_row(row)) + "\n" for row in again.values())
            asked = options(manifest, output)
            roots = {parent(image["path"]) for row in again.values() for image in row["images"] or ()}
            render(
                dataclasses.replace(
                    asked, dtype=dtype, precision=precision, noise_device=noise_device, row_defaults={},
                    save_latents=False, stop_after=None, image_roots=(*asked.image_roots, *sorted(roots)),
                )
            )  # fmt: skip
            made = {row["id"]: row for row in read_rows(Store(output), layout.INDEX)}
            failed = {row["id"]: row for row in read_rows(Store(output), layout.FAILED)}
        for item_id, row in again.items():
            yield from _compare(row, made.get(item_id), failed.get(item_id), say)


def _compare(
    row: dict[str, Any], made: dict[str, Any] | None, failed: dict[str, Any] | None, say: Callable[[str], None]
) -> Iterator[Finding]:
    file = layout.index_path(row["item_id"], row_key(row["id"]))
    if made is None:
        why = failed["message"] if failed else "the run ended before it"
        yield Finding(file, row["id"], f"could not be rendered again ({_line(why)})", "mend that and verify again")
    elif made["item_id"] != row["item_id"]:
        what = "other weights or LoRAs" if made["recipe_digest"] != row["recipe_digest"] else "other images"
        say(f"{file} ({row['id']}): not comparable: it was rendered with {what} than are given now")
    elif made["latents_sha256"] == row["latents_sha256"]:
        say(f"{file} ({row['id']}): rendered again, the same latents")
    elif (made["device"], made["numerics"]) != (row["device"], row["numerics"]):
        now = made["device"] if made["device"] != row["device"] else made["numerics"]
        then = row["device"] if made["device"] != row["device"] else row["numerics"]
        say(f"{file} ({row['id']}): not comparable: it was rendered on {then}, and now on {now}, where bits may differ")
    else:
        what = f"renders to latents {made['latents_sha256']}, the index has {row['latents_sha256']}"
        yield Finding(file, row["id"], what, "see `versions` of both: a library or a kernel has changed its bits")


def _manifest_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row as a manifest's, under its item's name (ids of two manifests may clash)."""
    # a default may name what may not be asked for, such as a block that a smaller model has not
    defaults = PIPELINES[row["pipeline"]].defaults
    values = {name: row[name] for name in COLUMNS if row[name] != plain(defaults.get(name))}
    return {**values, "id": row["item_id"], "prompt": row["prompt"]}


def _short_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _line(message: object) -> str:
    return " ".join(str(message).split())[:200]
