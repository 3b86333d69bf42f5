"""Jobs of a Ray cluster: submit one once, and follow it to its end."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from ltx_ray.dataset import layout
from ltx_ray.dataset.clip_rate import UNFINISHED, rate_text
from ltx_ray.dataset.report_text import finite
from ltx_ray.dataset.run_summary import rows_text
from ltx_ray.run import ExitCode
from ltx_ray.storage.store import RETRY_SECONDS, Store

#: Seconds between two status requests while a job is followed: at first, and at most.
POLL_SECONDS = 0.5, 5.0
#: Seconds for which a silent dashboard is tolerated, as when the head is being replaced.
SILENCE_SECONDS = 600.0
#: Seconds between two lines that say how far a job is, and for which its output is asked.
PROGRESS_SECONDS, _OUTPUT_SECONDS = 60.0, 2.0
#: Seconds that a wait sleeps at once. A signal ends the wait after at most so long.
_SLICE_SECONDS = 0.5
#: How many jobs of one submission may fail.
ATTEMPTS = 10
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


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
        raise ConnectionError(
            f"{text}; legal: the cluster's token in RAY_AUTH_TOKEN, or in ~/.ray/auth_token with RAY_AUTH_MODE=token"
        ) from None


def _status(client: Any, job: str) -> str | None:
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; None when the cluster has no such job."""
    try:
        return str(client.get_job_status(job).value)
    except RuntimeError as error:
        if "does not exist" in str(error):
            return None
        raise


def submit_once(
    client: Any, job: str, entrypoint: str, metadata: Mapping[str, str], attempts: int = ATTEMPTS
) -> tuple[str, str]:
    """Ensure that exactly one job of this submission is pending, running or succeeded.

    Returns the job's id and a phrase for what was found or done. The first job has the id `job`; one that failed
    or was stopped is followed by `job-2`, then `job-3`, and its record stays. The cluster accepts an id once, so
    only one of several concurrent callers submits. Raises ValueError once `attempts` jobs have failed; those that were
    stopped do not count.
    """
    name, previous, failed = job, None, 0
    for number in itertools.count(2):
        status = _status(client, name)
        if status in ("PENDING", "RUNNING", "SUCCEEDED"):
            return name, f"already there ({status.lower()})"
        if status is None:
            break
        failed += status == "FAILED"
        last, name, previous = name, f"{job}-{number}", status
        if failed >= attempts:
            raise ValueError(
                f"--attempts: {attempts}, and {failed} jobs of this submission have failed, {last} the last of them; "
                f"legal: a larger number, once what the job's log names is mended"
            )
    try:
        client.submit_job(submission_id=name, entrypoint=entrypoint, metadata=dict(metadata))
    except RuntimeError as error:
        if "already exists" in str(error):
            return name, "already there (submitted by another caller just now)"
        raise
    return name, "submitted" if previous is None else f"submitted again (previous job: {previous.lower()})"


class _Heard:
    """Context in which signals are collected in `numbers`, instead of what they would do."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Heard:
        heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.numbers.append(number)


def read_record(output: str, seconds: float = RETRY_SECONDS) -> dict[str, Any]:
    """`run.json` of the newest run into `output`; empty when this machine cannot read it, tried for so many seconds."""
    try:
        record = json.loads(Store(output, seconds).read_bytes(layout.RUN_RECORD))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def run_progress(output: str) -> str:
    """How far the run into `output` is, such as `40 of 120 rows done, 1 failed, 118 clips/h`; "" when none goes on."""
    record = read_record(output, _OUTPUT_SECONDS)
    if record.get("state") not in UNFINISHED:
        return ""
    summary = record.get("summary")
    rate = finite(summary.get("clips_per_hour")) if isinstance(summary, dict) else None
    return rows_text(record) + (f", {rate_text(rate)}" if rate else "")


def follow(client: Any, job: str, drain: bool, say: Callable[[str], None], output: str | None = None) -> int:
    """Follow a job to its end, and say what becomes of it; with its `output`, also how far it is, now and then.

    Returns the exit code of the job's command (0, 3 …), or 1 when there is none. SIGTERM, SIGINT and SIGHUP end the
    wait with 128 + the signal, and the job goes on; with `drain` the first one stops the job and the wait goes on, to
    4 for a job that was stopped so. Raises ConnectionError after SILENCE_SECONDS without an answer.
    """
    with _Heard() as heard:
        info = _last_info(client, job, drain, say, heard, output)
    if info is None:
        say(f"{job}: goes on, and is followed no longer")
        return 128 + heard.numbers[-1]
    status = info.status.value
    if status == "SUCCEEDED":
        return ExitCode.OK
    log = client.get_job_logs(job).splitlines()[-20:]
    print("\n".join([*log, f"{job}: {info.message or 'no message'}"]), file=sys.stderr)
    if status == "STOPPED" and heard.numbers:
        return ExitCode.DRAINED
    # The exit code is None when the command never started, and negative when a signal ended it.
    code = info.driver_exit_code or 0
    return int(code) if code > 0 else ExitCode.ERROR


def _last_info(
    client: Any, job: str, drain: bool, say: Callable[[str], None], heard: _Heard, output: str | None
) -> Any:
    """What the cluster says of a job that has ended; None when a signal has ended the wait."""
    shown, pause, stops, told = "", POLL_SECONDS[0], 0, time.monotonic()
    silent_since: float | None = None
    while True:
        if len(heard.numbers) > drain:
            return None
        try:
            if heard.numbers and not stops:
                client.stop_job(job)
                stops = 1
                say(f"{job}: told to stop; it drains, and the same command goes on with it later")
            info = client.get_job_info(job)
            silent_since = None
        except (OSError, RuntimeError) as error:
            if "does not exist" in str(error):
                raise
            if silent_since is None:
                silent_since = time.monotonic()
                say(f"{job}: the cluster does not answer, and is asked again for {SILENCE_SECONDS:.0f} s")
            if time.monotonic() - silent_since > SILENCE_SECONDS:
                raise ConnectionError(f"no answer for {SILENCE_SECONDS:.0f} s: {error}") from error
            _sleep(POLL_SECONDS[1], heard)
            continue
        if info.status.value != shown:
            shown = info.status.value
            say(f"{job}: {shown.lower()}")
        if info.status.is_terminal():
            return info
        if output is not None and time.monotonic() - told >= PROGRESS_SECONDS:
            told = time.monotonic()
            say(f"{job}: {shown.lower()}" + (f", {far}" if (far := run_progress(output)) else ""))
        _sleep(pause, heard)
        pause = min(1.2 * pause, POLL_SECONDS[1])


def _sleep(seconds: float, heard: _Heard) -> None:
    """Sleep, until a signal comes that has not been heard yet."""
    end, known = time.monotonic() + seconds, len(heard.numbers)
    while len(heard.numbers) == known and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _SLICE_SECONDS))
