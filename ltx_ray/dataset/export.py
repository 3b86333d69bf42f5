"""What exports have in common: which rows they have, their clips, and where a later one goes on.

An export reads parts alone and writes below its own place. It goes on after any end, and takes what has come since.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ltx_ray.dataset import layout
from ltx_ray.dataset.identity import dataset_id
from ltx_ray.dataset.output import is_within
from ltx_ray.dataset.parts import count_rows, keys_of, list_segments, read_part
from ltx_ray.storage.locations import join, recorded
from ltx_ray.storage.store import Store, clean_stale

T = TypeVar("T")
R = TypeVar("R")

#: The file in an export by which a later one goes on.
STATE_FILE = "ltx-ray-export.json"
#: Clips that are read at once, and those that wait for their turn to be written.
THREADS, AHEAD = 8, 16
_BATCH = 256
#: No export is still writing a temporary file of this age.
_STALE_SECONDS = 3600.0

Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A place in the sequence of a dataset's rows: those of lower parts lie before it, and in this part up to `key`.

    Numbers of parts and keys only grow, so that the place holds when rows are taken out and when parts are added.
    """

    part: int = 0
    #: As hex digits. "" before the first row.
    key: str = ""


@dataclass(frozen=True)
class Part:
    name: str
    dataset: str
    number: int

    @property
    def end(self) -> Place:
        return Place(self.number + 1)


@dataclass
class Exported:
    """What an export has, by the file that it keeps of that."""

    kind: str
    dataset: str
    #: By the id in names of parts. Parts of another dataset's id may have been copied in.
    places: dict[str, Place] = field(default_factory=dict)
    #: Shards or folders that are complete, and rows in them.
    files: int = 0
    rows: int = 0

    def encode(self) -> bytes:
        places = {dataset: [place.part, place.key] for dataset, place in self.places.items()}
        return json.dumps({"format": 1, **vars(self), "places": places}, indent=2).encode()

    @classmethod
    def parse(cls, data: bytes) -> Exported:
        """Raises ValueError, KeyError or TypeError for something else."""
        fields = json.loads(data)
        places = {str(dataset): Place(int(part), str(key)) for dataset, (part, key) in fields["places"].items()}
        return cls(str(fields["kind"]), str(fields["dataset"]), places, int(fields["files"]), int(fields["rows"]))


class ExportRecord:
    """The file of what an export has. Of two exports into one place, the second to write it ends."""

    def __init__(self, target: Store, kind: str, dataset: str):
        """Raises ValueError when the place holds something else."""
        self._target = target
        try:
            data, self._version = target.read_versioned(STATE_FILE)
        except FileNotFoundError:
            if next(iter(target.names("")), None) is not None:
                raise ValueError(
                    f"{target.name}: is not empty, and no export of this kind began it; legal: an empty place, or one "
                    f"where an export of this dataset is to go on"
                ) from None
            self._version = ""
            self.exported = Exported(kind, dataset)
            self.write()  # so that what is interrupted is known for an export
            return
        try:
            self.exported = Exported.parse(data)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{target.name}: its {STATE_FILE} is damaged; legal: another place") from None
        if (self.exported.kind, self.exported.dataset) != (kind, dataset):
            raise ValueError(
                f"{target.name}: holds an export to {self.exported.kind} of the dataset {self.exported.dataset}, and "
                f"this is one to {kind} of {dataset}; legal: another place"
            )

    def write(self) -> None:
        """Raises OSError when another export writes into the place."""
        target, data = self._target, self.exported.encode()
        done = target.update(STATE_FILE, data, self._version) if self._version else target.create(STATE_FILE, data)
        if not done:
            raise OSError(f"{target.name}: another export writes there")
        _, self._version = target.read_versioned(STATE_FILE)


@dataclass
class ExportJob:
    """One call of `export`. `on_rows`: called with the rows that were looked at, and with how many there are."""

    source: Store
    target: Store
    say: Callable[[str], None]
    on_rows: Callable[[int, int], None]
    #: Rows without a whole clip.
    left_out: int = 0

    def parts(self, places: dict[str, Place]) -> list[Part]:
        """The parts of the index that may have rows behind `places`. Raises ValueError for those of one row."""
        parts = []
        for name in self.source.list_names(layout.INDEX):
            if layout.PART.fullmatch(name):
                raise ValueError(
                    f"{self.source.name}: has parts of one row, of an earlier version; legal: after "
                    f"ltx-ray fold --migrate"
                )
            if (match := layout.NUMBERED_PART.fullmatch(name)) is not None:
                part = Part(name, match[1], int(match[2]))
                if part.number >= places.get(part.dataset, Place()).part:
                    parts.append(part)
        if list_segments(self.source):
            self.say("rows that are finished and not yet folded are left out (ltx-ray fold, or the end of the run)")
        return parts

    def rows(self, places: dict[str, Place]) -> Iterator[tuple[Part, Place, Row]]:
        """The rows behind `places` in the order of parts and keys, each with the place behind it."""
        parts = self.parts(places)
        total = sum(count_rows(self.source, f"{layout.INDEX}/{part.name}") for part in parts)
        seen = 0
        for part in parts:
            table = read_part(self.source, f"{layout.INDEX}/{part.name}")
            before, keys = places.get(part.dataset, Place()), [key.hex() for key in keys_of(table)]
            begin = 0
            for batch in table.to_batches(_BATCH):
                for key, row in zip(keys[begin : begin + len(batch)], batch.to_pylist(), strict=True):
                    if part.number > before.part or key > before.key:
                        yield part, part.end if key == keys[-1] else Place(part.number, key), row
                begin += len(batch)
                self.on_rows(seen + begin, total)
            seen += begin

    def clips(self, places: dict[str, Place]) -> Iterator[tuple[Part, Place, Row, bytes]]:
        """The same of rows with a whole clip, with its bytes. Others are named and counted."""
        for entry, found in in_order(lambda entry: clip_or_problem(self.source, entry[2]), self.rows(places)):
            if isinstance(found, bytes):
                yield *entry, found
            else:
                self.left_out += 1
                self.say(found)


def clip_or_problem(source: Store, row: Row) -> bytes | str:
    """The clip of a row; a message when it has none that is its own."""
    clip = row["clip"]
    if clip is None:
        return f"{row['id']} has no clip, and is left out"
    try:
        data = source.read_bytes(clip)
    except FileNotFoundError:
        return f"{row['id']} is left out: its clip {clip} is missing (ltx-ray verify)"
    if hashlib.sha256(data).hexdigest() != row["clip_sha256"]:
        return f"{row['id']} is left out: its clip {clip} was changed (ltx-ray verify)"
    return data


def in_order(call: Callable[[T], R], values: Iterator[T]) -> Iterator[tuple[T, R]]:
    """Each value with what `call` makes of it, in threads, some ahead of what is taken."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: deque[tuple[T, Future[R]]] = deque()
        try:
            for value in values:
                waiting.append((value, pool.submit(call, value)))
                if len(waiting) > AHEAD:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def sample_name(row: Row) -> str:
    """The name of a row's files in an export. Rows that share a clip have a copy each."""
    return f"{row['item_id']}-{layout.row_key(row['id'])}"


def row_json(row: Row) -> bytes:
    """A row as one JSON object."""
    return json.dumps(row, ensure_ascii=False, default=_as_text).encode()


def _as_text(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime.datetime) else str(value)


def check_places(output: str, destination: str) -> None:
    """Raise ValueError when an export would lie in its dataset, or hold it."""
    if is_within(join(destination, "x"), output) or is_within(join(output, "x"), destination):
        raise ValueError(
            f"{recorded(destination)}: is in the dataset, or the dataset is in it; legal: a place beside it"
        )


def begin(job: ExportJob, kind: str) -> ExportRecord:
    """What the place of the export holds so far. Raises ValueError when it holds something else."""
    record = ExportRecord(job.target, kind, dataset_id(job.source))
    clean_stale(job.target, _STALE_SECONDS)
    return record
