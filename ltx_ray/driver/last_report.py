"""The report with which a run ends."""

from __future__ import annotations

from collections.abc import Callable

from ltx_ray.driver.signals import Stopped
from ltx_ray.storage.reasons import reason
from ltx_ray.storage.store import Store

#: A run ends with a report for up to this many rows, because the report reads every row while the cluster waits.
_REPORT_ROWS, _REMOTE_REPORT_ROWS = 20_000, 500


def write_last_report(store: Store, rows: int, say: Callable[[str], None]) -> None:
    """Write report.html after a run that had so many `rows`."""
    if rows > (_REPORT_ROWS if store.is_local else _REMOTE_REPORT_ROWS):
        say(f"report.html is left to `ltx-ray report {store.name}`: it reads every row of the index")
        return
    try:
        from ltx_ray.dataset.report import write_report

        write_report(store.uri)
    except (Exception, Stopped) as error:  # The report must never change how a run ends.
        say(f"report.html was not written: {reason(error)}")
