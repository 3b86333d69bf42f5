"""The `ltx-ray` command: render, plan, status, report, verify, retry, promote, inspect."""

from __future__ import annotations

import inspect as pyinspect
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import typer

from ltx_ray.cli.options import (
    CONFIG,
    PLANNING,
    at_least,
    build_options,
    config_defaults,
    image_options,
    join_loras,
    model_options,
    read_selection,
    row_options,
    run_options,
)
from ltx_ray.config import Selection
from ltx_ray.dataset import layout
from ltx_ray.dataset.existing import list_existing
from ltx_ray.manifest.rules import IllegalRow
from ltx_ray.planning.plan import ILLEGAL, PlannedRow, cost_line
from ltx_ray.records import canonical_json
from ltx_ray.run import EXIT_FAILED_ROWS, EXIT_OK, EXIT_USAGE, Options, prepare, render, say_missing_ids
from ltx_ray.storage.store import Store, join

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

_PLAN_ROWS = 40


def _takes(*groups: dict[str, tuple[Any, Any]]) -> Callable[[Callable[..., int]], Callable[..., None]]:
    """Give a command the options of `groups`; it receives them by name and returns its exit code."""

    def decorate(command: Callable[..., int]) -> Callable[..., None]:
        own = [p for p in pyinspect.signature(command, eval_str=True).parameters.values() if p.kind != p.VAR_KEYWORD]
        options = [
            pyinspect.Parameter(name, pyinspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for group in groups
            for name, (kind, default) in group.items()
        ]

        def run(**values: Any) -> None:
            try:
                code = command(**values)
            except ValueError as error:
                typer.echo(f"error: {error}", err=True)
                code = EXIT_USAGE
            except (ConnectionError, OSError) as error:
                typer.echo(f"error: {error}", err=True)
                code = 1
            raise typer.Exit(code)

        named = [p.replace(kind=pyinspect.Parameter.KEYWORD_ONLY) for p in own]
        run.__signature__ = pyinspect.Signature(named + options)
        run.__annotations__ = {p.name: p.annotation for p in named + options}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


@app.command(name="render")
@_takes(*PLANNING, run_options(), CONFIG)
def render_command(
    manifest: str = typer.Argument(help="Parquet or JSONL manifest, or a folder of them; local, s3:// or gs://"),
    output: str = typer.Option(..., help="where the dataset goes: a folder, s3:// or gs://"),
    **values: Any,
) -> int:
    """Render every row of MANIFEST into a dataset of clips with sound.

    Exit codes: 0 all rows are in the index, 3 some failed (listed), 2 wrong usage or manifest, 4 drained
    on request (run the same command to go on), 1 anything else.
    """
    return render(build_options(manifest, output, values))


@app.command(name="retry")
@_takes(model_options(), row_options(), image_options(), run_options(), CONFIG)
def retry_command(output: str = typer.Argument(help="a dataset; its failed rows are rendered again"), **values: Any):
    """Render the rows that failed in OUTPUT again, also those that were themselves at fault."""
    manifest = join(output, layout.FAILED)
    _check_dataset(output)
    if not list_existing(Store(output)).failed_count:
        typer.echo(f"nothing failed in {output}")
        return EXIT_OK
    return render(build_options(manifest, output, values, retry_failed=True))


@app.command(name="promote")
@_takes(model_options(), image_options(), run_options(), CONFIG)
def promote_command(
    output: str = typer.Argument(help="a dataset with previews, made with --stop-after stage1"),
    ids: str | None = typer.Option(None, help="take the previews whose ids stand in this file, one a line"),
    where: list[str] | None = typer.Option(
        None, help="take those that meet this condition on a column of the index (repeatable): 'flags !~ black'"
    ),
    **values: Any,
) -> int:
    """Take chosen previews of OUTPUT on to finished clips, from their stored stage-1 latents.

    The clips are those that the whole line would have given. Exit codes as those of render.
    """
    from ltx_ray.dataset.selection import chosen_items, parse_filter

    if not ids and not where:
        raise ValueError("promote: nothing is chosen; legal: --ids FILE, --where 'COLUMN OP VALUE', or both")
    _check_dataset(output)
    if values.get("stop_after"):
        raise ValueError("promote: --stop-after has no place here: the clips are finished")
    filters = [parse_filter(text) for text in where or ()]
    chosen = chosen_items(Store(output), read_selection({"ids": ids}).ids, filters)
    if not chosen:
        typer.echo(f"no preview in {output} is chosen")
        return EXIT_OK
    options = build_options(join(output, layout.PREVIEWS), output, values)
    return render(replace(options, promote=frozenset(chosen.values()), selection=Selection(ids=frozenset(chosen))))


@app.command(name="plan")
@_takes(*PLANNING, run_options(), CONFIG)
def plan_command(
    manifest: str = typer.Argument(help="Parquet or JSONL manifest, or a folder of them"),
    output: str | None = typer.Option(None, help="the dataset to compare with"),
    every: bool = typer.Option(False, "--all", help=f"list every row, not only the first {_PLAN_ROWS}"),
    resolved: bool = typer.Option(False, "--resolved", help="print each listed row as it would be rendered, as JSON"),
    **values: Any,
) -> int:
    """Say what would be rendered, what is done, what is illegal and why, and what it costs.

    Exit code 3 when rows are illegal.
    """
    prepared = prepare(build_options(manifest, output, values))
    for warning in prepared.warnings:
        typer.echo(warning, err=True)
    plan = prepared.plan.against(list_existing(Store(output))) if output else prepared.plan
    listed = 0
    for planned in plan.open():
        if isinstance(planned, IllegalRow):
            for message in planned.messages():
                typer.echo(f"illegal  {message}")
        elif every or listed < _PLAN_ROWS:
            listed += 1
            typer.echo(canonical_json(planned.request) if resolved else _plan_line(planned))
        elif listed == _PLAN_ROWS:
            listed += 1
            typer.echo("... (more rows with --all)")
    say_missing_ids(plan, lambda message: typer.echo(message, err=True))
    counts: Counter[str] = plan.counts
    names = {
        "todo": "to render", "done": "done", "copy": "done under another id", "repeated": "repeated",
        "failed": "failed before by their own fault (ltx-ray retry)", "illegal": "illegal",
    }  # fmt: skip
    shown = ", ".join(f"{counts[key]} {text}" for key, text in names.items() if counts[key])
    typer.echo(f"{counts['rows']} rows: {shown or 'none'}")
    typer.echo(cost_line(counts, plan.tflop))
    return EXIT_FAILED_ROWS if counts[ILLEGAL] else EXIT_OK


@app.command(name="status")
@_takes()
def status_command(output: str = typer.Argument(help="a dataset")) -> int:
    """Say how far the newest run into OUTPUT is."""
    from ltx_ray.cli.status import status_lines

    for line in status_lines(output):
        typer.echo(line)
    return EXIT_OK


@app.command(name="report")
@_takes()
def report_command(output: str = typer.Argument(help="a dataset")) -> int:
    """Write OUTPUT/report.html, one page with every clip, its pictures and its timings."""
    from ltx_ray.dataset.report import write_report

    _check_dataset(output)
    store = Store(output)
    path = write_report(output)
    typer.echo(path if store.is_local else join(store.uri, layout.REPORT))
    return EXIT_OK


@app.command(name="verify")
@_takes(model_options(), image_options(), run_options(), CONFIG)
def verify_command(
    output: str = typer.Argument(help="a dataset"),
    sample: int = typer.Option(0, help="render so many rows again and compare their latents (wants the model)"),
    mend: bool = typer.Option(False, "--repair", help="move parts of bad rows aside, so that render makes them anew"),
    **values: Any,
) -> int:
    """Check that every row of OUTPUT's index has its clip, unchanged.

    Exit codes: 0 all well, 3 problems found (one a line), 2 wrong usage.
    """
    from ltx_ray.cli.verify import verify

    at_least("sample", sample, 0)

    def options(manifest: str, place: str) -> Options:
        return build_options(manifest, place, values)

    if sample:
        options("", "")  # what is wrong with them is said before the clips are read
    return EXIT_FAILED_ROWS if verify(output, typer.echo, sample, mend, options) else EXIT_OK


@app.command(name="inspect")
@_takes()
def inspect_command(file: str = typer.Argument(help="a safetensors file, or a directory of them")) -> int:
    """Say what a weight file or a model directory holds."""
    from ltx_ray.cli.status import inspect_lines

    for line in inspect_lines(file):
        typer.echo(line)
    return EXIT_OK


def _check_dataset(output: str) -> None:
    store = Store(output)
    if not any(store.exists(name) for name in layout.DATASET_MARKS):
        raise ValueError(f"{output}: no dataset; legal: the --output of a run")


def _plan_line(planned: PlannedRow) -> str:
    r = planned.request
    prompt = " ".join(r.prompt.split())
    size = f"{r.width}x{r.height}x{r.num_frames}@{r.frame_rate:g}"
    return (
        f"{planned.status:<8} {planned.raw.source} ({r.id}) {r.pipeline} {size} steps {r.num_inference_steps} "
        f"seed {r.seed}: {prompt if len(prompt) <= 60 else prompt[:57] + '...'}"
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script and of `jobs/render.py`."""
    argv = join_loras(sys.argv[1:] if argv is None else argv)
    try:
        defaults = config_defaults(argv)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(EXIT_USAGE)
    command = typer.main.get_command(app)
    command.main(args=argv, prog_name="ltx-ray", default_map={name: defaults for name in command.commands})


__all__ = ["app", "main"]
