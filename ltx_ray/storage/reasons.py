"""Why a file could not be read or written, in words for people."""

from __future__ import annotations

import os
import re

#: Names of files that a writer has beside its target: of data that is being written, and of a lock.
TEMPORARY = re.compile(r"\.(.+)\.(?:[0-9a-f]{8}|lock)")
_NUMBER = re.compile(r"\[[Ee]rrno -?\d+\] ")


def reason(error: BaseException, place: bool = True) -> str:
    """What an exception says, without the numbers of errors.

    An OSError names its file, if `place`: that which was to be written, where a temporary one was in its stead.
    """
    if not isinstance(error, OSError) or not error.strerror:
        return _NUMBER.sub("", str(error))
    text = _NUMBER.sub("", error.strerror)
    if not place or not isinstance(error.filename, str | bytes):
        return text
    folder, name = os.path.split(os.fsdecode(error.filename))
    match = TEMPORARY.fullmatch(name)
    return f"{os.path.join(folder, match[1] if match else name)}: {text}"
