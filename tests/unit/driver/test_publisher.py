"""Rows are committed in groups on a thread: callbacks run after the commit and in order, and `close` ends it."""

from __future__ import annotations

import threading
import time

import pytest

from ltx_ray.driver.publisher import Publisher


class Log:
    """Gathers what is added, and commits it when its gate is open."""

    def __init__(self) -> None:
        self.added: list[object] = []
        self.commits: list[list[object]] = []
        self.folds = 0
        self.fold_is_due = False
        self.begun, self.go = threading.Event(), threading.Event()
        self.go.set()
        self.error: Exception | None = None

    def commit(self) -> None:
        self.begun.set()
        assert self.go.wait(120)
        if self.error is not None:
            raise self.error
        self.commits.append(self.added)
        self.added = []

    def fold(self) -> None:
        self.folds += 1
        self.fold_is_due = False


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def log():
    return Log()


@pytest.fixture
def publisher(log):
    publisher = Publisher(log, clock=Clock())
    yield publisher
    log.go.set()
    publisher.close(finish=False)


def submit(publisher, row, called=None) -> None:
    publisher.submit(lambda: publisher.log.added.append(row), lambda: called is None or called.append(row))


def test_rows_that_are_few_wait_for_others_and_not_for_long(publisher, log):
    called: list[int] = []
    submit(publisher, 1, called)
    publisher.poll(timeout=1)
    assert (log.commits, publisher.pending, publisher.committing) == ([], 1, False)
    submit(publisher, 2, called)
    publisher.clock.now = 2.0
    publisher.poll(timeout=120)
    assert (log.commits, called, publisher.pending) == ([[1, 2]], [1, 2], 0)


def test_many_rows_are_committed_at_once(publisher, log):
    for n in range(64):
        submit(publisher, n)
    publisher.poll(timeout=120)
    assert log.commits == [list(range(64))]


def test_a_row_counts_only_after_its_commit(publisher, log):
    called: list[int] = []
    log.go.clear()
    submit(publisher, 1, called)
    publisher.poll(flush=True)
    assert log.begun.wait(120)
    submit(publisher, 2, called)
    publisher.poll(flush=True)
    assert (called, publisher.pending, publisher.committing) == ([], 2, True)
    log.go.set()
    while publisher.pending:
        publisher.poll(timeout=120, flush=True)
    assert (called, log.commits) == ([1, 2], [[1], [2]])


def test_callbacks_run_on_the_callers_thread_and_rows_are_made_on_another(publisher):
    threads: list[int] = []
    publisher.submit(lambda: threads.append(threading.get_ident()), lambda: threads.append(threading.get_ident()))
    publisher.poll(timeout=120, flush=True)
    assert threads[0] != threads[1] == threading.get_ident()


def test_the_error_of_a_commit_is_raised_and_its_callbacks_do_not_run(publisher, log):
    called: list[str] = []
    log.error = OSError("the store is gone")
    submit(publisher, "bad", called)
    with pytest.raises(OSError, match="the store is gone"):
        publisher.poll(timeout=120, flush=True)
    assert called == []


def test_a_callback_may_submit_another_row(publisher, log):
    publisher.submit(lambda: None, lambda: submit(publisher, "again"))
    while publisher.pending:
        publisher.poll(timeout=120, flush=True)
    assert log.commits == [[], ["again"]]


def test_polling_nothing_does_not_wait(publisher):
    publisher.poll(timeout=60, flush=True)


def test_what_is_due_is_folded_after_a_commit(publisher, log):
    log.fold_is_due = True
    submit(publisher, 1)
    publisher.poll(timeout=120, flush=True)
    publisher.close(finish=True)
    assert log.folds == 1


def test_the_error_of_a_fold_is_raised(publisher, log):
    def fold() -> None:
        raise OSError("full")

    log.fold, log.fold_is_due = fold, True
    submit(publisher, 1)
    with pytest.raises(OSError, match="full"):
        for _ in range(12_000):
            publisher.poll(timeout=120, flush=True)
            time.sleep(0.01)


def test_a_fold_that_fails_at_the_end_is_left_to_what_folds_then(log):
    publisher = Publisher(log)

    def fold() -> None:
        raise OSError("full")

    log.fold, log.fold_is_due = fold, True
    submit(publisher, 1)
    publisher.close(finish=True)
    publisher.poll()
    assert log.commits == [[1]]


def test_closing_with_finish_commits_everything(publisher, log):
    called: list[int] = []
    for n in range(2500):
        submit(publisher, n, called)
    publisher.close(finish=True)
    assert [row for rows in log.commits for row in rows] == called == list(range(2500))


def test_closing_without_finish_drops_rows_whose_commit_has_not_begun(publisher, log):
    called: list[int] = []
    log.go.clear()
    submit(publisher, 1, called)
    publisher.poll(flush=True)
    submit(publisher, 2, called)
    assert log.begun.wait(120)
    closing = threading.Thread(target=publisher.close, args=(False,))
    closing.start()
    closing.join(0.05)
    assert closing.is_alive(), "close waits for a commit that has begun"
    log.go.set()
    closing.join(120)
    assert not closing.is_alive() and log.commits == [[1]] and called == []


def test_closing_with_finish_raises_the_error_of_a_commit(publisher, log):
    log.error = OSError("full")
    submit(publisher, 1)
    with pytest.raises(OSError, match="full"):
        publisher.close(finish=True)
