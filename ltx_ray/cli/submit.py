"""`ltx-ray submit`: a render as a job of a Ray cluster."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex

import click

from ltx_ray.cli.cluster_jobs import ATTEMPTS, connect, follow, read_record, submit_once
from ltx_ray.cli.parameters import Argument, AtLeast, Command, OneOf, Option, with_lora_strengths
from ltx_ray.run import ExitCode
from ltx_ray.storage.credentials import masked

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@click.command(
    name="submit",
    cls=Command,
    short_help="render as a job of a Ray cluster",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    params=[
        Argument("arguments", "those of render, after --", click.UNPROCESSED, nargs=-1, required=True),
        Option(
            "--address", section="Cluster", metavar="URL",
            help="the cluster's dashboard, such as http://127.0.0.1:8265; by default $RAY_API_SERVER_ADDRESS",
        ),
        Option(
            "--entrypoint", section="Cluster", metavar="COMMAND", default="ltx-ray render",
            help="what the job runs on the head, in shell words; the arguments follow it",
        ),
        Option(
            "--submission-id", section="Job", metavar="ID",
            help="the job's id: as long as a job with it has not failed, no other is submitted",
        ),
        Option(
            "--attempts", section="Job", metavar="N", type=AtLeast(1), default=ATTEMPTS,
            help="jobs with this id that may fail until no other is submitted",
        ),
        Option("--wait", section="Job", is_flag=True, default=False, help="follow the job and end with its exit code"),
        Option(
            "--on-stop", section="Job", type=OneOf("leave", "drain"), default="leave",
            help="with --wait: after SIGTERM, SIGINT or SIGHUP the job goes on (leave), or it drains",
        ),
        Option(
            "as_json", "--json", section="Output", is_flag=True, default=False,
            help="one line of JSON on standard output, and all other lines on standard error",
        ),
    ],
)  # fmt: skip
@click.pass_context
def submit_command(
    ctx: click.Context,
    arguments: tuple[str, ...],
    address: str | None,
    entrypoint: str,
    submission_id: str | None,
    attempts: int,
    wait: bool,
    on_stop: str,
    as_json: bool,
) -> int:
    """Submit `ltx-ray render ARGUMENTS` to a Ray cluster. The head must see the manifest and the output.

    Exit codes: 0 submitted, or already there; with --wait those of render, 4 when a signal has drained the job, and
    128 + the signal when the job was left. The JSON has submission_id, exit_code, counts and output.
    """

    def say(message: str) -> None:
        click.echo(message, err=as_json)

    address = address or os.environ.get("RAY_API_SERVER_ADDRESS", "")
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"--address: {address!r}, legal: http://host:port of the cluster's dashboard")
    if submission_id is not None and not _ID.fullmatch(submission_id):
        raise ValueError(
            f"--submission-id: {submission_id!r}, legal: up to 128 letters, digits, '.', '_' and '-' that begin with a "
            f"letter or digit"
        )
    output = _checked_output(ctx, arguments, entrypoint)
    job = submission_id or f"render-{secrets.token_hex(6)}"
    try:
        client = connect(address)
        command = f"{entrypoint} {shlex.join(arguments)}"
        name, outcome = submit_once(client, job, command, {"output": output}, attempts)
        say(f"{name}: {outcome}")
        code = follow(client, name, on_stop == "drain", say, None if as_json else output) if wait else None
    except (OSError, RuntimeError) as error:
        raise ConnectionError(f"{address}: {error}") from None
    if as_json:
        counts = read_record(output).get("counts") if code in (ExitCode.OK, ExitCode.FAILED_ROWS) else None
        line = {"submission_id": name, "exit_code": code, "counts": counts, "output": output}
        click.echo(json.dumps(line, ensure_ascii=False))
    return code or ExitCode.OK


def _checked_output(ctx: click.Context, arguments: tuple[str, ...], entrypoint: str) -> str:
    """The output of a render with these arguments. Raises what render would for them, and ValueError."""
    for what, value in (("--entrypoint", entrypoint), *(("render", word) for word in arguments)):
        if masked(value) != value:
            raise ValueError(
                f"{what}: {masked(value)}, legal: no credentials, which Ray would keep with the job; set them in the "
                f"cluster's environment"
            )
    group = ctx.find_root().command
    assert isinstance(group, click.Group)
    render = group.commands["render"]
    with render.make_context("render", list(arguments), parent=ctx.parent) as checked:
        given, _, _ = render.make_parser(checked).parse_args(with_lora_strengths(arguments))
    for name, shown in (("manifest", "MANIFEST"), ("output", "--output")):
        # The job starts in a folder of its own.
        if not (given[name].startswith("/") or "://" in given[name]):
            raise ValueError(f"{shown}: {given[name]}, legal: an absolute path that the head sees, or a URI")
    return str(checked.params["output"])
