"""The standard streams of the command."""

from __future__ import annotations

import os
import sys


def open_standard_streams() -> None:
    """Open /dev/null in place of standard streams that the caller has closed.

    Python has None for them. The next files to be opened, those of a dataset, would get their numbers, and what a
    library prints would land in them.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
