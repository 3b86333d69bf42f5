"""Small text files that people write: lists of ids, recipes, configurations."""

from __future__ import annotations

import codecs

from ltx_ray.storage.store import Store

#: Byte order marks and their encodings. That of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: str) -> str:
    """The text of the file at `path` (as `resolve` takes it), in UTF-8, or in what its byte order mark says.

    Lines end in "\\n", also those of a file from Windows. Raises ValueError, without the file's name, when the file is
    missing, cannot be read or is no text.
    """
    try:
        data = Store(path).read_bytes("")
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except OSError as error:
        raise ValueError(str(error)) from None
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"no text in {encoding.upper()}: {error.reason} at byte {error.start}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
