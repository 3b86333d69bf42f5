"""`ltx-ray verify`: checks the index against the clips by sha256, and renders a sample again to compare its latents."""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from ltx_ray.dataset import layout
from ltx_ray.dataset import repair as dataset_repair
from ltx_ray.dataset.existing import list_existing
from ltx_ray.dataset.layout import FAILED_SCHEMA, row_key
from ltx_ray.dataset.writer import read_rows
from ltx_ray.manifest.columns import COLUMNS
from ltx_ray.placement.sizing import ParallelConfig
from ltx_ray.presets import PIPELINES
from ltx_ray.records import canonical_json, plain
from ltx_ray.run import ExitCode, Options, render
from ltx_ray.storage.lease import Lease
from ltx_ray.storage.locations import parent
from ltx_ray.storage.parquet import read_parquet
from ltx_ray.storage.store import Store

_THREADS = 8
#: Parts that are read at once: enough for every thread, and not all clips of a folder.
_BATCH = 8 * _THREADS
_RENDER_AGAIN = "run ltx-ray verify --repair, then ltx-ray render: the row is rendered again"
_SET_ASIDE = "run ltx-ray verify --repair: the part is set aside, and its row keeps its own part"

#: A row of the index, by column.
IndexRow = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """Something wrong with a file of the dataset."""

    file: str
    #: The id of its row; None where the row is not known.
    id: str | None
    problem: str
    remedy: str
    #: Why the part is to be set aside, as `dataset.repair.set_aside` takes it; None for a file that stays.
    set_aside: str | None = None

    def __str__(self) -> str:
        return f"{self.file}{f' ({self.id})' if self.id else ''}: {self.problem}; {self.remedy}"


@dataclass(frozen=True)
class _CheckedPart:
    """A part of the index: its rows as far as they can be read, and what is wrong with it."""

    name: str
    rows: tuple[IndexRow, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def path(self) -> str:
        return f"{layout.INDEX}/{self.name}"


def verify(
    output: str,
    say: Callable[[str], None],
    sample: int = 0,
    repair: bool = False,
    options: Callable[[str, str], Options] | None = None,
) -> int:
    """Check the dataset at `output` and say what is wrong with it, one line per problem; returns their number.

    `sample`: this many rows are rendered again, by `options(manifest, output)` with each row's own dtype, precision and
    noise device. `repair`: parts of bad rows are set aside. Raises ValueError when there is no dataset.
    """
    store = Store(output)
    if not store.exists(layout.INDEX) and not store.exists(layout.RUN_RECORD):
        raise ValueError(f"{store.name}: no dataset; legal: the --output of a run")
    check = _Check(store, sample)
    problems, moved = _check_files(check, say, repair)
    if check.clips_without_row:
        say(
            f"note: {check.clips_without_row} clips have no row in the index (a run was interrupted, or is running now)"
        )
    if check.shared_ids:
        say(f"note: {check.shared_ids} rows have the id of another row with other content (of several manifests)")
    if sample:
        assert options is not None
        for finding in _render_again(check.sampled_rows(), options, say):
            problems += 1
            say(str(finding))
    say(
        f"{check.rows} rows and {check.clips} clips checked, {check.failed_rows} rows in failed/: "
        + (f"{problems} problems" if problems else "all well")
        + (f", {moved} parts set aside; ltx-ray render renders their rows again" if moved else "")
    )
    return problems


def _check_files(check: _Check, say: Callable[[str], None], repair: bool) -> tuple[int, int]:
    """Check all files; the number of problems, and that of the parts that were set aside."""
    store, problems, moved = check.store, 0, 0
    lease = Lease(store, f"verify-{os.getpid()}")
    if repair:
        lease.acquire(say)
    try:
        if repair:
            dataset_repair.repair(store, list_existing(store), say)
        for finding in itertools.chain(check.index(), check.failed()):
            problems += 1
            if repair and finding.set_aside is not None:
                name = os.path.basename(finding.file)
                dataset_repair.set_aside(store, name, finding.set_aside)
                moved += 1
                now = layout.set_aside_path(name, finding.set_aside)
                finding = dataclasses.replace(finding, remedy=f"set aside as {now}")
            say(str(finding))
    finally:
        if repair:
            lease.release()
    return problems, moved


# --- the index against the clips --------------------------------------------------------------------


@dataclass
class _Check:
    """A pass over the files of a dataset. It keeps 200 bytes of a row in memory."""

    store: Store
    #: Rows to choose for rendering again.
    sample: int
    rows: int = 0
    clips: int = 0
    failed_rows: int = 0
    clips_without_row: int = 0
    #: Rows that have the id of another row, with other content.
    shared_ids: int = 0
    #: Short hashes of ids, and of ids with their items.
    _seen: set[int] = field(default_factory=set)
    #: A heap of (negative hash of the item, part, row): the item with the largest hash is on top, and leaves first.
    _sampled: list[tuple[int, str, IndexRow]] = field(default_factory=list)
    _last_item_id: str | None = None

    def sampled_rows(self) -> list[IndexRow]:
        """The rows of the items with the smallest hashes, which are spread over the dataset. One row an item."""
        return [row for *_, row in sorted(self._sampled, key=lambda entry: entry[:2], reverse=True)]

    def index(self) -> Iterator[Finding]:
        """Check the parts of the index and their clips, folder by folder."""
        names = [name for name in self.store.list_names(layout.INDEX) if layout.is_visible(name)]
        by_folder = {folder: list(group) for folder, group in itertools.groupby(names, layout.shard_of_part)}
        with ThreadPoolExecutor(_THREADS) as pool:
            for folder in sorted({*by_folder, *self.store.folders(layout.CLIPS)}):
                item_ids: set[str] = set()
                for names in _batched(by_folder.pop(folder, [])):
                    for part in pool.map(lambda name: _check_part(self.store, name), names):
                        yield from part.findings
                        for row in part.rows:
                            item_ids.add(row["item_id"])
                            yield from self._count(row, part)
                clips = {name for name in self.store.list_names(f"{layout.CLIPS}/{folder}") if name.endswith(".mp4")}
                self.clips_without_row += len(clips - {layout.clip_name(item_id) for item_id in item_ids})

    def _count(self, row: IndexRow, part: _CheckedPart) -> Iterator[Finding]:
        self.rows += 1
        self.clips += row["clip"] is not None
        of_row, of_id = _short_hash(f"{row['item_id']} {row['id']}"), _short_hash(row["id"])
        if of_row in self._seen and not part.findings:
            yield Finding(part.path, row["id"], "the row is in another part too", _SET_ASIDE, "duplicate")
        self.shared_ids += of_id in self._seen and of_row not in self._seen
        self._seen |= {of_row, of_id}
        # The parts of an item follow each other, so that comparing with the last one gives one row an item.
        if self.sample and not part.findings and row["clip"] is not None and row["item_id"] != self._last_item_id:
            self._last_item_id = row["item_id"]
            add = heapq.heappush if len(self._sampled) < self.sample else heapq.heappushpop
            add(self._sampled, (-_short_hash(row["item_id"]), part.name, row))

    def failed(self) -> Iterator[Finding]:
        """Check that the parts of failed/ can be read."""
        for name in self.store.list_names(layout.FAILED):
            if not layout.is_visible(name):
                continue
            file = f"{layout.FAILED}/{name}"
            try:
                table = read_parquet(self.store.read_bytes(file))
                table.select(FAILED_SCHEMA.names)
                self.failed_rows += table.num_rows
            except FileNotFoundError:
                continue  # A run has rendered the row since.
            except (pa.ArrowException, ValueError, KeyError) as error:
                problem = f"cannot be read as a table of failed rows ({_one_line(error)})"
                yield Finding(file, None, problem, "delete it; ltx-ray render of its manifest tries the row again")


def _batched(names: list[str]) -> Iterator[list[str]]:
    return (names[start : start + _BATCH] for start in range(0, len(names), _BATCH))


def _check_part(store: Store, name: str) -> _CheckedPart:
    file = f"{layout.INDEX}/{name}"

    def unusable(problem: str, row_id: str | None = None, rows: tuple[IndexRow, ...] = ()) -> _CheckedPart:
        return _CheckedPart(name, rows, (Finding(file, row_id, problem, _RENDER_AGAIN, "unreadable"),))

    try:
        table = read_parquet(store.read_bytes(file))
    except (pa.ArrowException, ValueError) as error:
        return unusable(f"cannot be read as Parquet ({_one_line(error)})")
    schema = table.schema.remove_metadata()
    expected = layout.index_schema(schema.names)
    if not schema.equals(expected):
        wrong = [c.name for c in expected if c.name not in schema.names or schema.field(c.name).type != c.type]
        return unusable(f"does not have the columns of an index ({', '.join(wrong) or 'more, or another order'})")
    rows = tuple(table.to_pylist())
    if len(rows) != 1:
        return unusable(f"holds {len(rows)} rows, legal: 1", rows=rows)
    [row] = rows
    if not row["item_id"] or not row["id"]:
        return unusable("its row has no id or no item_id", row["id"])
    if name != (expected := layout.part_name(row["item_id"], row_key(row["id"]))):
        problem = f"is not named after its row (that would be {expected})"
        return _CheckedPart(name, rows, (Finding(file, row["id"], problem, _SET_ASIDE, "duplicate"),))
    wrong_clip = _wrong_clip(store, row)
    if wrong_clip is not None:
        return _CheckedPart(name, rows, (Finding(file, row["id"], wrong_clip, _RENDER_AGAIN, "lost"),))
    return _CheckedPart(name, rows)


def _wrong_clip(store: Store, row: IndexRow) -> str | None:
    """What is wrong with the clip of a row; None when it is the row's own, or when the row has none."""
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


# --- a sample rendered again ------------------------------------------------------------------------


#: Numerics that an option chooses, and the layout's. A row is rendered again with its own where no option was given.
_CHOSEN = ("attention", "compile")
_LAYOUT = ("tp", "stage2_tp", "guidance_parallel", "sequence_parallel")


def _render_again(
    rows: list[IndexRow], options: Callable[[str, str], Options], say: Callable[[str], None]
) -> Iterator[Finding]:
    """Render `rows` once more, each with the numerics of its recipe, and compare what can be compared."""

    def recipe_of(row: IndexRow) -> str:
        recipe, numerics = json.loads(row["recipe"]), json.loads(row["numerics"])
        own = {name: numerics[name] for name in (*_CHOSEN, *_LAYOUT) if name in numerics}
        names = ("dtype", "precision", "noise_device")
        return canonical_json([{name: recipe[name] for name in names}, recipe.get("scheme", 1), own])

    declared = {lora.name for lora in options("", "").model.loras}
    comparable = []
    for row in rows:
        missing = {use["name"] for use in row["loras"] or ()} - declared
        if missing:
            say(f"{_file_of(row)}: not comparable: it was rendered with LoRAs that are not given ({_names(missing)})")
        else:
            comparable.append(row)
    for recipe, group in itertools.groupby(sorted(comparable, key=recipe_of), recipe_of):
        numerics, scheme, own = json.loads(recipe)
        by_item = {row["item_id"]: row for row in group}
        with tempfile.TemporaryDirectory(prefix="ltx-ray-verify-") as folder:
            manifest, output = os.path.join(folder, "sample.jsonl"), os.path.join(folder, "out")
            with open(manifest, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(_manifest_row(row)) + "\n" for row in by_item.values())
            given = options(manifest, output)
            roots = {parent(image["path"]) for row in by_item.values() for image in row["images"] or ()}
            _render_as_then(
                dataclasses.replace(
                    given,
                    numerics=dataclasses.replace(given.numerics, **numerics),
                    scheme=scheme,
                    row_defaults={},
                    save_latents=False,
                    stop_after=None,
                    image_roots=(*given.image_roots, *sorted(roots)),
                ),
                own,
            )
            rendered = {row["id"]: row for row in read_rows(Store(output), layout.INDEX)}
            failed = {row["id"]: row for row in read_rows(Store(output), layout.FAILED)}
        for item_id, row in by_item.items():
            yield from _compare(row, rendered.get(item_id), failed.get(item_id), say)


def _render_as_then(options: Options, own: dict[str, Any]) -> None:
    """Render with the rows' `own` backends and layout, or as `options` say where that cannot be done here."""
    numerics = {name: own[name] for name in _CHOSEN if name in own and getattr(options.numerics, name) == "auto"}
    default = ParallelConfig()
    parallel = {
        name: own[name] for name in _LAYOUT if name in own and getattr(options.parallel, name) == getattr(default, name)
    }
    then = dataclasses.replace(
        options,
        numerics=dataclasses.replace(options.numerics, **numerics),
        parallel=dataclasses.replace(options.parallel, **parallel),
    )
    try:
        code = render(then)
    except ValueError:
        if then == options:
            raise
        code = render(options)
    if code is ExitCode.DRAINED:
        raise SystemExit(code)


def _file_of(row: IndexRow) -> str:
    return f"{layout.index_path(row['item_id'], row_key(row['id']))} ({row['id']})"


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _compare(
    row: IndexRow, rendered: IndexRow | None, failed: dict[str, Any] | None, say: Callable[[str], None]
) -> Iterator[Finding]:
    """Compare a row of the index with what it was rendered to again."""
    file, named = layout.index_path(row["item_id"], row_key(row["id"])), _file_of(row)
    then, now = _device(row), None if rendered is None else _device(rendered)
    if rendered is None:
        why = failed["message"] if failed else "the run ended before it"
        yield Finding(file, row["id"], f"could not be rendered again ({_one_line(why)})", "fix that and verify again")
    elif rendered["item_id"] != row["item_id"]:
        other = "other weights or LoRAs" if rendered["recipe_digest"] != row["recipe_digest"] else "other images"
        say(f"{named}: not comparable: it was rendered with {other} than are given now")
    elif rendered["latents_sha256"] == row["latents_sha256"]:
        say(f"{named}: rendered again, the same latents")
    elif (now, rendered["numerics"]) != (then, row["numerics"]):
        if now == then:
            then, now = row["numerics"], rendered["numerics"]
        say(f"{named}: not comparable: it was rendered on {then}, and now on {now}, where bits may differ")
    else:
        problem = f"renders to latents {rendered['latents_sha256']}, the index has {row['latents_sha256']}"
        yield Finding(file, row["id"], problem, "see `versions` of both: a library or a kernel has changed its bits")


def _device(row: IndexRow) -> str:
    """The GPU's model, or "cpu". 0.1.0 wrote cuda:0; where the noise was drawn says the model, if it was on the GPU."""
    if not str(row["device"]).startswith("cuda:"):
        return str(row["device"])
    ledger = json.loads(row["noise_ledger"] or "{}") or {}
    return ledger["device_model"] if ledger.get("device") == "cuda" else "a GPU whose model is not known"


def _manifest_row(row: IndexRow) -> dict[str, Any]:
    """The row of a manifest that renders the same item. Its id is the item_id, since ids of two manifests may clash."""
    # Values that equal the pipeline's defaults are left out: a default may be illegal for a row to ask for, such as a
    # block that a smaller model does not have. The default LoRAs are those that are given now.
    defaults = PIPELINES[row["pipeline"]].defaults
    values = {name: row[name] for name in COLUMNS if row[name] != plain(defaults.get(name))}
    return {**values, "loras": row["loras"] or [], "id": row["item_id"], "prompt": row["prompt"]}


def _short_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _one_line(message: object) -> str:
    return " ".join(str(message).split())[:200]
