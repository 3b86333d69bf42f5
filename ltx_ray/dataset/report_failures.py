"""The report's failed rows: grouped by cause, each group with the command that renders its rows again."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ltx_ray.dataset.report_text import STAGE_NAMES, count, esc
from ltx_ray.records import first_line

#: Causes that are told apart, those that are shown, and the rows of each that are shown.
_MOST_CAUSES, SHOWN_CAUSES, EXAMPLES = 2000, 60, 12
#: The rows of all further causes.
_OTHER = "(other causes)"
#: What differs among messages of one cause, in this order: a place with its row, quoted texts, paths, numbers.
_VARYING = (
    (re.compile(r"^\S+:\d+(?::(\w+))?(?: \([^)]*\))?: "), r"\1: "),
    (re.compile(r"'[^']*'|\"[^\"]*\""), "'…'"),
    (re.compile(r"(?<![\w.])(?:\w+:/)?/[^\s,;:()]+"), "…"),
    (re.compile(r"\b(?=\w*\d)[0-9a-f]{8,}\b"), "…"),
    (re.compile(r"\d+(?:[.,]\d+)*"), "N"),
)
#: Kinds of failure: ILLEGAL rows have no item.
ROW, INFRASTRUCTURE, ILLEGAL = "row", "infrastructure", "illegal"
#: Options of a run that choose rows, which a retry does not take, and its output. Each has a value.
_DROPPED = ("--output", "--ids", "--limit", "--shard", "--samples-per-prompt")


@dataclass
class FailureGroup:
    """Failed rows of one kind, stage and cause."""

    kind: str
    stage: str
    cause: str
    count: int = 0
    #: Some of them.
    rows: list[dict[str, Any]] = field(default_factory=list)


class FailureGroups:
    """Sums up failed rows. Its memory does not grow with them."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str, str], FailureGroup] = {}
        self.total = 0

    def add(self, row: dict[str, Any]) -> None:
        self.total += 1
        kind, stage = kind_of(row), str(row.get("stage") or "?")
        key = kind, stage, cause_of(row)
        if key not in self._groups and len(self._groups) >= _MOST_CAUSES:
            key = kind, stage, _OTHER
        group = self._groups.setdefault(key, FailureGroup(*key))
        group.count += 1
        if len(group.rows) < EXAMPLES and len(self._groups) <= SHOWN_CAUSES:
            group.rows.append(row)

    def groups(self) -> list[FailureGroup]:
        """The largest first."""
        return sorted(self._groups.values(), key=lambda group: -group.count)

    def by_status(self) -> Counter[tuple[str, str]]:
        """Rows by stage and kind."""
        counts: Counter[tuple[str, str]] = Counter()
        for group in self._groups.values():
            counts[group.stage, group.kind] += group.count
        return counts

    def by(self, name: str) -> Counter[str]:
        """Rows by `kind` or `stage`."""
        counts: Counter[str] = Counter()
        for group in self._groups.values():
            counts[getattr(group, name)] += group.count
        return counts


def kind_of(row: Mapping[str, Any]) -> str:
    kind = str(row.get("error_class") or "unknown")
    return ILLEGAL if kind == ROW and not row.get("item_id") else kind


def cause_of(row: Mapping[str, Any]) -> str:
    """The first line of a failure's message without what is the row's own."""
    text = first_line(str(row.get("message") or "no message"))[:400]
    if row_id := str(row.get("id") or ""):
        text = text.replace(row_id, "…")
    for pattern, instead in _VARYING:
        text = pattern.sub(instead, text)
    return text[:200]


def failures_section(groups: FailureGroups, since_rendered: int, record: Mapping[str, Any], output: str) -> str:
    """A section of HTML; "" when nothing failed. `record` of the newest run, `output` as a command has it."""
    if not groups.total and not since_rendered:
        return ""
    most = groups.by("stage").most_common(12)
    stages = "".join(_badge(f"{STAGE_NAMES.get(stage, stage)}: {n:,}") for stage, n in most)
    found = groups.groups()
    is_open = groups.total <= EXAMPLES
    shown = "".join(_group(group, record, output, is_open) for group in found[:SHOWN_CAUSES])
    notes = []
    if more := groups.total - sum(group.count for group in found[:SHOWN_CAUSES]):
        notes.append(f"{more:,} more, of rarer causes, are not shown here; all are in failed/, itself a manifest.")
    if since_rendered:
        notes.append(f"{count(since_rendered, 'earlier failure')} rendered since, not listed.")
    return (
        f'<section id="failures"><div class="head"><h2>Failed rows</h2><span class="soft">{groups.total:,}</span>'
        f'<span class="soft">{count(len(found), "cause")}</span>{stages}</div>'
        + (f'<div class="causes">{shown}</div>' if shown else "")
        + "".join(f'<p class="soft small after">{note}</p>' for note in notes)
        + "</section>"
    )


def _group(group: FailureGroup, record: Mapping[str, Any], output: str, is_open: bool) -> str:
    what, command = again(group.kind, record, output)
    example = _example(group)
    hidden = group.count - len(group.rows)
    more = f'<p class="soft small more">{hidden:,} more like these are in failed/.</p>' if hidden else ""
    rows = f'<ol class="failures">{"".join(_failure(row, example) for row in group.rows)}</ol>' if group.rows else ""
    return (
        f'<details class="cause"{" open" if is_open else ""}><summary><b>{group.count:,}</b>'
        + _badge(STAGE_NAMES.get(group.stage, group.stage), "bad")
        + _badge("row error" if group.kind == ROW else group.kind)
        + f'<span class="message" dir="auto">{esc(example)}</span></summary>'
        + f'<p class="again small"><span class="soft">{what}</span> <code>{esc(command)}</code></p>'
        + f"{rows}{more}</details>"
    )


def _example(group: FailureGroup) -> str:
    """The message of one of the rows: people read that better than what all have in common."""
    return first_line(str(group.rows[0].get("message") or "no message"))[:300] if group.rows else group.cause


def _failure(row: dict[str, Any], example: str) -> str:
    """A failed row. `example` is shown already."""
    attempts, source = row.get("attempts"), row.get("source")
    trace = str(row.get("traceback") or "")[-6000:]
    tried = count(attempts, "attempt") if isinstance(attempts, int) and attempts else ""
    prompt, message = str(row.get("prompt") or ""), str(row.get("message") or "no message")[:2000]
    return (
        f'<li><div class="row"><h3 class="mono">{esc(row.get("id") or "(no id)")}</h3>'
        + (f'<span class="soft small">{tried}</span>' if tried else "")
        + (f'<span class="soft small mono">{esc(source)}</span>' if source else "")
        + "</div>"
        + (f'<p class="message" dir="auto">{esc(message)}</p>' if message != example else "")
        + (f'<p class="prompt" dir="auto">{esc(prompt[:600])}{" …" if len(prompt) > 600 else ""}</p>' if prompt else "")
        + (f'<details class="fold"><summary>Traceback</summary><pre>{esc(trace)}</pre></details>' if trace else "")
        + "</li>"
    )


def _badge(text: str, tone: str = "") -> str:
    return f'<span class="badge {tone}">{esc(text)}</span>'


# --- commands ------------------------------------------------------------------------------------


def again(kind: str, record: Mapping[str, Any], output: str) -> tuple[str, str]:
    """How failed rows of a kind are rendered again: what to do, and the command."""
    same = same_command(record, output)
    if kind == ILLEGAL:
        return "Correct the manifest; then the same command renders them:", same
    if kind == ROW:
        return "The row itself was at fault. To try again:", retry_command(record, output)
    return "The same command renders them again:", same


def same_command(record: Mapping[str, Any], output: str) -> str:
    """The command of the newest run."""
    command = _arguments(record)
    return shlex.join([*_program(command), *command[1:]]) if command else f"ltx-ray retry {shlex.quote(output)}"


def retry_command(record: Mapping[str, Any], output: str) -> str:
    """A retry with the options of the newest run, but for those that choose rows."""
    rest = _arguments(record)[1:]
    if rest[:1] in (["render"], ["retry"], ["promote"]):
        rest = rest[1:]
    kept: list[str] = []
    manifest = os.path.basename(str(record.get("manifest") or "").rstrip("/"))
    for position, argument in enumerate(rest):
        before = rest[position - 1] if position else ""
        is_place = not argument.startswith("-") and (not before.startswith("--") or "=" in before)
        if argument.partition("=")[0] in _DROPPED or before in _DROPPED:
            continue
        if is_place and os.path.basename(argument.rstrip("/")) in (manifest, os.path.basename(output.rstrip("/"))):
            continue
        kept.append(argument)
    return shlex.join(["ltx-ray", "retry", output, *kept])


def _arguments(record: Mapping[str, Any]) -> list[str]:
    command = record.get("command")
    return [str(argument) for argument in command] if isinstance(command, list) and len(command) > 1 else []


def _program(command: Sequence[str]) -> list[str]:
    name = os.path.basename(command[0])
    return ["python", f"jobs/{name}"] if name.endswith(".py") else [name]
