"""Rows of JSON files: JSON lines, an array of objects, or objects one after another that each span several lines."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow.fs as pafs

from ltx_ray.manifest.columns import COLUMNS, Mistyped, near_misses, shown
from ltx_ray.manifest.files import ManifestFile
from ltx_ray.manifest.raw import DAMAGE, RawRow, RowSource, is_damage
from ltx_ray.manifest.values import LARGEST_VALUE, short

#: Rows that are looked at to tell whether a whole column has the wrong type, and characters of the file.
_PEEK_ROWS = 1000
#: Bytes at a file's beginning by which its encoding and its form are told.
_HEAD_BYTES = 1 << 18
#: Characters of a row that is read, and characters of an array that are read at once.
_LONGEST_ROW, _PIECE = 1 << 25, 1 << 18
#: Most lists and objects around a value of a row. How many more Python can read and write depends on its stack.
_DEEPEST = 200
#: Digits above which Python reads no number.
_LONGEST_NUMBER = 4300
#: The end of a key with blanks before its colon.
_SPACED_KEY = re.compile(r'"[ \t\r\n]+:')
#: What may stand between two values of an array, or of a series of values.
_BETWEEN = re.compile(r"[\s,\x1a\ufeff]*")
#: What DOS and Windows leave at the end of a file, and at the beginning of files that are joined.
_END_OF_FILE, _BYTE_ORDER_MARK = "\x1a", "\ufeff"
#: What is no part of a row at its ends.
_JOINTS = f" \t\r\n{_END_OF_FILE}{_BYTE_ORDER_MARK}"


def json_rows(fs: pafs.FileSystem, file: ManifestFile) -> RowSource | ValueError:
    """The rows of a file, or the reason why it is no manifest. Columns that no request has are always read.

    Raises ValueError for a file that cannot be read, or with a column of the wrong type.
    """
    rows = partial(_rows, fs, file)
    peeked = _Peeked()
    try:
        for row in itertools.islice(rows(True), _PEEK_ROWS):
            peeked.look_at(row)
    except OSError as error:
        raise ValueError(f"{file.name}: cannot be read ({error})") from None
    if peeked.bad and not peeked.good:
        why = f"{peeked.bad.source}: {peeked.bad.unreadable}"
        return ValueError(f"{file.name}: cannot be read as JSON lines or as a JSON array ({why})")
    if peeked.good and not peeked.has_prompt and "prompt" not in file.folder_values:
        names = ", ".join(sorted(peeked.good.values)) or "none"
        return ValueError(f"{file.name}: has no column 'prompt' (it has {names})")
    for key, value in peeked.wrong.items():
        if peeked.wrong_counts[key] == peeked.counts[key]:
            raise ValueError(
                f"{file.name}: column '{key}' has type {json_type(value)} (such as {shown(value)}); "
                f"legal: {COLUMNS[key].type} ({COLUMNS[key].legal})"
            )
    return RowSource(rows, near_misses=near_misses(peeked.others))


class _Peeked:
    """What the first rows of a file have in common."""

    def __init__(self) -> None:
        self.good: RawRow | None = None
        self.bad: RawRow | None = None
        self.has_prompt = False
        #: Keys that no request has.
        self.others: set[str] = set()
        self.counts: Counter[str] = Counter()
        #: Values that are not of their column's type: the first one, and how many.
        self.wrong: dict[str, Any] = {}
        self.wrong_counts: Counter[str] = Counter()

    def look_at(self, row: RawRow) -> None:
        if row.unreadable is not None:
            self.bad = self.bad or row
            return
        self.good = self.good or row
        self.has_prompt = self.has_prompt or "prompt" in row.values
        self.others |= row.values.keys() - COLUMNS.keys()
        for key, value in row.values.items():
            if key in COLUMNS and value is not None:
                self.counts[key] += 1
                try:
                    COLUMNS[key].parse(value)
                except Mistyped:
                    self.wrong.setdefault(key, value)
                    self.wrong_counts[key] += 1


# --- text --------------------------------------------------------------------------------------------------------


def _rows(fs: pafs.FileSystem, file: ManifestFile, extra: bool) -> Iterator[RawRow]:
    number = 0
    try:
        raw = fs.open_input_stream(file.path, compression=file.form.codec)
        with io.BufferedReader(raw, _HEAD_BYTES) as data:
            head = data.peek()
            # NUL bytes tell UTF-16 and UTF-32 without a byte order mark
            encoding = json.detect_encoding(head)
            utf8 = encoding.startswith("utf-8")
            text = io.TextIOWrapper(data, encoding, errors="surrogateescape" if utf8 else "surrogatepass")
            is_lines = _is_lines(head.decode(encoding, "ignore"))
            for row in _line_rows(file.name, text) if is_lines else _value_rows(file.name, text):
                number = row.number
                yield row
    except Exception as error:
        if not is_damage(error):
            raise
        yield RawRow(
            file.name, number + 1, {}, fault=DAMAGE, unreadable=f"the rest of the file cannot be read ({error})"
        )


def _is_lines(head: str) -> bool:
    """Whether a file that begins with `head` is JSON lines, and no array or object that spans several lines."""
    head = head.lstrip(_JOINTS)
    line, newline, rest = head.partition("\n") if "\n" in head else head.partition("\r")
    if not head.startswith(("[", "{")) or not newline:
        return not head.startswith("[")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return not head.startswith("[") and not _spans_lines(head, len(line))
    return not isinstance(value, list) or bool(rest.strip(_JOINTS))


def _spans_lines(head: str, line: int) -> bool:
    """Whether `head` begins with a JSON value that ends after the first line, of `line` characters."""
    try:
        return json.JSONDecoder().raw_decode(head)[1] > line
    except (ValueError, RecursionError):
        return False


def _line_rows(name: str, text: io.TextIOWrapper) -> Iterator[RawRow]:
    read = partial(text.readline, _LONGEST_ROW)
    for number, line in enumerate(iter(read, ""), start=1):
        if len(line) == _LONGEST_ROW and not line.endswith("\n"):
            while (line := read()) and not line.endswith("\n"):
                pass
            yield RawRow(name, number, {}, unreadable=f"a line of more than {_LONGEST_ROW} characters")
        elif not line.isspace() and (line[0] != _END_OF_FILE or line.strip(_JOINTS)):
            yield parse_line(name, number, line)


def _value_rows(name: str, text: io.TextIOWrapper) -> Iterator[RawRow]:
    """Rows of an array, or of objects one after another, as the text arrives. They are counted, not their lines."""
    values = _Values(text)
    is_array = values.take("[")
    for number in itertools.count(1):
        if values.at_end():
            if is_array:
                yield RawRow(name, number, {}, fault=DAMAGE, unreadable="not JSON (the array has no end)")
            return
        if is_array and values.take("]"):
            if not values.at_end():
                why = "not JSON (more text after the end of the array)"
                yield RawRow(name, number, {}, fault=DAMAGE, unreadable=why)
            return
        try:
            value, written = values.next()
        except (ValueError, RecursionError) as error:
            why = f"not JSON ({getattr(error, 'msg', error)}), and the rest of the file is not read"
            yield RawRow(name, number, {}, fault=DAMAGE, unreadable=why)
            return
        yield _row_of(name, number, written, value)


class _Values:
    """JSON values one after another, of which a piece of the text is in memory."""

    def __init__(self, text: io.TextIOWrapper):
        self._text, self._buffer, self._position = text, "", 0

    def at_end(self) -> bool:
        """Whether nothing but separators is left; they are passed."""
        while True:
            match = _BETWEEN.match(self._buffer, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._buffer):
                return False
            if not self._read(_PIECE):
                return True

    def take(self, character: str) -> bool:
        """Pass `character` if it is the next one."""
        found = not self.at_end() and self._buffer[self._position] == character
        self._position += found
        return found

    def next(self) -> tuple[Any, str]:
        """The next value, and its text. Raises ValueError and RecursionError when it is no JSON."""
        size = _PIECE
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._position)
            except (ValueError, RecursionError):
                # it may be cut off
                if len(self._buffer) - self._position > _LONGEST_ROW or not self._read(size):
                    raise
                size *= 2
                continue
            written, self._position = self._buffer[self._position : end], end
            return value, written

    def _read(self, size: int) -> bool:
        piece = self._text.read(size)
        self._buffer, self._position = self._buffer[self._position :] + piece, 0
        return bool(piece)


# --- rows --------------------------------------------------------------------------------------------------------


def parse_line(name: str, number: int, line: str) -> RawRow:
    """The row that `line` is, legal JSON or not."""
    values, whole = None, False
    try:
        values, end = _DECODER.raw_decode(line)
        whole = line[end:] == "\n" or not line[end:].strip()
    except (ValueError, RecursionError):
        pass
    if not whole:
        try:
            # With the line's end, where a message about a row that is cut off places the fault.
            values = _LENIENT_DECODER.decode(line.strip(_JOINTS) + "\n" * line.endswith("\n"))
        except (ValueError, RecursionError) as error:
            return RawRow(name, number, {}, unreadable=f"not JSON ({error})")
    return _row_of(name, number, line, values)


def _row_of(name: str, number: int, text: str, values: Any) -> RawRow:
    if not isinstance(values, dict):
        return RawRow(name, number, {}, unreadable=f"a JSON {json_type(values)}, not an object")
    if text.count("[") + text.count("{") > _DEEPEST and _is_deep(values):
        return RawRow(name, number, {}, unreadable=f"lists and objects within each other, more than {_DEEPEST} deep")
    # A key that is given twice is there once. Most rows need no second look: they have as many keys as colons.
    if text.count(":") != len(values) and _may_repeat(text, values) and (twice := _given_twice(text)) is not None:
        return RawRow(name, number, {}, unreadable=f"{twice!r} is given twice")
    if len(text) > LARGEST_VALUE:
        values = {k: short(v) if isinstance(v, str) and k not in COLUMNS else v for k, v in values.items()}
    return RawRow(name, number, values)


def _is_deep(value: Any) -> bool:
    """Whether a JSON value has more than `_DEEPEST` lists and objects within each other."""
    level = [value]
    for _ in range(_DEEPEST + 1):
        level = [value for value in level if isinstance(value, dict | list)]
        if not level:
            return False
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return True


def _may_repeat(text: str, values: dict[str, Any]) -> bool:
    """Whether `text` may give a key more than once. It does not when it has as many keys as are written."""
    written = text.count('":')
    return (written != len(values) and written != _keys(values)) or _SPACED_KEY.search(text) is not None


def _keys(value: Any) -> int:
    """How many keys a JSON value has, with those of the objects in it."""
    count, waiting = 0, [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            count += len(value)
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    return count


def _given_twice(text: str) -> str | None:
    """The first column of a request that an object gives more than once."""
    try:
        pairs = _PAIRS_DECODER.decode(text.strip(_JOINTS))
    except RecursionError:
        return None
    counts = Counter(key for key, _ in pairs)
    return next((key for key, count in counts.items() if count > 1 and key in COLUMNS), None)


def json_type(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _integer(digits: str) -> Any:
    return int(digits) if len(digits) <= _LONGEST_NUMBER else short(digits)


# NaN is how Python and pandas write a gap
_CONSTANTS = {"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}
_DECODER = json.JSONDecoder(parse_constant=_CONSTANTS.__getitem__)
_LENIENT_DECODER = json.JSONDecoder(parse_constant=_CONSTANTS.__getitem__, parse_int=_integer)
_PAIRS_DECODER = json.JSONDecoder(object_pairs_hook=list, parse_int=_integer)
