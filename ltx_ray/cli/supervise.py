"""`ltx-ray supervise`: runs a command again until it has finished."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import click

from ltx_ray.cli.parameters import Argument, AtLeast, Command, Option
from ltx_ray.driver.supervised import VARIABLE
from ltx_ray.run import ExitCode
from ltx_ray.storage.reasons import reason

#: Exit codes that another run would not change.
_FINAL = (ExitCode.OK, ExitCode.USAGE, ExitCode.FAILED_ROWS)
#: A run that lasted so long did some work: the waits and the count of attempts begin anew.
LONG_RUN_SECONDS = 1800.0
#: Seconds that a wait sleeps at once. A signal ends the wait after at most so long.
_SLICE_SECONDS = 0.5
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Supervisor:
    """Runs a command until its end is final, it is told to stop, or it has ended early too often.

    An end is final by its exit code, or because the command has said so (`driver.supervised`).

    Signals go on to the command, each of them once. `sleep` takes seconds, and `clock` returns seconds that only grow.
    """

    def __init__(
        self,
        command: Sequence[str],
        attempts: int,
        first_wait: float,
        longest_wait: float,
        say: Callable[[str], None],
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._command = list(command)
        self._attempts = attempts
        self._first_wait = first_wait
        self._longest_wait = longest_wait
        self.say = say
        self._sleep = sleep
        self._clock = clock
        self._heard: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        #: Signals that came while the process was being started.
        self._pending: list[int] = []

    def run(self) -> int:
        """The exit code: the command's, 128 + the signal that ended it, or 4 when stopped between two runs.

        Raises ValueError when the command cannot be started.
        """
        # A signal that the caller has ignored, as nohup does with SIGHUP, is ignored by the command too.
        heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before: dict[signal.Signals, Any] = {number: signal.signal(number, self._handle) for number in heard}
        try:
            with tempfile.TemporaryDirectory(prefix="ltx-ray-supervise-") as folder:
                return self._run(Path(folder, "final"))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self, final: Path) -> int:
        """`final`: the file in which a run says that its end is final, and why."""
        early, name = 0, self._command[0]
        while not self._heard:
            began = self._clock()
            code = self._run_once(final)
            if self._heard or code in _FINAL:
                return code
            if final.exists():
                why = final.read_text(encoding="utf-8")
                self.say(f"supervise: {name} ended with {code}; it is not run again, because of {why}")
                return code
            early = 1 if self._clock() - began >= LONG_RUN_SECONDS else early + 1
            if early >= self._attempts:
                self.say(f"supervise: {name} ended with {code}, for the {early}. time in a row; it is not run again")
                return code
            # The exponent is bounded, because a float is.
            seconds = min(self._first_wait * 2.0 ** min(early - 1, 60), self._longest_wait)
            self.say(f"supervise: {name} ended with {code}; again in {seconds:.0f} s ({early} of {self._attempts})")
            self._wait(seconds)
        return ExitCode.DRAINED

    def _run_once(self, final: Path) -> int:
        try:
            self._process = subprocess.Popen(self._command, env={**os.environ, VARIABLE: str(final)})
        except OSError as error:
            program, why = self._command[0], reason(error, place=False)
            raise ValueError(
                f"supervise: {program}, cannot be started ({why}); legal: a program and its arguments"
            ) from None
        while self._pending:
            self._process.send_signal(self._pending.pop(0))
        code = self._process.wait()
        self._process = None
        return code if code >= 0 else 128 - code

    def _wait(self, seconds: float) -> None:
        end = self._clock() + seconds
        while not self._heard and (left := end - self._clock()) > 0:
            self._sleep(min(left, _SLICE_SECONDS))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._heard.append(number)
        if self._process is None:
            self._pending.append(number)
        else:
            self._process.send_signal(number)


@click.command(
    name="supervise",
    cls=Command,
    short_help="run a command again until it has finished",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    params=[
        Argument("command", "a command and its arguments, after --", click.UNPROCESSED, nargs=-1, required=True),
        Option(
            "--attempts", section="Runs", metavar="N", type=AtLeast(1), default=10,
            help="runs in a row that end within half an hour, until it gives up",
        ),
        Option(
            "--first-wait", section="Runs", metavar="SECONDS", type=AtLeast(0.0), default=10.0,
            help="wait before the second run; each later one is twice as long",
        ),
        Option(
            "--longest-wait", section="Runs", metavar="SECONDS", type=AtLeast(0.0), default=600.0,
            help="the longest wait",
        ),
    ],
)  # fmt: skip
def supervise_command(command: tuple[str, ...], attempts: int, first_wait: float, longest_wait: float) -> int:
    """Run COMMAND, such as `ltx-ray render …`, and run it again when it ends before its work is done.

    Exit codes 0, 2 and 3 of COMMAND are final, and become those of this command; so is 4 of a run that has used up its
    --max-gpu-hours. After 1, any other 4, any other code and a signal, COMMAND is run again. SIGTERM, SIGINT and SIGHUP
    are passed on, and end this command with COMMAND; the exit code is COMMAND's then too.
    """

    def say(message: str) -> None:
        click.echo(message, err=True)

    return Supervisor(command, attempts, first_wait, longest_wait, say).run()
