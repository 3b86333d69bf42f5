"""What `ltx-ray plan` prints."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import click

from ltx_ray.dataset.existing import list_existing
from ltx_ray.manifest.rules import IllegalRow
from ltx_ray.planning.disk_space import space_warning
from ltx_ray.planning.estimate import bytes_lines, cost_line
from ltx_ray.planning.plan import ILLEGAL, UNREAD, PlannedRow
from ltx_ray.planning.row_images import UnreadRow
from ltx_ray.records import canonical_json
from ltx_ray.run import ExitCode, Options, prepare
from ltx_ray.storage.credentials import masked
from ltx_ray.storage.locations import recorded_image
from ltx_ray.storage.store import Store

#: Rows that are listed without --all.
PLAN_ROWS = 40
#: Longest prompt that `plan` shows whole.
_PROMPT_WIDTH = 60
#: What each status of a planned row is called in the last lines of `plan`.
_STATUS_WORDS = {
    "todo": "to render",
    "done": "done",
    "copy": "done under another id",
    "repeated": "repeated",
    "failed": "failed before by their own fault (ltx-ray retry)",
    "illegal": "illegal",
    "unread": "with an image that cannot be read now",
    "removed": "removed (ltx-ray remove)",
}


def show_plan(options: Options, every: bool, resolved: bool) -> ExitCode:
    """Print the rows (`every` one, or the first ones; `resolved` as JSON), how many there are, and what they cost."""
    prepared = prepare(options)
    for warning in prepared.warnings:
        click.echo(masked(warning), err=True)
    plan = prepared.plan.against(list_existing(Store(options.output))) if options.output else prepared.plan
    listed = 0
    raws = plan.read(lambda note: click.echo(note, err=True), extra=resolved)
    for row in plan.rows(raws):
        if isinstance(row, IllegalRow):
            for message in row.messages():
                click.echo(f"illegal  {masked(message)}")
        elif isinstance(row, UnreadRow):
            click.echo(f"unread   {masked(row.message)}")
        elif every or listed < PLAN_ROWS:
            listed += 1
            click.echo(_resolved_line(row) if resolved else _plan_line(row))
        elif listed == PLAN_ROWS:
            listed += 1
            click.echo("... (more rows with --all)")
    plan.say_missing_ids(lambda message: click.echo(message, err=True))
    counts: Counter[str] = plan.counts
    shown = ", ".join(f"{counts[status]} {words}" for status, words in _STATUS_WORDS.items() if counts[status])
    click.echo(f"{counts['rows']} rows: {shown or 'none'}")
    work, options = plan.work.total, prepared.options
    click.echo(cost_line(counts, work, options.gpu_price))
    weights = sum(file.size for _, files in options.model.remote for file in files)
    for line in bytes_lines(counts, work, options.stored, weights):
        click.echo(line)
    if options.output:
        needed = options.stored.nbytes(counts["clips"], work)
        if (short := space_warning(Store(options.output), needed)) is not None:
            click.echo(short, err=True)
    return ExitCode.FAILED_ROWS if counts[ILLEGAL] or counts[UNREAD] else ExitCode.OK


def _resolved_line(row: PlannedRow) -> str:
    images = tuple(replace(image, path=recorded_image(image.path)) for image in row.request.images)
    return canonical_json(replace(row.request, images=images))


def _plan_line(row: PlannedRow) -> str:
    request = row.request
    prompt = " ".join(request.prompt.split())
    if len(prompt) > _PROMPT_WIDTH:
        prompt = f"{prompt[: _PROMPT_WIDTH - 3]}..."
    size = f"{request.width}x{request.height}x{request.num_frames}@{request.frame_rate:g}"
    return (
        f"{row.status:<8} {row.raw.source} ({request.id}) {request.pipeline} {size} "
        f"steps {request.num_inference_steps} seed {request.seed}: {prompt}"
    )
