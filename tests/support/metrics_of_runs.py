"""Metrics that are kept in this process, in the place of a cluster's."""

from __future__ import annotations

from types import SimpleNamespace

from ltx_ray.driver.run_metrics import Metric, RunMetrics


class RecordedMetrics(RunMetrics):
    """`values`: by name and the values of its labels; those of counters added up, and of histograms counted."""

    def __init__(self) -> None:
        super().__init__("run", self._recorder)
        self.values: dict[tuple[str, ...], float] = {}

    def _recorder(self, name: str, metric: Metric) -> SimpleNamespace:
        def put(value: float, tags: dict[str, str], before: float = 0.0) -> None:
            assert tags.keys() == {"run", *metric.labels} and tags["run"] == "run"
            self.values[name, *(tags[label] for label in metric.labels)] = before + value

        def inc(value: float, tags: dict[str, str]) -> None:
            put(value, tags, self.values.get((name, *(tags[label] for label in metric.labels)), 0.0))

        if metric.buckets:
            return SimpleNamespace(observe=lambda value, tags: inc(1.0, tags))
        return SimpleNamespace(inc=inc) if metric.counts else SimpleNamespace(set=put)
