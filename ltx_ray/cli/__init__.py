"""The `ltx-ray` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script and of `jobs/render.py`."""
    try:
        from ltx_ray.cli import app
    except KeyboardInterrupt:  # The imports take a second.
        sys.exit(130)
    app.main(argv)


__all__ = ["main"]
