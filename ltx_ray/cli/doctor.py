"""`ltx-ray doctor`: whether this node has what a run needs."""

from __future__ import annotations

import dataclasses
import json

import click

from ltx_ray.cli.parameters import Command, Location, OneOf, Option
from ltx_ray.doctor.examination import examine
from ltx_ray.run import ExitCode


@click.command(
    name="doctor",
    cls=Command,
    short_help="check whether this node has what a run needs",
    params=[
        Option(
            "--device", section="Checks", type=OneOf("cuda", "cpu"), default="cuda", help="what replicas compute on"
        ),
        Option(
            "--output", section="Checks", type=Location(), metavar="URI",
            help="a dataset's place, which is written to, read and measured",
        ),
        Option(
            "as_json", "--json", section="Checks", is_flag=True, default=False, help="one JSON object in place of lines"
        ),
    ],
)  # fmt: skip
def doctor_command(device: str, output: str | None, as_json: bool) -> ExitCode:
    """Check this node: packages, CPUs, memory, limits, disks, GPUs, the encoder, and with --output a store.

    A line for each: `ok|warn|FAIL name: value; wanted`. Exit codes: 0 nothing failed, 2 something did; a node without a
    GPU fails but with --device cpu.
    """
    checks = []
    for check in examine(device, output):
        checks.append(check)
        if not as_json:
            click.echo(check.line())
    failed = any(check.status == "FAIL" for check in checks)
    if as_json:
        click.echo(json.dumps({"ok": not failed, "checks": [dataclasses.asdict(check) for check in checks]}))
    return ExitCode.USAGE if failed else ExitCode.OK
