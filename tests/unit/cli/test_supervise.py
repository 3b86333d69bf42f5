"""`ltx-ray supervise`: which ends are final, how long it waits, and how signals go on."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ltx_ray.cli.supervise import LONG_RUN_SECONDS, Supervisor

#: Ends with the codes of a file, one a run.
CODES = "import sys; codes = open(sys.argv[1]).read().split(); open(sys.argv[1], 'w').write(' '.join(codes[1:])); "
CODES += "code = int(codes[0]); code < 0 and __import__('os').kill(__import__('os').getpid(), -code); sys.exit(code)"

pytestmark = pytest.mark.usefixtures("heard_hangups")


class Clock:
    """Time that passes by sleeping."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def read(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.slept.append(seconds)


def supervised(tmp_path, codes, attempts=10, run_seconds=None):
    """Exit code, waits in seconds, messages, and the codes that are left."""
    file = tmp_path / "codes"
    file.write_text(" ".join(map(str, codes)))
    clock, said = Clock(), []
    found = Supervisor(
        [sys.executable, "-c", CODES, str(file)], attempts, 10.0, 60.0, said.append, clock.sleep, clock.read
    )
    if run_seconds is not None:
        run_once, lengths = found._run_once, iter(run_seconds)

        def timed(final):
            clock.now += next(lengths)
            return run_once(final)

        found._run_once = timed
    code = found.run()
    waits = [float(text.partition("again in ")[2].partition(" s")[0]) for text in said if "again in" in text]
    assert sum(clock.slept) == pytest.approx(sum(waits), abs=0.001)
    return code, waits, said, file.read_text().split()


@pytest.mark.parametrize("code", [0, 2, 3])
def test_a_final_code_ends_it(tmp_path, code):
    assert supervised(tmp_path, [code, 9]) == (code, [], [], ["9"])


@pytest.mark.parametrize("code", [1, 4, 77, -9])
def test_any_other_end_is_followed_by_another_run(tmp_path, code):
    found, waits, said, left = supervised(tmp_path, [code, 0, 9])
    assert (found, waits, left) == (0, [10], ["9"])
    shown = 137 if code == -9 else code
    assert said == [f"supervise: {sys.executable} ended with {shown}; again in 10 s (1 of 10)"]


#: Ends with 4, as a run whose limit is used up, and writes a line for each of its runs.
USED_UP = (
    "import sys; from ltx_ray.driver.supervised import say_final; "
    "open(sys.argv[1], 'a').write('run\\n'); say_final('0.11 GPU hours reserved'); sys.exit(4)"
)


def test_a_run_that_says_that_its_end_is_final_is_not_run_again(tmp_path):
    said, runs = [], tmp_path / "runs"
    command = [sys.executable, "-c", USED_UP, str(runs)]
    assert Supervisor(command, 10, 10.0, 60.0, said.append, pytest.fail).run() == 4
    assert runs.read_text() == "run\n"
    assert said == [
        f"supervise: {sys.executable} ended with 4; it is not run again, because of 0.11 GPU hours reserved"
    ]


def test_waits_double_up_to_a_bound_and_attempts_are_counted(tmp_path):
    code, waits, said, left = supervised(tmp_path, [1, 1, 4, 1, 1, 4, 0], attempts=6)
    assert (code, waits, left) == (4, [10, 20, 40, 60, 60], ["0"])
    assert said[-1].endswith("ended with 4, for the 6. time in a row; it is not run again")


def test_a_long_run_begins_anew(tmp_path):
    lengths = [1, 1, LONG_RUN_SECONDS, 1, 1]
    code, waits, _, left = supervised(tmp_path, [1, 1, 1, 1, 1, 0], attempts=3, run_seconds=lengths)
    assert (code, waits, left) == (1, [10, 20, 10, 20], ["0"])


def test_a_command_that_cannot_be_started(tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"missing, cannot be started \(No such file or directory\); legal: a program"):
        Supervisor([missing], 3, 1.0, 1.0, print).run()


def start(*words):
    program = "import sys; from ltx_ray.cli import main; main(sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", program, "supervise", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # The tests may run in a shell's background job, which ignores SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


#: Says that it is there, counts what it is sent, and ends with a code of its own.
HEARS = (
    "import signal, sys, time; heard = []; "
    "[signal.signal(n, lambda n, f: heard.append(n)) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]; "
    "print('up', flush=True); t = time.monotonic()\n"
    "while not heard: time.sleep(0.01)\n"
    "time.sleep(0.2); print(heard, flush=True); sys.exit(int(sys.argv[1]))"
)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 4), (signal.SIGINT, 1), (signal.SIGHUP, 0)])
def test_a_signal_goes_on_once_and_ends_it_with_the_command(number, code):
    process = start("--", sys.executable, "-c", HEARS, str(code))
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, f"[{int(number)}]\n", "")


def test_a_signal_that_kills_the_command_gives_128_and_its_number():
    process = start("--", sys.executable, "-c", "print('up', flush=True); import time; time.sleep(600)")
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143


def test_a_signal_between_two_runs_ends_it_with_4():
    process = start("--first-wait", "600", "--", sys.executable, "-c", "raise SystemExit(1)")
    assert "again in 600 s" in process.stderr.readline()
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 4 and time.monotonic() - began < 30


def test_a_signal_that_comes_while_the_command_starts_goes_on(monkeypatch):
    real = subprocess.Popen

    def popen(command, env):
        process = real(command, stdout=subprocess.PIPE, env=env)
        process.stdout.readline()
        os.kill(os.getpid(), signal.SIGTERM)  # before the supervisor has the process
        return process

    monkeypatch.setattr(subprocess, "Popen", popen)
    assert Supervisor([sys.executable, "-c", HEARS, "4"], 3, 1.0, 1.0, print).run() == 4


def test_options_after_the_command_are_its_own():
    """Also `--lora FILE`, to which `render` alone adds a strength."""
    words = ["--attempts", "7", "--lora", "x", "--help"]
    code = "import sys; print(sys.argv[1:])"
    for begin in ([], ["--"]):
        process = start("--attempts", "1", *begin, sys.executable, "-c", code, *words)
        assert process.communicate(timeout=60)[0] == f"{words}\n"
        assert process.returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attempts", "0", "--", "true"], "error: --attempts: 0, legal: a number from 1"),
        (["--first-wait", "-1", "--", "true"], "error: --first-wait: -1.0, legal: a number from 0"),
        ([], "Error: Missing argument 'COMMAND...'"),
        (["--", "/missing"], "error: supervise: /missing, cannot be started (No such file or directory); legal: "),
    ],
)
def test_wrong_usage_is_exit_2(words, message):
    process = start(*words)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and message in err and "Traceback" not in err
