"""Rows of JSON files: JSON lines, an array of objects, or objects one after another that each span several lines."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow.fs as pafs

from ltx_ray.manifest.columns import COLUMNS, Mistyped, shown
from ltx_ray.manifest.files import ManifestFile
from ltx_ray.manifest.raw import DAMAGE, RawRow, is_damage
from ltx_ray.manifest.values import LARGEST_VALUE, short

#: Rows that are looked at to tell whether a whole column has the wrong type, and characters of the file.
_PEEK_ROWS = 1000
#: Bytes at a file's beginning by which its encoding and its form are told.
_HEAD_BYTES = 1 << 18
#: Characters of a row that is read, and characters of an array that are read at once.
_LONGEST_ROW, _PIECE = 1 << 25, 1 << 18
#: Digits above which Python reads no number.
_LONGEST_NUMBER = 4300
#: What may stand between two values of an array, or of a series of values.
_BETWEEN = re.compile(r"[\s,]*")
#: What DOS and Windows leave at the end of a file, and at the beginning of files that are joined.
_END_OF_FILE, _BYTE_ORDER_MARK = "\x1a", "\ufeff"
