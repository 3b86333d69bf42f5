"""What a run tells `ltx-ray supervise` beyond its exit code."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

#: The file in which a run says why the same command would change nothing. A supervisor names it to the command.
VARIABLE = "LTX_RAY_FINAL_FILE"


def say_final(reason: str) -> None:
    """Tell the supervisor, if there is one, not to run this command again."""
    if path := os.environ.get(VARIABLE):
        with contextlib.suppress(OSError):
            Path(path).write_text(reason, encoding="utf-8")
