"""A manifest row as read, and how failed/ and previews/ of a dataset hold one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from ltx_ray.storage.retry import is_permanent

#: Column of failed/ and previews/ that holds the manifest row as JSON, so that these tables are manifests themselves.
FAILED_ROW_COLUMN = "manifest_row"
#: The keys of that JSON for a row that could not be read: why, and whose fault it is.
UNREADABLE, FAULT = "_unreadable", "_fault"
#: A key of that JSON for a row whose id belonged to another row.
DUPLICATE = "_duplicate_id"
#: A key of that JSON for a row that was illegal in a run with --samples-per-prompt: for how many samples it stands.
SAMPLES = "_samples"
#: What is wrong with a row that cannot be read: its text, the bytes of its file, or its folder, whose name says
#: something else.
SYNTAX, DAMAGE, FOLDER = "syntax", "damage", "folder"


class RawRow(NamedTuple):
    """A row as read: its place (`file` and `number`, from 1) and its values, or why it has none (`unreadable`)."""

    file: str
    number: int
    values: Mapping[str, Any]
    unreadable: str | None = None
    #: Its id belonged to another row. Only an edit of the manifest can change that, not a retry.
    duplicate: bool = False
    #: Read from failed/ or previews/ of a dataset: its defaults are resolved, and it is one sample of its prompt.
    from_failed: bool = False
    #: Of a row that is `unreadable`: SYNTAX, DAMAGE or FOLDER.
    fault: str = SYNTAX
    #: Of a row that is `from_failed`, or illegal: for how many samples it stands.
    samples: int = 1

    @property
    def source(self) -> str:
        return f"{self.file}:{self.number}"

    def stored(self) -> dict[str, Any]:
        """What FAILED_ROW_COLUMN holds of the row, as JSON: its values, or why it has none."""
        if self.unreadable is None:
            marks = {DUPLICATE: self.duplicate, SAMPLES: self.samples if self.samples > 1 else None}
            return {**self.values, **{mark: value for mark, value in marks.items() if value}}
        if self.fault == SYNTAX:
            return {UNREADABLE: self.unreadable}
        return {UNREADABLE: self.unreadable, FAULT: self.fault}


@dataclass(frozen=True)
class RowSource:
    """A file that was found to be usable."""

    #: Begins to read it, with the columns that no request has or without.
    read: Callable[[bool], Iterator[RawRow]]
    #: How many rows it has; None where only reading it would tell.
    count: int | None = None
    #: Columns that no request has, and that only differ from one that it has in how they are written.
    near_misses: frozenset[str] = frozenset()


def stored_row(file: str, number: int, values: dict[str, Any]) -> RawRow:
    """The row of which `values` is what FAILED_ROW_COLUMN holds."""
    if UNREADABLE in values and set(values) <= {UNREADABLE, FAULT}:
        fault = str(values.get(FAULT, SYNTAX))
        return RawRow(file, number, {}, unreadable=str(values[UNREADABLE]), from_failed=True, fault=fault)
    duplicate, samples = values.pop(DUPLICATE, False) is True, values.pop(SAMPLES, 1)
    samples = samples if type(samples) is int and samples > 1 else 1
    return RawRow(file, number, values, duplicate=duplicate, from_failed=True, samples=samples)


def is_damage(error: Exception) -> bool:
    """Whether `error` came from a file's bytes, and not from the disk (with a number) or the store that holds them."""
    if isinstance(error, pa.ArrowException | UnicodeDecodeError | EOFError):
        return True
    return type(error) is OSError and error.errno is None and not is_permanent(error)
