"""Engines for the tests of this folder, named by dotted path."""

from __future__ import annotations

from ltx_ray.engine.fake import FakeEngine


class Hasty(FakeEngine):
    """Gives a store that refuses a second, not a minute."""

    def load(self) -> None:
        super().load()
        self.store = self.store.hurried(1.0)
