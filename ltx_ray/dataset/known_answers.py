"""`state/answers.json`: what replicas have computed for known-answer clips, so that later runs can compare with it."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from ltx_ray.dataset import layout
from ltx_ray.storage.store import Store

#: Answers that are kept. The newest are the last.
_MOST = 500


class KnownAnswers:
    """The answers of a dataset, by what they are answers to. A store that fails loses what would be written."""

    def __init__(self, store: Store):
        self._store = store
        self._answers = self._read()

    def _read(self) -> dict[str, str]:
        try:
            found: Any = json.loads(self._store.read_bytes(layout.ANSWERS))["answers"]
            return {str(key): str(value) for key, value in found.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def get(self, key: str) -> str | None:
        return self._answers.get(key)

    def keep(self, key: str, value: str) -> None:
        """The answer to `key` is `value`."""
        if self._answers.get(key) == value:
            return
        self._answers.pop(key, None)
        self._answers[key] = value
        self._answers = dict(list(self._answers.items())[-_MOST:])
        with contextlib.suppress(OSError):
            data = json.dumps({"answers": self._answers}, indent=2)
            self._store.write_bytes(layout.ANSWERS, data.encode())
