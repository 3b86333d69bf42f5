"""The `ltx-ray` command: render, retry, promote, plan, status, report, fold, export, remove, verify, fetch, inspect,
doctor, supervise and submit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import click

from ltx_ray.cli.doctor import doctor_command
from ltx_ray.cli.options import (
    CONFIG_OPTION,
    IMAGE_OPTIONS,
    MODEL_OPTIONS,
    ROW_OPTIONS,
    RUN_OPTIONS,
    SELECTION_OPTIONS,
    build_options,
    model_files,
    output_option,
)
from ltx_ray.cli.parameters import (
    Argument,
    AtLeast,
    Command,
    Date,
    Fraction,
    IdsFile,
    Location,
    ModelLocation,
    OneOf,
    Option,
    Shard,
)
from ltx_ray.cli.plan import PLAN_ROWS, show_plan
from ltx_ray.cli.streams import open_standard_streams
from ltx_ray.cli.submit import submit_command
from ltx_ray.cli.supervise import supervise_command
from ltx_ray.config import Selection
from ltx_ray.dataset import layout
from ltx_ray.dataset.check_scope import CheckScope
from ltx_ray.dataset.existing import list_existing
from ltx_ray.dataset.output import wait_seconds
from ltx_ray.dataset.package_versions import own_version
from ltx_ray.driver.progress import Progress
from ltx_ray.run import ExitCode, Options, render
from ltx_ray.storage.credentials import mask_tracebacks, masked
from ltx_ray.storage.locations import join, recorded
from ltx_ray.storage.reasons import reason
from ltx_ray.storage.store import Store


class _Commands(click.Group):
    """Commands that return their exit code."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # In the order of their definition, not of the alphabet.

    def invoke(self, ctx: click.Context) -> None:
        try:
            code = super().invoke(ctx)
        except click.UsageError as error:
            raise click.UsageError(masked(error.format_message()), error.ctx) from None
        except ValueError as error:
            click.echo(f"error: {masked(str(error))}", err=True)
            code = ExitCode.USAGE
        except BrokenPipeError:
            raise  # The reader of the output has seen enough, as `head` does; click ends the command without a word.
        except OSError as error:  # The store's, or a ConnectionError of the cluster.
            click.echo(f"error: {masked(reason(error))}", err=True)
            code = ExitCode.ERROR
        ctx.exit(int(code))


app = _Commands(name="ltx-ray")
click.version_option(own_version(), prog_name="ltx-ray")(app)


@app.command(
    name="render",
    short_help="render a manifest into a dataset of clips",
    params=[
        Argument("manifest", "Parquet or JSONL file, or a folder of them; local, s3:// or gs://", Location()),
        output_option(required=True, help="where the dataset goes: a folder, s3:// or gs://"),
        *MODEL_OPTIONS, *SELECTION_OPTIONS, *IMAGE_OPTIONS, *ROW_OPTIONS, *RUN_OPTIONS, CONFIG_OPTION,
    ],
)  # fmt: skip
def render_command(manifest: str, output: str, **values: Any) -> ExitCode:
    """Render every row of MANIFEST into a dataset of clips with sound.

    Exit codes: 0 every row is in the index, 3 some rows failed (they are listed), 2 wrong usage or manifest, 4 drained
    on request (the same command resumes), 1 anything else.
    """
    return render(build_options(manifest, output, values))


@app.command(
    name="retry",
    short_help="render the failed rows of a dataset again",
    params=[
        Argument("output", "a dataset", Location()),
        *MODEL_OPTIONS, *ROW_OPTIONS, *IMAGE_OPTIONS, *RUN_OPTIONS, CONFIG_OPTION,
    ],
)  # fmt: skip
def retry_command(output: str, **values: Any) -> ExitCode:
    """Render the rows that failed in OUTPUT again, those at fault themselves included.

    Exit codes are those of render.
    """
    manifest = join(output, layout.FAILED)
    _check_dataset(output)
    if not list_existing(Store(output)).failed_count:
        click.echo(f"nothing failed in {recorded(output)}")
        return ExitCode.OK
    return render(build_options(manifest, output, values, retry_failed=True))


@app.command(
    name="promote",
    short_help="finish chosen previews of a dataset",
    params=[
        Argument("output", "a dataset with previews, made with --stop-after stage1", Location()),
        Option("--ids", section="Rows", metavar="FILE", type=IdsFile(), help="previews whose ids the file lists"),
        Option(
            "--where", section="Rows", metavar="CONDITION", multiple=True,
            help="previews that meet this condition on a column of their table, such as 'flags !~ black'; repeatable",
        ),
        *MODEL_OPTIONS, *IMAGE_OPTIONS, *RUN_OPTIONS, CONFIG_OPTION,
    ],
)  # fmt: skip
def promote_command(output: str, ids: frozenset[str] | None, where: Sequence[str], **values: Any) -> ExitCode:
    """Finish chosen previews of OUTPUT from their stored stage-1 latents.

    The clips are those that a whole run would have given, with the same numerics on GPUs of the same model. Exit codes
    are those of render.
    """
    from ltx_ray.dataset.fold import fold_output
    from ltx_ray.dataset.selection import chosen_items, parse_filter

    if ids is None and not where:
        raise ValueError("promote: nothing is chosen; legal: --ids FILE, --where 'COLUMN OP VALUE', or both")
    _check_dataset(output)
    if values["stop_after"]:
        raise ValueError("promote: --stop-after does not apply here: the clips are finished")
    fold_output(Store(output), click.echo, wait_seconds=wait_seconds(values["wait_for_output"]))
    chosen = chosen_items(Store(output), ids, [parse_filter(text) for text in where])
    if not chosen:
        click.echo(f"no preview in {recorded(output)} is chosen")
        return ExitCode.OK
    options = build_options(join(output, layout.PREVIEWS), output, values)
    return render(replace(options, promote=frozenset(chosen.values()), selection=Selection(ids=frozenset(chosen))))


@app.command(
    name="plan",
    short_help="say what would be rendered, and what it costs",
    params=[
        Argument("manifest", "Parquet or JSONL file, or a folder of them; local, s3:// or gs://", Location()),
        output_option(required=False, help="the dataset to compare with"),
        Option("every", "--all", section="Listing", is_flag=True, help=f"every row, not only the first {PLAN_ROWS}"),
        Option("--resolved", section="Listing", is_flag=True, help="rows as they would be rendered, as JSON"),
        *MODEL_OPTIONS, *SELECTION_OPTIONS, *IMAGE_OPTIONS, *ROW_OPTIONS, *RUN_OPTIONS, CONFIG_OPTION,
    ],
)  # fmt: skip
def plan_command(manifest: str, output: str | None, every: bool, resolved: bool, **values: Any) -> ExitCode:
    """Say which rows would be rendered, are done or are illegal, and what the run costs.

    Exit code 3 when rows are illegal, or have an image that cannot be read now.
    """
    return show_plan(build_options(manifest, output, values), every, resolved)


@app.command(
    name="status",
    short_help="say how far the newest run is",
    params=[
        Argument("output", "a dataset", Location()),
        Option("as_json", "--json", section="Output", is_flag=True, help="one JSON object, for programs"),
    ],
)
def status_command(output: str, as_json: bool) -> ExitCode:
    """Say how far the newest run into OUTPUT is, and what it has cost."""
    from ltx_ray.cli.status import status_json, status_lines

    for line in [status_json(output)] if as_json else status_lines(output):
        click.echo(line)
    return ExitCode.OK


@app.command(
    name="report",
    short_help="write a page with every clip",
    params=[
        Argument("output", "a dataset", Location()),
        Option(
            "--against", section="Output", metavar="DATASET", type=Location(),
            help="write compare.html in place of it: clips of both datasets side by side, by the ids of their rows",
        ),
        Option(
            "--presign", section="Output", metavar="HOURS", type=AtLeast(0.0),
            help="links to clips in an object store that need no credentials for so long",
        ),
        Option(
            "--serve", section="Output", metavar="PORT", type=AtLeast(0),
            help="show the page and play its clips on a port of this machine, until Ctrl-C; 0 for any",
        ),
    ],
)  # fmt: skip
def report_command(output: str, against: str | None, presign: float | None, serve: int | None) -> ExitCode:
    """Write OUTPUT/report.html, one page with every clip, its pictures and its timings. A click plays a clip."""
    from ltx_ray.cli.report import report

    _check_dataset(output)
    if against is not None:
        _check_dataset(against)
    report(output, against, presign, serve, click.echo)
    return ExitCode.OK


@app.command(
    name="fold",
    short_help="move finished rows into the parts of the index",
    params=[
        Argument("output", "a dataset", Location()),
        Option(
            "--migrate", section="Rows", is_flag=True,
            help="also move rows out of the parts of one row that earlier versions wrote",
        ),
    ],
)  # fmt: skip
def fold_command(output: str, migrate: bool) -> ExitCode:
    """Move rows that runs have finished into the numbered parts of OUTPUT's tables. Needs neither a model nor a GPU.

    A run does so itself; this is for what a run that was killed has left. It waits while a run is at work.
    """
    from ltx_ray.dataset.fold import fold_output
    from ltx_ray.dataset.migrate import migrate as move_rows

    _check_dataset(output)
    store, moved, progress = Store(output), 0, Progress()

    def then(dataset: str, writer: str) -> None:
        nonlocal moved
        moved = move_rows(store, dataset, writer, progress.say, on_rows=progress.counting("rows moved"))

    folded = fold_output(store, progress.say, then if migrate else None, progress.counting("rows folded"))
    progress.clear()
    click.echo(f"{folded} rows folded" + (f", {moved} rows moved from parts of one row" if migrate else ""))
    return ExitCode.OK


@app.command(
    name="export",
    short_help="copy a dataset into another form",
    params=[
        Argument("output", "a dataset", Location()),
        Argument("destination", "where the export goes: a folder, s3:// or gs://", Location()),
        Option(
            "--to", section="Output", metavar="FORM", type=OneOf("webdataset", "hf", "delta"), required=True,
            help="webdataset (tar files of 1 GB), hf (a Hugging Face video folder) or delta (a table of the index)",
        ),
    ],
)  # fmt: skip
def export_command(output: str, destination: str, to: str) -> ExitCode:
    """Copy the finished rows of OUTPUT and their clips to DESTINATION. The same command resumes, and adds newer rows.

    Exit code 3 when rows were left out because their clip is missing or damaged.
    """
    from ltx_ray.cli.export import export

    _check_dataset(output)
    progress = Progress()
    done = export(output, destination, to, progress.say, progress.counting("rows exported"))
    progress.clear()
    click.echo(done.line)
    return ExitCode.FAILED_ROWS if done.left_out else ExitCode.OK


@app.command(
    name="remove",
    short_help="take rows down for good",
    params=[
        Argument("output", "a dataset", Location()),
        Option(
            "--ids", section="Rows", metavar="FILE", type=IdsFile(), required=True,
            help="ids of rows, or item_ids of clips, one per line",
        ),
        Option(
            "--failures-only", section="Rows", is_flag=True,
            help="only take failures out of failed/: clips stay, and later runs may render the rows",
        ),
    ],
)  # fmt: skip
def remove_command(output: str, ids: frozenset[str], failures_only: bool) -> ExitCode:
    """Take rows out of OUTPUT with their clips, latents and pictures, and never render them again.

    All rows that share a clip go with it. Waits while a run is at work. Exit code 3 when some ids have no row; rows of
    theirs are not rendered later either. With --failures-only, FILE may also name rows by their places in a manifest,
    such as prompts.jsonl:7.
    """
    from ltx_ray.cli.remove import remove, remove_failures

    _check_dataset(output)
    if not ids:
        raise ValueError("--ids: the file names no row; legal: one id per line")
    store, progress = Store(output), Progress()
    if failures_only:
        done = remove_failures(store, ids, progress.say, progress.counting("parts read"))
        progress.clear()
        click.echo(f"{done.rows} rows taken out of failed/; clips and other rows are as they were")
        unknown = f"--ids: {len(done.unknown)} names have no row in {store.name}/failed, such as {done.some_unknown}"
    else:
        done = remove(store, ids, progress.say, progress.counting("parts read"))
        progress.clear()
        click.echo(f"{done.rows} rows of {done.items} clips removed; they are not rendered again")
        unknown = (
            f"--ids: {len(done.unknown)} ids have no row in {store.name}, such as {done.some_unknown}; they are not "
            "rendered later"
        )
    if done.unknown:
        click.echo(unknown, err=True)
    return ExitCode.FAILED_ROWS if done.unknown else ExitCode.OK


@app.command(
    name="verify",
    short_help="check a dataset, and repair it",
    params=[
        Argument("output", "a dataset", Location()),
        Option(
            "--sample", section="Checks", metavar="N", type=AtLeast(0), default=0,
            help="check N rows, and render them again to compare their latents (needs the model)",
        ),
        Option("--fraction", section="Checks", metavar="X", type=Fraction(), help="check this share of the rows only"),
        Option(
            "--since", section="Checks", metavar="DATE", type=Date(),
            help="check rows that were finished on or after DATE only (ISO, UTC if it names no zone)",
        ),
        Option(
            "--ids", section="Checks", metavar="FILE", type=IdsFile(),
            help="check rows whose ids the file lists only, one per line",
        ),
        Option(
            "--part", section="Checks", metavar="I/N", type=Shard(),
            help="check every N-th part of the index only, from part I, from 0 to N-1: N machines share the work",
        ),
        Option(
            "--read-all", section="Checks", is_flag=True,
            help="read clips though their store has checksums of them",
        ),
        Option(
            "--resume", section="Checks", metavar="FILE",
            help="keep what was checked in a local FILE, and go on from there; deleted at the end",
        ),
        Option(
            "--repair", section="Checks", is_flag=True,
            help="take bad rows out of the index, so that render renders them again",
        ),
        *MODEL_OPTIONS, *IMAGE_OPTIONS, *RUN_OPTIONS, CONFIG_OPTION,
    ],
)  # fmt: skip
def verify_command(
    output: str,
    sample: int,
    fraction: float | None,
    since: datetime | None,
    ids: frozenset[str] | None,
    part: tuple[int, int] | None,
    read_all: bool,
    resume: str | None,
    repair: bool,
    **values: Any,
) -> ExitCode:
    """Check that every row of OUTPUT's index has its clip, unchanged.

    Clips are compared by the SHA-256 that an object store keeps of them, and are read where it keeps none.

    Exit codes: 0 all well, 3 problems found (one per line), 2 wrong usage.
    """
    from ltx_ray.cli.verify import verify

    def options(sample_manifest: str, sample_output: str) -> Options:
        return build_options(sample_manifest, sample_output, values)

    if sample:
        options("", "")  # What is wrong with them is reported before the clips are read.
    progress = Progress()

    def say(message: str) -> None:
        progress.clear()
        click.echo(message)

    def on_rows(done: int, total: int) -> None:
        progress.count(done, total, "rows checked")

    scope = CheckScope(1.0 if fraction is None else fraction, since, ids, part or (0, 1))
    problems = verify(
        output, say, sample, repair, options, on_rows, scope=scope, read_all=read_all, resume=resume
    )  # fmt: skip
    return ExitCode.FAILED_ROWS if problems else ExitCode.OK


@app.command(
    name="fetch",
    short_help="download the model's files to this node",
    params=[*MODEL_OPTIONS, CONFIG_OPTION],
)
def fetch_command(**values: Any) -> ExitCode:
    """Download the model's files that are given as URIs into $LTX_RAY_CACHE/weights, where ranks find them.

    A rank does so itself when it starts; this is for an image, an init container or a node that is idle.
    """
    from ltx_ray.checkpoints.node_cache import fetch, pinned

    model, progress = pinned(model_files(values)), Progress()
    for path, files in model.remote:

        def on_bytes(done: int, total: int, name: str = recorded(path)) -> None:
            progress.count(done // 10**6, total // 10**6, f"MB of {name}")

        place = fetch(path, files, model.cache_bytes, on_bytes)
        progress.clear()
        click.echo(f"{recorded(path)}: {sum(file.size for file in files) / 1e9:.1f} GB in {place}")
    if not model.remote:
        click.echo("nothing to fetch: every file of the model is on this machine's disks")
    return ExitCode.OK


@app.command(
    name="inspect",
    short_help="say what a weight file or a model directory holds",
    params=[Argument("file", "a safetensors file, or a directory of them; local or a URI", ModelLocation())],
)
def inspect_command(file: str) -> ExitCode:
    """Say what a weight file or a model directory holds."""
    from ltx_ray.cli.status import inspect_lines

    for line in inspect_lines(file):
        click.echo(line)
    return ExitCode.OK


app.add_command(doctor_command)
app.add_command(supervise_command)
app.add_command(submit_command)


def _check_dataset(output: str) -> None:
    store = Store(output)
    if not any(store.exists(name) for name in layout.DATASET_MARKS):
        raise ValueError(f"{store.name}: no dataset; legal: the --output of a run")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script and of `jobs/render.py`."""
    open_standard_streams()
    mask_tracebacks()
    app.main(args=list(sys.argv[1:] if argv is None else argv), prog_name="ltx-ray")


__all__ = ["app", "main"]
