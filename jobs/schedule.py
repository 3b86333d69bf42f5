#!/usr/bin/env python
"""Expand a recipe to the manifest of one date and submit it to a Ray cluster, once.

    python jobs/schedule.py jobs/nightly.yaml --date 2026-11-23 --address http://127.0.0.1:8265 --wait

The same recipe and date always give the same manifest, byte for byte, and the same submission id. A schedule
that fires twice (a retried CronJob, two cron hosts, an impatient operator) therefore renders once. A job that
failed or was stopped is followed by another whose id ends in "-2"; the render continues where it was.

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

# Python adds a program's own folder to the path; a test that loads this file by its path does not.
sys.path.insert(0, str(Path(__file__).resolve().parent))
# The cluster needs a clone, which need not be installed.
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from schedule_pool import SourceManifest
from schedule_recipe import Recipe, expand, manifest_bytes, parse_recipe, require

from ltx_ray.storage.credentials import masked, without_credentials
from ltx_ray.storage.locations import is_in_job_copy, parent, resolve
from ltx_ray.storage.text import read_text

#: Seconds between two status requests of --wait: at first, and at most.
POLL_SECONDS = 0.5, 5.0
#: Seconds for which --wait tolerates a silent dashboard, as when the head is being replaced.
SILENCE_SECONDS = 600.0


# ---- the submission ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submission:
    """The manifest of one date, and the job that renders it."""

    manifest_path: Path
    manifest: bytes
    rows: int
    submission_id: str
    entrypoint: str


def submission_id(name: str, date: str, manifest: bytes, options: Sequence[str]) -> str:
    """`<name>-<date>-<12 hex>`, where the hex digits are of the sha256 of the manifest and the render's options."""
    digest = hashlib.sha256(manifest + b"\0" + "\0".join(options).encode()).hexdigest()
    return f"{name}-{date}-{digest[:12]}"


def plan(recipe: Recipe, date: str, out_dir: str | Path, command: str) -> Submission:
    """The submission of one date. Reads the recipe's manifest and writes nothing.

    `command` is in shell words; the manifest's path and the render's options are appended, quoted.
    """
    source = SourceManifest(recipe.manifest) if recipe.manifest else None
    if source is not None:
        source.say_skipped(lambda note: print(f"schedule.py: {note}", file=sys.stderr))
    data = manifest_bytes(expand(recipe, date, source))
    output = recipe.output.format(date=date, name=recipe.name)
    options = list(recipe.render_options)
    texts = [("output", output), ("--entrypoint", command), *(("render_options", option) for option in options)]
    for what, value in texts:
        # Ray keeps the command of a job, and shows it to everyone who sees the cluster.
        legal = "without credentials, which Ray would keep with the job; set them in the cluster's environment"
        require(what, masked(value), masked(value) == value, legal)
    if source is not None and source.has_images:
        options += ["--image-root", without_credentials(source.folder)]
    # The job starts in a folder of its own and needs absolute paths. The id does not depend on them.
    job = submission_id(recipe.name, date, data, ["--output", output, *options])
    output = _resolved("output", output)
    legal = "a place outside of the copy that Ray makes of a job's working directory, which is lost with it"
    require("output", output, not is_in_job_copy(output), legal)
    folder = _resolved("--out-dir", str(out_dir))
    require("--out-dir", folder, "://" not in folder, "a local folder")
    path = Path(folder) / f"{recipe.name}-{date}.jsonl"
    return Submission(
        path,
        data,
        data.count(b"\n"),
        job,
        f"{command} {shlex.join([str(path), '--output', output, *options])}",
    )


def _resolved(what: str, path: str) -> str:
    """`resolve(path)`; its errors begin with `what`."""
    try:
        return resolve(path)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def write_atomically(path: Path, data: bytes) -> None:
    """Write by rename: a reader sees the old bytes or the new ones, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and path.read_bytes() == data:
        return
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would lock out the cluster's user
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def connect(address: str) -> Any:
    """A job client for the dashboard at `address` (http://host:port).

    Raises ConnectionError, also when the cluster rejects this process's token.
    """
    # Ray lets these variables override the address that it is given.
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    if os.environ.get("RAY_AUTH_TOKEN"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Without it, Ray would not send the token.
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        text = str(error).partition("\n")[0]
        raise ConnectionError(f"{text}; legal: the cluster's token in RAY_AUTH_TOKEN") from None


def _status(client: Any, job: str) -> str | None:
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; None when the cluster has no such job."""
    try:
        return client.get_job_status(job).value
    except RuntimeError as error:
        if "does not exist" in str(error):
            return None
        raise


def submit_once(client: Any, job: str, entrypoint: str, metadata: Mapping[str, str]) -> tuple[str, str]:
    """Ensure that exactly one job of this submission is pending, running or succeeded.

    Returns the job's id and a phrase for what was found or done. The first job has the id `job`; one that failed
    or was stopped is followed by `job-2`, then `job-3`, and its record stays. The cluster accepts an id once, so
    only one of several concurrent callers submits.
    """
    name, previous = job, None
    for number in itertools.count(2):
        status = _status(client, name)
        if status in ("PENDING", "RUNNING", "SUCCEEDED"):
            return name, f"already there ({status.lower()})"
        if status is None:
            break
        name, previous = f"{job}-{number}", status
    try:
        client.submit_job(submission_id=name, entrypoint=entrypoint, metadata=dict(metadata))
    except RuntimeError as error:
        if "already exists" in str(error):
            return name, "already there (submitted by another caller just now)"
        raise
    return name, "submitted" if previous is None else f"submitted again (previous job: {previous.lower()})"


def wait(client: Any, job: str) -> int:
    """Follow a job to its end. Returns the exit code of its command (0, 3 …), or 1 when there is none.

    Raises ConnectionError after SILENCE_SECONDS without an answer.
    """
    shown, pause = "", POLL_SECONDS[0]
    silent_since: float | None = None
    while True:
        try:
            info = client.get_job_info(job)
            silent_since = None
        except (OSError, RuntimeError) as error:
            if "does not exist" in str(error):
                raise
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > SILENCE_SECONDS:
                raise ConnectionError(f"no answer for {SILENCE_SECONDS:.0f} s: {error}") from error
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
    # The exit code is None when the command never started, and negative when a signal ended it.
    return info.driver_exit_code if (info.driver_exit_code or 0) > 0 else 1


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
        "--out-dir",
        metavar="DIR",
        default="manifests",
        help="folder for <name>-<date>.jsonl, which the cluster's head must see under the same path "
        "(default: manifests)",
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
    return p


def parse_date(text: str | None) -> str:
    """The date as YYYY-MM-DD; None means today in UTC. Raises ValueError."""
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
            file = resolve(args.recipe)
            recipe = parse_recipe(read_text(file), parent(file))
        except ValueError as error:
            raise ValueError(f"{args.recipe}: {error}") from None
        job = plan(recipe, date, args.out_dir, args.entrypoint)
        address = args.address or ""
        legal = args.dry_run or address.startswith(("http://", "https://"))
        require("--address", address, legal, "http://host:port")
    except ValueError as error:
        print(f"schedule.py: {masked(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:  # The store of the recipe's manifest.
        print(f"schedule.py: {error}", file=sys.stderr)
        return 1
    print(f"manifest  {job.manifest_path} ({job.rows} rows)")
    print(f"job       {job.submission_id}\nruns      {job.entrypoint}")
    if args.dry_run:
        return 0
    try:
        write_atomically(job.manifest_path, job.manifest)
        client = connect(address)
        metadata = {"recipe": recipe.name, "date": date}
        name, outcome = submit_once(client, job.submission_id, job.entrypoint, metadata)
        print(f"{name}: {outcome}", flush=True)
        return wait(client, name) if args.wait else 0
    except (OSError, RuntimeError) as error:
        print(f"schedule.py: {address}: {masked(str(error))}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
