"""Metrics as Prometheus reads them from the nodes of a Ray cluster."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator

from ltx_ray.driver.run_metrics import METRICS

SAMPLE = re.compile(r"^(\w+)\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')


def scraped() -> Iterator[tuple[str, dict[str, str], float]]:
    import ray

    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=30) as answer:
            for name, labels, value in SAMPLE.findall(answer.read().decode()):
                if name.startswith("ray_ltx_ray_"):
                    yield name, dict(LABEL.findall(labels)), float(value)


def values(run: str) -> dict[tuple[str, ...], float]:
    """By the metric's name and the values of its own labels, the bound of a bucket last; those of one run."""
    return {
        (
            name.removeprefix("ray_"),
            *(labels[own] for own in (*METRICS[plain_name(name)].labels, "le") if own in labels),
        ): value
        for name, labels, value in scraped()
        if labels["run"] == run
    }


def plain_name(name: str) -> str:
    """The name in the code. Prometheus' counters end with `_total`, and a histogram has three names."""
    name = name.removeprefix("ray_")
    known = {f"{name}_total": name for name, metric in METRICS.items() if metric.counts}
    known |= {f"{name}{end}": name for name, m in METRICS.items() if m.buckets for end in ("_bucket", "_count", "_sum")}
    known |= {name: name for name, metric in METRICS.items() if not (metric.counts or metric.buckets)}
    return known[name]
