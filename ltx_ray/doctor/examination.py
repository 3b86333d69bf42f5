"""All checks of a node, one after the other. They need neither a model nor Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ltx_ray.doctor import devices, disks, system
from ltx_ray.doctor.checks import Check


def examine(device: str, output: str | None) -> Iterator[Check]:
    """All checks of this node, as they are made. `device`: "cuda" or "cpu". `output`: a folder or URI to try."""
    groups: list[tuple[str, Callable[[], Iterable[Check]]]] = [
        ("packages", system.package_checks),
        ("system", lambda: system.system_checks(device)),
        ("cache", disks.cache_checks),
        ("device", lambda: devices.device_checks(device)),
    ]
    if output is not None:
        groups.append(("output", lambda: disks.store_checks(output)))
    for name, checks in groups:
        try:
            yield from checks()
        except Exception as error:  # Whatever a node lacks, the other checks are made.
            yield Check("FAIL", name, f"{type(error).__name__}: {error}", "a check that ends")
