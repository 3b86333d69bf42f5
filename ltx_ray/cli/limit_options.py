"""Options about when a run gives up: on a row, on a call, on a manifest and on itself."""

from __future__ import annotations

from ltx_ray.cli.parameters import AtLeast, Fraction, Option
from ltx_ray.config import RunLimits
from ltx_ray.run import Options

#: Their section of the help page.
_LIMITS = "Limits"

LIMIT_OPTIONS = (
    Option(
        "--max-attempts",
        section=_LIMITS,
        metavar="N",
        type=AtLeast(1),
        default=RunLimits.max_attempts,
        help="attempts at a row",
    ),
    Option(
        "--queue-depth",
        section=_LIMITS,
        metavar="N",
        type=AtLeast(1),
        default=RunLimits.queue_depth,
        help="clips that wait before a stage, for each of its replicas",
    ),
    Option(
        "--start-timeout",
        section=_LIMITS,
        metavar="SECONDS",
        type=AtLeast(1.0),
        default=RunLimits.start_timeout,
        help="time for a replica to start without any of the model's bytes arriving",
    ),
    Option(
        "--load-concurrency",
        section=_LIMITS,
        metavar="N",
        type=AtLeast(1),
        help="replicas that load the model at once [as many as do not slow each other down]",
    ),
    Option(
        "--call-timeout",
        section=_LIMITS,
        metavar="SECONDS",
        type=AtLeast(1.0),
        default=RunLimits.call_timeout,
        help="time for one stage of a clip",
    ),
    Option(
        "--grace",
        section=_LIMITS,
        metavar="SECONDS",
        type=AtLeast(0.0),
        default=RunLimits.grace,
        help="time for decoding when the run is told to stop",
    ),
    Option(
        "--max-failed-fraction",
        section=_LIMITS,
        metavar="X",
        type=Fraction(),
        help="stop when more than this part of the last 500 rows has failed [0.5 of at least 100]",
    ),
    Option(
        "--max-gpu-hours",
        section=_LIMITS,
        metavar="X",
        type=AtLeast(0.0),
        help="drain once the runs into this output have reserved GPUs for X hours",
    ),
    Option(
        "--allow-illegal",
        section=_LIMITS,
        is_flag=True,
        default=Options.allow_illegal,
        help="render a manifest of whose first 100,000 rows more than a fifth are illegal",
    ),
    Option(
        "--exit-zero-on-failed-rows",
        section=_LIMITS,
        is_flag=True,
        default=Options.exit_zero_on_failed_rows,
        help="end with 0 instead of 3 when rows have failed and none is left, for schedulers that retry on 3",
    ),
)
