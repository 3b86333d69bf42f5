"""Where slices of a buffer begin."""

from __future__ import annotations

#: Bytes of which the starts are multiples, as copy engines prefer.
_ALIGNMENT = 256


def aligned(nbytes: int) -> int:
    """`nbytes` and what pads them, so that the next slice may begin there."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
