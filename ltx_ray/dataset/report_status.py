"""The report's rows by what became of them: finished, or failed in some stage and by some kind of failure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ltx_ray.dataset.report_failures import ROW, FailureGroups, kind_of
from ltx_ray.dataset.report_list import Listed, listed
from ltx_ray.dataset.report_text import STAGE_NAMES, count, esc
from ltx_ray.records import first_line

#: Most characters of a failure's message that are shown and searched.
_MESSAGE = 300
#: Stage and kind of a failure.
Status = tuple[str, str]


@dataclass(frozen=True)
class FailedRow:
    """What the page shows of a failed row among the others. `why`: the first line of its message."""

    row: Listed
    status: Status
    why: str


def failed_row(row: dict[str, Any], done: float) -> FailedRow:
    """What is shown of a row of failed/, which failed at `done`, in seconds since the epoch."""
    named = {**row, "id": row.get("id") or row.get("source") or "(no id)", "item_id": None}
    shown = listed(named, None, done)
    why = first_line(str(row.get("message") or "no message"))[:_MESSAGE]
    return FailedRow(shown, (str(row.get("stage") or "?"), kind_of(row)), why)


def statuses(failures: FailureGroups) -> list[Status]:
    """The statuses of failed rows, the most frequent first. Their numbers are those of the page's options."""
    return [status for status, _ in failures.by_status().most_common()]


def name_of(status: Status) -> str:
    stage, kind = status
    return f"{STAGE_NAMES.get(stage, stage)}: {'row error' if kind == ROW else kind}"


def status_options(rendered: int, failures: FailureGroups) -> str:
    """The options of the page's filter: "+" for finished rows, "-" for failed ones, "-3" for those of a status."""
    options = [("+", f"Finished ({rendered:,})")]
    if failures.total:
        options.append(("-", f"Failed ({failures.total:,})"))
        numbers = failures.by_status().most_common()
        options += [
            (f"-{number}", f"Failed in {name_of(status)} ({n:,})") for number, (status, n) in enumerate(numbers)
        ]
        options.append(("", f"All rows ({rendered + failures.total:,})"))
    return "".join(f'<option value="{value}">{esc(text)}</option>' for value, text in options)


def failed_cards(failed: Sequence[FailedRow], known: Sequence[Status]) -> str:
    """Failed rows as cards, which are hidden until the filter shows them: the page has a section of failures."""
    return "\n".join(_card(row, known.index(row.status)) for row in failed)


def _card(failed: FailedRow, number: int) -> str:
    shown = failed.row
    size = f"{shown.width}x{shown.height}" if shown.width and shown.height else ""
    return (
        f'<article class="clip failed" hidden data-id="{esc(shown.id)}" data-status="-{number}" '
        f'data-size="{esc(size)}" data-done="{shown.done}"><div class="body"><div class="row"><h3>{esc(shown.id)}</h3>'
        f'<span class="badge bad">{esc(name_of(failed.status))}</span></div>'
        f'<p class="prompt" dir="auto">{esc(shown.prompt)}</p>'
        f'<p class="why" dir="auto">{esc(failed.why)}</p></div></article>'
    )


def left_out(failures: FailureGroups, shown: int) -> str:
    """A note on failed rows that the page does not list; "" when it lists all."""
    more = failures.total - shown
    return f"{count(more, 'more failed row')} not listed here; all are in failed/." if more > 0 else ""
