"""Which rows of the index a check of the dataset takes, and which parts an earlier check has found well."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ltx_ray.dataset import layout
from ltx_ray.records import canonical_json
from ltx_ray.storage.reasons import reason


@dataclass(frozen=True)
class CheckScope:
    """The rows whose clips are checked. The default is all of them.

    fraction: this share of the items, the same ones each time. since: rows that were finished then or later. ids: rows
    with these ids. part: (I, N), every N-th part of the index from number I.
    """

    fraction: float = 1.0
    since: datetime.datetime | None = None
    ids: frozenset[str] | None = None
    part: tuple[int, int] = (0, 1)

    #: Columns that decide whether a row is taken.
    COLUMNS = ("item_id", "id", "finished_at")

    @property
    def is_whole(self) -> bool:
        return self == CheckScope()

    @property
    def has_other_tables(self) -> bool:
        """Whether previews/, failed/ and segments are checked: of several that share the parts, the first does so."""
        return self in (CheckScope(), CheckScope(part=(0, self.part[1])))

    def takes_part(self, name: str) -> bool:
        number, count = self.part
        match = layout.NUMBERED_PART.fullmatch(name)
        return (int(match.group(2)) if match else zlib.crc32(name.encode())) % count == number

    def takes(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is taken, of which COLUMNS are known. One without an item is a problem, and taken."""
        if not row["item_id"] or not row["id"]:
            return True
        if self.ids is not None and row["id"] not in self.ids:
            return False
        if self.since is not None and (row["finished_at"] is None or row["finished_at"] < self.since):
            return False
        return self.fraction >= 1.0 or short_hash(row["item_id"]) < self.fraction * 2**64

    def json(self) -> str:
        return canonical_json(
            {
                "fraction": self.fraction,
                "since": self.since and self.since.isoformat(),
                "ids": self.ids and hashlib.sha256("\n".join(sorted(self.ids)).encode()).hexdigest(),
                "part": self.part,
            }
        )


class CheckedParts:
    """The parts of the index that a check has found well, in a local file, so that it can be resumed.

    The first line says what was checked, and each further line names a part, with the number of its rows. Without a
    path, nothing is kept.
    """

    def __init__(self, path: str | None, output: str, scope: CheckScope):
        """Raises ValueError for a file of another check, and when it cannot be read or written."""
        self._path = path
        #: Rows by the name of the part.
        self.parts: dict[str, int] = {}
        if path is None:
            return
        head = json.dumps({"output": output, "scope": scope.json()})
        try:
            with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
                self._read(file.read().splitlines(), head)
            if not self.parts:
                with open(path, "w", encoding="utf-8") as file:
                    file.write(head + "\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--resume: {path}, cannot be read or written ({reason(error, place=False)})") from None

    def _read(self, lines: list[str], head: str) -> None:
        if lines and lines[0] != head:
            raise ValueError(
                f"--resume: {self._path} is of another check (another output, or other rows), or is no such file; "
                f"legal: a file of the same command, or a new one"
            )
        for line in lines[1:]:
            with contextlib.suppress(ValueError, TypeError):  # the last line may be cut off
                name, rows = json.loads(line)
                self.parts[name] = int(rows)

    def has(self, name: str, row_count: int) -> bool:
        """Whether the part was found well when it had so many rows, as it does now."""
        return self.parts.get(name) == row_count

    def add(self, name: str, row_count: int) -> None:
        if self._path is not None and not self.has(name, row_count):
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps([name, row_count]) + "\n")

    def finish(self) -> None:
        """The check has ended: the next one begins anew."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)


def short_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
