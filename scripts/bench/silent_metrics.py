"""Metrics that go nowhere, for drivers without a cluster."""

from __future__ import annotations

from ltx_ray.driver.run_metrics import RunMetrics


class _Silent:
    def inc(self, value: float, tags: dict[str, str]) -> None:
        pass

    def set(self, value: float, tags: dict[str, str]) -> None:
        pass

    def observe(self, value: float, tags: dict[str, str]) -> None:
        pass


def silent_metrics() -> RunMetrics:
    return RunMetrics("bench", lambda name, metric: _Silent())
