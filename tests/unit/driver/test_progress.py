"""The progress line: its text on a terminal and in a log, its rate and the time that is left."""

from __future__ import annotations

import io

import pytest

from ltx_ray.driver import progress as progress_module
from ltx_ray.driver.progress import Progress, duration
from tests.support import simulated_runs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """`clock[0]` is the time."""
    now = [1000.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 s"), (59.9, "59 s"), (60, "1 min 00 s"), (185, "3 min 05 s"), (3599, "59 min 59 s"),
        (3600, "1 h 00 min"), (8040, "2 h 14 min"), (86_400, "1 d 0 h"), (3.2 * 86_400, "3 d 4 h"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_log_gets_few_whole_lines(clock):
    out = io.StringIO()
    progress = Progress(out)
    for _ in range(100):
        clock[0] += 1
        progress.update(0, 0, None, "text 1")
    lines = out.getvalue().splitlines()
    assert 3 <= len(lines) <= 5
    assert lines[0] == "0/? clips | 1 s elapsed | text 1"
    assert "\r" not in out.getvalue()


def test_a_terminal_gets_one_line_that_is_rewritten(clock):
    out = Terminal()
    progress = Progress(out)
    progress.update(0, 0, 10, "a long thing to do", force=True)
    clock[0] += 0.1
    progress.update(1, 0, 10, "")
    assert out.getvalue().count("\r") == 1, "at most twice a second"
    clock[0] += 1
    progress.update(2, 0, 10, "")
    progress.say("a message")
    text = out.getvalue()
    assert text.count("\n") == 1
    shown = [line for line in text.split("\r") if line.strip()]
    assert len(shown[1]) >= len(shown[0]), "a shorter line must cover a longer one"
    assert shown[-1] == "a message\n"


def test_failures_are_counted(clock):
    out = io.StringIO()
    Progress(out).update(3, 2, 9, "", force=True)
    assert out.getvalue().startswith("5/9 clips | 2 failed | ")


def test_the_rate_and_the_time_that_is_left_stand_in_every_line(clock):
    out = io.StringIO()
    progress = Progress(out)
    clock[0] += 150
    progress.update(6, 0, 11, "decode 1", rate=1763.4, left=50.9)
    assert out.getvalue() == "6/11 clips | 1,763 clips/h | 50 s left | 2 min 30 s elapsed | decode 1\n"


@pytest.mark.parametrize(
    "rate, words", [(27_360.0, "27,360 clips/h"), (3600.0, "3,600 clips/h"), (0.42, "0.42 clips/h")]
)
def test_the_rate_is_always_clips_an_hour(clock, rate, words):
    out = io.StringIO()
    Progress(out).update(2, 0, 9, "", force=True, rate=rate)
    assert f"| {words} |" in out.getvalue() and "left" not in out.getvalue()


def test_what_is_not_known_is_left_out(clock):
    out = io.StringIO()
    Progress(out).update(5_000_003, 0, None, "", force=True)
    assert out.getvalue() == "5000003/? clips | 0 s elapsed\n"


def test_a_terminal_that_was_closed_stops_no_run():
    """As when `tee` ends with the Ctrl-C that drains the run."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    progress = Progress(Closed())
    progress.say("draining: SIGINT")
    progress.update(1, 0, 2, "", force=True)


def test_a_run_says_from_the_beginning_how_many_rows_there_are(tmp_path):
    driver, _ = simulated_runs.run(tmp_path, simulated_runs.rows(3))
    driver.progress = Progress(io.StringIO())
    driver.tracker.plan.manifest_rows = 3
    driver._show()
    assert driver.progress._stream.getvalue().startswith("0/3 clips | ")


def test_a_long_command_says_how_far_it_is_and_a_short_one_nothing(clock):
    out = io.StringIO()
    progress = Progress(out)
    clock[0] += 29
    progress.count(5, 100, "rows checked")
    assert out.getvalue() == ""
    clock[0] += 31
    for _ in range(9):
        progress.count(25, 100, "rows checked")
    assert out.getvalue() == "25 of 100 rows checked | 3 min 00 s left | 1 min 00 s elapsed\n"
    clock[0] += 40
    progress.count(12_000, 12_000, "rows checked")
    assert out.getvalue().endswith("\n12,000 of 12,000 rows checked | 1 min 40 s elapsed\n")


def test_its_line_on_a_terminal_is_gone_before_something_else_is_printed(clock):
    out = Terminal()
    progress = Progress(out)
    clock[0] += 1
    progress.count(1, 2, "rows checked")
    progress.clear()
    progress.clear()
    line = "1 of 2 rows checked | 1 s left | 1 s elapsed"
    assert out.getvalue() == f"\r{line}\r{' ' * len(line)}\r"
