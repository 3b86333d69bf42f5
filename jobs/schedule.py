#!/usr/bin/env python
"""Expand a recipe to the manifest of one date and submit it to a Ray cluster, once.

    python jobs/schedule.py jobs/nightly.yaml --date 2026-11-23 --address http://127.0.0.1:8265 --wait

The same recipe and date always give the same manifest, byte for byte, and the same submission id. A schedule
that fires twice (a retried CronJob, two cron hosts, an impatient operator) therefore renders once. A job that
failed or was stopped is followed by another whose id ends in "-2"; the render continues where it was.

The manifest of a date is written once, to state/manifests/ in the output, on any store. It stands when the recipe or
its pool changes later that day: the date renders what was drawn first. Remove the file to have it drawn again.

A recipe is YAML:

    name: nightly                       # letters, digits, "-", "_", "."; begins every id
    output: s3://clips/nightly/{date}   # {date} and {name} are filled in
    prompts: ["a {animal} in {place}"]  # templates; "{{" and "}}" are literal braces
    variables: {animal: [fox, owl], place: [snow, rain]}
    manifest: pool.parquet              # and/or rows of a manifest, as render reads it (relative to the recipe)
    count: 3                            # size of a seeded sample, a different one each date; absent = all rows
    seed: 7                             # decides the sample and the seed of each row (default 0)
    defaults: {height: 512}             # row fields, for rows without a value of their own
    render_options: [--tp, 4]           # added to the command line of jobs/render.py

Every value is the text that stands there: 12:30 in a prompt, `off` among the options. Numbers are what they look like
(0750 is 750), and those of `defaults` have the types of the manifest's columns. Nothing, ~ and null mean that a field
is not given; in a list, and in quotes, they are text.

A row without a seed of its own or from `defaults` gets one drawn from (recipe's seed, name, date, row number).
Each row records its origin in `variables` or `source_id`; the index has both in `extra`.

Exit codes: 0 submitted, or already there (with --wait: rendered); 2 wrong usage or recipe; with --wait the
exit code of the job's command (3: some rows failed), 4 when a signal has stopped the job (--on-stop drain), and
128 + the signal when the job was left; 1 anything else. --backfill ends at the first date with another code than 0
and 3.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Python adds a program's own folder to the path; a test that loads this file by its path does not.
sys.path.insert(0, str(Path(__file__).resolve().parent))
# The cluster needs a clone, which need not be installed.
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from schedule_pool import SourceManifest
from schedule_recipe import Recipe, expand, manifest_bytes, parse_recipe, require

from ltx_ray.cli.cluster_jobs import ATTEMPTS, connect, follow, submit_once
from ltx_ray.manifest.outputs import STATE
from ltx_ray.run import ExitCode
from ltx_ray.storage.credentials import masked, without_credentials
from ltx_ray.storage.locations import is_in_job_copy, join, parent, resolve
from ltx_ray.storage.store import Store
from ltx_ray.storage.text import read_text

#: The folder of the dated manifests in an output. Whoever reads a folder of manifests passes over `STATE` in outputs.
MANIFESTS = f"{STATE}/manifests"
#: What a date may end with while the dates after it are still rendered: every row is there, or some have failed.
_GOES_ON = (ExitCode.OK, ExitCode.FAILED_ROWS)


# ---- the submission ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submission:
    """The manifest of one date, and the job that renders it."""

    #: The folder of the manifest: a location.
    folder: str
    file_name: str
    manifest: bytes
    #: Whether the manifest is there already.
    stored: bool
    #: Whether the recipe would give another manifest now than the one that is there.
    outdated: bool
    submission_id: str
    entrypoint: str
    output: str

    @property
    def manifest_path(self) -> str:
        return join(self.folder, self.file_name)

    @property
    def rows(self) -> int:
        return self.manifest.count(b"\n")


def submission_id(name: str, date: str, manifest: bytes, options: Sequence[str]) -> str:
    """`<name>-<date>-<12 hex>`, where the hex digits are of the sha256 of the manifest and the render's options."""
    digest = hashlib.sha256(manifest + b"\0" + "\0".join(options).encode()).hexdigest()
    return f"{name}-{date}-{digest[:12]}"


def plan(recipe: Recipe, date: str, out_dir: str | None, command: str) -> Submission:
    """The submission of one date. Reads the recipe's manifest and that of the date, and writes nothing.

    `command` is in shell words; the manifest's path and the render's options are appended, quoted. The manifest of a
    date that is in `out_dir`, or below the output when that is None, stands: what is drawn now does not replace it.
    """
    source = SourceManifest(recipe.manifest) if recipe.manifest else None
    if source is not None:
        source.say_skipped(lambda note: print(f"schedule.py: {note}", file=sys.stderr))
    drawn = manifest_bytes(expand(recipe, date, source))
    output = recipe.output.format(date=date, name=recipe.name)
    _check_no_credentials(recipe, output, out_dir, command)
    resolved_output = _resolved("output", output)
    legal = "a place outside of the copy that Ray makes of a job's working directory, which is lost with it"
    require("output", resolved_output, not is_in_job_copy(resolved_output), legal)
    folder = join(resolved_output, MANIFESTS) if out_dir is None else _resolved("--out-dir", out_dir)
    file_name = f"{recipe.name}-{date}.jsonl"
    stored = _stored(folder, file_name)
    data = drawn if stored is None else stored
    options = list(recipe.render_options)
    # Rows of a stored manifest that has become outdated may have images that those drawn now lack.
    if source is not None and (source.has_images or (data != drawn and b'"images": [{' in data)):
        options += ["--image-root", without_credentials(source.folder)]
    # The job starts in a folder of its own and needs absolute paths. The id does not depend on them.
    job = submission_id(recipe.name, date, data, ["--output", output, *options])
    entrypoint = f"{command} {shlex.join([join(folder, file_name), '--output', resolved_output, *options])}"
    return Submission(folder, file_name, data, stored is not None, data != drawn, job, entrypoint, resolved_output)


def _check_no_credentials(recipe: Recipe, output: str, out_dir: str | None, command: str) -> None:
    options = (("render_options", option) for option in recipe.render_options)
    for what, value in (("output", output), ("--out-dir", out_dir or ""), ("--entrypoint", command), *options):
        # Ray keeps the command of a job, and shows it to everyone who sees the cluster.
        legal = "without credentials, which Ray would keep with the job; set them in the cluster's environment"
        require(what, masked(value), masked(value) == value, legal)


def _stored(folder: str, file_name: str) -> bytes | None:
    try:
        return Store(folder).read_versioned(file_name)[0]
    except FileNotFoundError:
        return None


def _resolved(what: str, path: str) -> str:
    """`resolve(path)`; its errors begin with `what`."""
    try:
        return resolve(path)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


# ---- command line ------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    render = shlex.quote(str(Path(__file__).resolve().with_name("render.py")))
    p = argparse.ArgumentParser(
        prog="schedule.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("recipe", metavar="RECIPE.yaml")
    p.add_argument("--date", metavar="YYYY-MM-DD", help="the date to render (default: today in UTC)")
    p.add_argument(
        "--backfill",
        metavar="FROM..TO",
        help="render these dates and those between them, each when the one before has ended; needs --wait or --dry-run",
    )
    p.add_argument(
        "--out-dir",
        metavar="DIR",
        help="folder or URI for <name>-<date>.jsonl, which the cluster's head must see under the same name "
        f"(default: {MANIFESTS}/ in the output)",
    )
    p.add_argument(
        "--address",
        metavar="URL",
        default=os.environ.get("RAY_API_SERVER_ADDRESS"),
        help="the cluster's dashboard, such as http://127.0.0.1:8265 (default: $RAY_API_SERVER_ADDRESS)",
    )
    p.add_argument(
        "--entrypoint",
        metavar="COMMAND",
        default=f"python {render}",
        help="what the job runs, in shell words for the cluster's head; the manifest and the render's options are "
        "appended, so that a wrapper can go around the render (default: %(default)s)",
    )
    p.add_argument("--dry-run", action="store_true", help="print what would be submitted; write and submit nothing")
    p.add_argument("--wait", action="store_true", help="follow the job to its end and exit with its exit code")
    p.add_argument(
        "--on-stop",
        choices=("leave", "drain"),
        default="leave",
        help="what SIGTERM, SIGINT or SIGHUP does to the job with --wait: it goes on, or it is stopped, drains, and "
        "the exit code is 4 (default: %(default)s)",
    )
    p.add_argument(
        "--attempts",
        metavar="N",
        type=int,
        default=ATTEMPTS,
        help="jobs of one date that may fail until no other is submitted (default: %(default)s)",
    )
    return p


def parse_date(text: str | None) -> str:
    """The date as YYYY-MM-DD; None means today in UTC. Raises ValueError."""
    if text is None:
        return datetime.datetime.now(datetime.UTC).date().isoformat()
    try:
        return datetime.datetime.strptime(text, "%Y-%m-%d").date().isoformat()
    except ValueError:
        raise ValueError(f"--date: {text!r}, must be a date as YYYY-MM-DD") from None


def parse_backfill(text: str) -> list[str]:
    """The dates of FROM..TO, in order. Raises ValueError."""
    try:
        first, last = (datetime.date.fromisoformat(parse_date(end)) for end in text.split(".."))
    except ValueError:
        first, last = datetime.date.max, datetime.date.min
    require("--backfill", text, first <= last, "FROM..TO, dates as YYYY-MM-DD in their order")
    return [(first + datetime.timedelta(days)).isoformat() for days in range((last - first).days + 1)]


def _dates(args: argparse.Namespace) -> list[str]:
    """The dates to render, in order. Raises ValueError, also for other options that do not go together."""
    require("--attempts", args.attempts, args.attempts >= 1, "a whole number of at least 1")
    if args.backfill is None:
        return [parse_date(args.date)]
    if args.date is not None:
        raise ValueError("--date and --backfill exclude each other")
    require("--backfill", args.backfill, args.wait or args.dry_run, "with --wait, or with --dry-run")
    return parse_backfill(args.backfill)


def _run_date(args: argparse.Namespace, recipe: Recipe, date: str) -> int:
    """Submit the job of one date, and follow it with --wait; returns the exit code."""
    job = plan(recipe, date, args.out_dir, args.entrypoint)
    if not (args.dry_run or job.stored) and not Store(job.folder).create(job.file_name, job.manifest):
        job = plan(recipe, date, args.out_dir, args.entrypoint)  # Another caller was first.
    if job.outdated:
        print(
            f"schedule.py: {job.manifest_path}: stands as drawn, though the recipe or its pool has changed since",
            file=sys.stderr,
        )
    print(f"manifest  {job.manifest_path} ({job.rows} rows)")
    print(f"job       {job.submission_id}\nruns      {job.entrypoint}", flush=True)
    if args.dry_run:
        return ExitCode.OK
    try:
        client = connect(args.address)
        metadata = {"recipe": recipe.name, "date": date}
        name, outcome = submit_once(client, job.submission_id, job.entrypoint, metadata, args.attempts)
        print(f"{name}: {outcome}", flush=True)
        if not args.wait:
            return ExitCode.OK
        return follow(client, name, args.on_stop == "drain", lambda text: print(text, flush=True), job.output)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(f"{args.address}: {masked(str(error))}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        dates = _dates(args)
        try:
            file = resolve(args.recipe)
            recipe = parse_recipe(read_text(file), parent(file))
        except ValueError as error:
            raise ValueError(f"{args.recipe}: {error}") from None
        address = args.address or ""
        legal = args.dry_run or address.startswith(("http://", "https://"))
        require("--address", address, legal, "http://host:port")
        worst = 0
        for date in dates:
            code = _run_date(args, recipe, date)
            if code not in _GOES_ON:
                return code
            worst = max(worst, code)
        return worst
    except ValueError as error:
        print(f"schedule.py: {masked(str(error))}", file=sys.stderr)
        return ExitCode.USAGE
    except OSError as error:  # Of a store, or of the cluster.
        print(f"schedule.py: {masked(str(error))}", file=sys.stderr)
        return ExitCode.ERROR


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
