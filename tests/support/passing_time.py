"""Time that passes at once for the deadlines of replicas, so that no test waits for one or has to meet one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from ltx_ray.pools import gang, ray_replicas


class PassingTime:
    """In the place of the module `time`: `passed` seconds ahead of it."""

    sleep = staticmethod(time.sleep)

    def __init__(self, passed: Callable[[], float]):
        self._passed = passed

    def time(self) -> float:
        return time.time() + self._passed()


def let_time_pass(set_attribute: Callable[[object, str, object], None], passed: Callable[[], float]) -> None:
    """Have this process count the time that calls and starts of replicas take `passed()` seconds ahead.

    Pings are not given up, because one may be under way when time passes.
    """
    for module in (gang, ray_replicas):
        set_attribute(module, "time", PassingTime(passed))
    set_attribute(gang, "_PING_TIMEOUT_SECONDS", math.inf)


def seconds_in(file: Path) -> float:
    """The seconds that `Job.pass_time` has let pass."""
    try:
        return float(file.read_text())
    except FileNotFoundError:
        return 0.0
