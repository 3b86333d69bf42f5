"""Append-only sets of millions of fixed-width ids, in sorted runs that cost little more than the ids' bytes.

This is the idea of a log-structured merge tree: new records go to a dict, and sorted arrays are merged at intervals.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

#: Arrays of this size and more live in a temporary file.
_SPILLED_BYTES = 2**22
#: Records that the dict holds before they become a run.
_NEWEST = 8192


class IdTable:
    """Records of `width` bytes, looked up by their first 8 or 4 bytes (the `head`), which should be spread evenly.

    Several records may share a head. The newest are in a dict. `settle` makes them a run, sorted by head, and merges
    runs of similar sizes up to `cap` records. A merge needs as much memory again as the runs that it merges, so `cap`
    bounds what a table needs beyond its `width` bytes a record. With None there is no bound, and the fewest runs to
    search.
    """

    def __init__(self, width: int, head: int = 8, cap: int | None = 1 << 20):
        assert head in (4, 8) and width >= head
        self._cap = cap
        #: What follows each head, and what does in further records with the same head, which are few. A tuple for each
        #: head would take longer to make, and the garbage collector would look at it.
        self._newest: dict[bytes, bytes] = {}
        self._others: dict[bytes, list[bytes]] = {}
        self._waiting = 0
        self._runs: list[dict[str, np.ndarray]] = []
        self._has_rest = width > head
        rest = [("rest", f"V{width - head}")] if self._has_rest else []
        self._type = np.dtype([("head", f">u{head}"), *rest])
        self._number = np.dtype(f"u{head}").type
        #: Number of runs made so far. An answer of `settled` is out of date when it has changed.
        self.version = 0

    def __len__(self) -> int:
        return self._waiting + sum(len(run["head"]) for run in self._runs)

    def put(self, head: bytes, rest: bytes = b"") -> None:
        if head in self._newest:
            self._others.setdefault(head, []).append(rest)
        else:
            self._newest[head] = rest
        self._waiting += 1

    def rests(self, head: bytes, settled: bool = True) -> Sequence[bytes]:
        """What follows `head` in each of its records.

        With `settled` False, the caller knows that no run has it, and no run is searched.
        """
        first = self._newest.get(head)
        newest = () if first is None else (first, *self._others.get(head, ()))
        return [*newest, *self._settled_rests(head)] if settled else newest

    def recent(self, head: bytes) -> bool:
        """Whether one of the newest records, which are in no run yet, has this head."""
        return head in self._newest

    def has(self, head: bytes, rest: bytes = b"", settled: bool = True) -> bool:
        return rest in self.rests(head, settled)

    def _settled_rests(self, head: bytes) -> Iterator[bytes]:
        number = self._number(int.from_bytes(head, "big"))
        for run in self._runs:
            heads = run["head"]
            at = int(heads.searchsorted(number))
            while at < len(heads) and heads[at] == number:
                yield run["rest"][at].tobytes() if "rest" in run else b""
                at += 1

    def settled(self, heads: Sequence[bytes]) -> set[bytes]:
        """Those of `heads` that a run has. One search for many heads is far cheaper than one for each."""
        if not self._runs or not heads:
            return set()
        numbers = np.frombuffer(b"".join(heads), self._type["head"]).astype(self._number)
        order = numbers.argsort()
        numbers = numbers[order]
        found = np.zeros(len(numbers), bool)
        for run in self._runs:
            found |= run["head"].take(run["head"].searchsorted(numbers), mode="clip") == numbers
        return {heads[at] for at in order[found]}

    def settle(self, least: int = _NEWEST) -> None:
        """Make a run of the newest records when there are at least `least` of them."""
        if self._waiting >= max(least, 1):
            first = [head + rest for head, rest in self._newest.items()]
            others = [head + rest for head, rests in self._others.items() for rest in rests]
            self._newest, self._others, self._waiting = {}, {}, 0
            self.extend(b"".join(first + others))

    def load(self, pieces: Iterable[bytes]) -> None:
        """Add a great many records, while nobody looks any up: each piece is a concatenation of some.

        All runs are merged into one, beyond the cap.
        """
        for piece in pieces:
            self._add_run(piece)
        if len(self._runs) > 1:
            runs, self._runs = self._runs, []
            self._runs.append(_sorted(runs))

    def extend(self, data: bytes) -> None:
        """Add many records at once, or none: `data` is their concatenation."""
        self._add_run(data)
        while len(self._runs) > 1 and self._may_merge(*(len(run["head"]) for run in self._runs[-2:])):
            # Others may be searching the two.
            self._runs[-2:] = [_sorted([dict(run) for run in self._runs[-2:]])]

    def _add_run(self, data: bytes) -> None:
        if not data:
            return
        records = np.frombuffer(data, self._type)
        run = {"head": records["head"].astype(self._number)}
        if self._has_rest:
            run["rest"] = records["rest"]
        self._runs.append(_sorted([run]))
        self.version += 1

    def _may_merge(self, older: int, newer: int) -> bool:
        return older < 2 * newer and (self._cap is None or older + newer <= self._cap)


def _sorted(runs: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Merge runs into one. They are emptied, column by column, so that memory holds no column three times."""
    merged: dict[str, np.ndarray] = {}
    order: np.ndarray | None = None
    for name in list(runs[0]):  # the heads come first
        column = _allocate([run.pop(name) for run in runs], np.concatenate)
        if order is None:
            order = column.argsort(kind="stable")  # linear time over sorted runs
        merged[name] = _allocate([column], partial(_take, order))
    return merged


def _take(order: np.ndarray, parts: list[np.ndarray], out: np.ndarray) -> None:
    parts[0].take(order, mode="clip", out=out)


def _allocate(parts: list[np.ndarray], fill: Callable[..., Any]) -> np.ndarray:
    """An array as long as `parts` together, filled by `fill(parts, out=array)`, in a mapping of its own.

    When the array is freed, its mapping goes back to the system, whereas the heap would be left with holes. A large
    array is mapped from a temporary file, which the system may write out and drop when memory is short. Tables of
    fifty million rows fit that way.
    """
    size = sum(part.nbytes for part in parts)
    array = np.frombuffer(_map_file(size) if size >= _SPILLED_BYTES else mmap.mmap(-1, size), parts[0].dtype)
    fill(parts, out=array)
    return array


def _map_file(size: int) -> mmap.mmap:
    try:
        with tempfile.TemporaryFile(prefix="ltx-ray-") as file:
            # allocated at once: a disk that is full at the first write would kill the process
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
    except OSError:
        return mmap.mmap(-1, size)
