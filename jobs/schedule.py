#!/usr/bin/env python
"""Turn a recipe into the manifest of one date and submit it to a Ray cluster, once.

    python jobs/schedule.py jobs/nightly.yaml --date 2026-11-23 --address http://127.0.0.1:8265 --wait

The same recipe and date always give the same manifest, byte for byte, and the same submission id, so
that a schedule that fires twice (a retried CronJob, two cron hosts, a nervous human) renders once.
After a job that failed or was stopped comes another, with "-2" behind the id; the render goes on where it was.

A recipe is YAML:

    name: nightly                       # letters, digits, "-", "_", "."; begins every id
    output: s3://clips/nightly/{date}   # {date} and {name} are filled in
    prompts: ["a {animal} in {place}"]  # templates; "{{" and "}}" are literal braces
    variables: {animal: [fox, owl], place: [snow, rain]}
    manifest: pool.parquet              # and/or rows of a manifest (JSONL, Parquet; relative to the recipe)
    count: 3                            # a seeded sample, another each date; absent = everything
    seed: 7                             # decides the sample and the seed of each row (default 0)
    defaults: {height: 512}             # row fields, for rows that do not have their own
    render_options: [--tp, 4]           # added to the command line of jobs/render.py

Every row has a seed drawn from (recipe's seed, name, date, row) unless its own row or `defaults` fixes one.
Rows keep what made them in `variables`, or `source_id`; both travel to the index in `extra`.

Exit codes: 0 submitted, or already there (with --wait: rendered); 2 bad usage or recipe; with --wait the
exit code of the job's command (3: some rows failed); 1 anything else.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import itertools
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when a test loads this file by its path

from schedule_recipe import Recipe, Source, expand, manifest_bytes, need, parse_recipe

POLL_SECONDS = 0.5, 5.0  # --wait asks this often at first, and in the long run
# How long --wait puts up with a dashboard that does not answer (a head that is replaced), in seconds.
PATIENCE_SECONDS = 600.0


# ---- the submission ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submission:
    """What one date comes to: its manifest, and the job that renders it."""

    manifest_path: Path
    manifest: bytes
    rows: int
    submission_id: str
    entrypoint: str


def submission_id(name: str, date: str, manifest: bytes, options: Sequence[str]) -> str:
    """`<name>-<date>-<12 hex>`; the hex is of sha256 over the manifest and the render's options."""
    digest = hashlib.sha256(manifest + b"\0" + "\0".join(options).encode()).hexdigest()
    return f"{name}-{date}-{digest[:12]}"


def plan(recipe: Recipe, date: str, out_dir: Path, command: str) -> Submission:
    """The submission of one date; reads the recipe's manifest, writes nothing.

    `command` is shell words; the manifest's path and the render's options follow it, quoted.
    """
    source = Source(recipe.manifest) if recipe.manifest else None
    data = manifest_bytes(expand(recipe, date, source))
    output = recipe.output.format(date=date, name=recipe.name)
    options = list(recipe.render_options)
    if source is not None and source.has_images:
        options += ["--image-root", source.folder]
    # The job starts in another folder than we, so it gets whole paths; the id does not know of folders.
    job = submission_id(recipe.name, date, data, ["--output", output, *options])
    output = output if "://" in output else os.path.abspath(os.path.expanduser(output))
    path = out_dir.absolute() / f"{recipe.name}-{date}.jsonl"
    return Submission(
        path,
        data,
        data.count(b"\n"),
        job,
        f"{command} {shlex.join([str(path), '--output', output, *options])}",
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Publish data under path by rename: a reader sees the old bytes or the new ones, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and path.read_bytes() == data:
        return
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would keep the cluster's user out
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def connect(address: str) -> Any:
    """A job client for the dashboard at address (http://host:port).

    Raises ConnectionError, also when the cluster wants another token than this process has.
    """
    # Ray lets these variables override the address it is given; ours was chosen already.
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ConnectionError(str(error).partition("\n")[0] + " (Ray's token: $RAY_AUTH_TOKEN)") from None


def _status(client: Any, job: str) -> str | None:
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; None if the cluster has no such job."""
    try:
        return client.get_job_status(job).value
    except RuntimeError as error:
        if "does not exist" in str(error):
            return None
        raise


def submit_once(client: Any, job: str, entrypoint: str, metadata: Mapping[str, str]) -> tuple[str, str]:
    """Have exactly one job of this submission pending, running or succeeded.

    Returns the job's id and, in words, what was found or done. The first job has the id `job`; after one
    that failed or was stopped comes `job-2`, then `job-3`. The cluster accepts an id once, so that of
    several callers at once one submits, and the records of the failed ones stay.
    """
    name, before = job, None
    for number in itertools.count(2):
        status = _status(client, name)
        if status in ("PENDING", "RUNNING", "SUCCEEDED"):
            return name, f"already there ({status.lower()})"
        if status is None:
            break
        name, before = f"{job}-{number}", status
    try:
        client.submit_job(submission_id=name, entrypoint=entrypoint, metadata=dict(metadata))
    except RuntimeError as error:
        if "already exists" in str(error):
            return name, "already there (submitted by another at this moment)"
        raise
    return name, "submitted" if before is None else f"submitted again (it had {before.lower()})"


def wait(client: Any, job: str) -> int:
    """Follow a job to its end; the exit code of its command (0, 3 …), or 1 where it has none."""
    shown, silent_since, pause = "", None, POLL_SECONDS[0]
    while True:
        try:
            info = client.get_job_info(job)
            silent_since = None
        except (OSError, RuntimeError) as error:
            if "does not exist" in str(error):
                raise
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > PATIENCE_SECONDS:
                raise ConnectionError(f"no answer for {PATIENCE_SECONDS:.0f} s: {error}") from error
            time.sleep(POLL_SECONDS[1])
            continue
        status = info.status.value
        if status != shown:
            print(f"{job}: {status.lower()}", flush=True)
            shown = status
        if info.status.is_terminal():
            break
        time.sleep(pause)
        pause = min(1.2 * pause, POLL_SECONDS[1])
    if status == "SUCCEEDED":
        return 0
    log = client.get_job_logs(job).splitlines()[-20:]
    print("\n".join([*log, f"{job}: {info.message or 'no message'}"]), file=sys.stderr)
    # None when the command was never started; negative when a signal ended it.
    return info.driver_exit_code if (info.driver_exit_code or 0) > 0 else 1


# ---- command line ------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    render = shlex.quote(str(Path(__file__).resolve().with_name("render.py")))
    p = argparse.ArgumentParser(
        prog="schedule.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("recipe", metavar="RECIPE.yaml")
    p.add_argument("--date", metavar="YYYY-MM-DD", help="the date to render (default: today in UTC)")
    p.add_argument(
        "--out-dir",
        metavar="DIR",
        type=Path,
        default=Path("manifests"),
        help="where <name>-<date>.jsonl goes; a folder that the cluster's head sees under the same path "
        "(default: manifests)",
    )
    p.add_argument(
        "--address",
        metavar="URL",
        default=os.environ.get("RAY_API_SERVER_ADDRESS"),
        help="the cluster's dashboard, as http://127.0.0.1:8265 (default: $RAY_API_SERVER_ADDRESS)",
    )
    p.add_argument(
        "--entrypoint",
        metavar="COMMAND",
        default=f"python {render}",
        help="what the job runs, in shell words for the cluster's head; the manifest and the render's "
        "options are put after it, so that a wrapper can go around the render (default: %(default)s)",
    )
    p.add_argument("--dry-run", action="store_true", help="print what would be submitted; write and submit nothing")
    p.add_argument("--wait", action="store_true", help="follow the job to its end and exit with its exit code")
    return p


def parse_date(text: str | None) -> str:
    """A date as YYYY-MM-DD; None is today in UTC. Raises ValueError."""
    if text is None:
        return datetime.datetime.now(datetime.UTC).date().isoformat()
    try:
        return datetime.datetime.strptime(text, "%Y-%m-%d").date().isoformat()
    except ValueError:
        raise ValueError(f"--date: {text!r}, must be a date as YYYY-MM-DD") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        date = parse_date(args.date)
        try:
            recipe = parse_recipe(Path(args.recipe).read_text(encoding="utf-8"), os.path.dirname(args.recipe) or ".")
        except (OSError, ValueError) as error:
            raise ValueError(f"{args.recipe}: {error}") from None
        job = plan(recipe, date, args.out_dir, args.entrypoint)
        address = args.address or ""
        need(
            "--address",
            address,
            args.dry_run or address.startswith(("http://", "https://")),
            "http://host:port",
        )
    except ValueError as error:
        print(f"schedule.py: {error}", file=sys.stderr)
        return 2
    print(f"manifest  {job.manifest_path} ({job.rows} rows)")
    print(f"job       {job.submission_id}\nruns      {job.entrypoint}")
    if args.dry_run:
        return 0
    try:
        write_atomically(job.manifest_path, job.manifest)
        client = connect(address)
        metadata = {"recipe": recipe.name, "date": date}
        name, what = submit_once(client, job.submission_id, job.entrypoint, metadata)
        print(f"{name}: {what}", flush=True)
        return wait(client, name) if args.wait else 0
    except (OSError, RuntimeError) as error:
        print(f"schedule.py: {address}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
