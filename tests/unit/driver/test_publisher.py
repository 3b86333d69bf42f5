"""Writes on threads: callbacks run in order, exceptions are raised, and `close` ends them."""

from __future__ import annotations

import threading

import pytest

from ltx_ray.driver.publisher import Publisher


@pytest.fixture
def publisher():
    publisher = Publisher(threads=2)
    yield publisher
    publisher.close(finish=False)


class Gate:
    """A write that waits until it is told to go on."""

    def __init__(self, error: Exception | None = None):
        self.begun, self.go, self.error = threading.Event(), threading.Event(), error

    def __call__(self) -> None:
        self.begun.set()
        assert self.go.wait(10)
        if self.error is not None:
            raise self.error


def test_callbacks_run_in_the_order_of_the_writes(publisher):
    called, slow, quick = [], Gate(), threading.Event()
    publisher.submit(slow, lambda: called.append("slow"))
    publisher.submit(quick.set, lambda: called.append("quick"))
    assert quick.wait(10)
    publisher.poll()
    assert (called, publisher.pending) == ([], 2)
    slow.go.set()
    publisher.poll(timeout=10)
    publisher.poll(timeout=10)
    assert (called, publisher.pending) == (["slow", "quick"], 0)


def test_callbacks_run_on_the_callers_thread(publisher):
    threads = []
    publisher.submit(lambda: threads.append(threading.get_ident()), lambda: threads.append(threading.get_ident()))
    publisher.poll(timeout=10)
    assert threads[0] != threads[1] == threading.get_ident()


def test_the_error_of_a_write_is_raised_and_its_callback_does_not_run(publisher):
    called, bad = [], Gate(OSError("the store is gone"))
    publisher.submit(bad, lambda: called.append("bad"))
    publisher.submit(lambda: None, lambda: called.append("good"))
    bad.go.set()
    with pytest.raises(OSError, match="the store is gone"):
        publisher.poll(timeout=10)
    publisher.poll(timeout=10)
    assert called == ["good"]


def test_a_callback_may_submit_another_write(publisher):
    called = []
    publisher.submit(lambda: None, lambda: publisher.submit(lambda: None, lambda: called.append("again")))
    publisher.poll(timeout=10)
    publisher.poll(timeout=10)
    assert called == ["again"]


def test_polling_nothing_does_not_wait(publisher):
    publisher.poll(timeout=60)


def test_closing_with_finish_writes_everything(publisher):
    written, called = [], []
    for n in range(20):
        publisher.submit(lambda n=n: written.append(n), lambda n=n: called.append(n))
    publisher.close(finish=True)
    assert sorted(written) == called == list(range(20))


def test_closing_without_finish_drops_writes_that_have_not_begun():
    publisher, gate, written = Publisher(threads=1), Gate(), []
    publisher.submit(gate, lambda: written.append("callback"))
    publisher.submit(lambda: written.append("late"), lambda: written.append("callback"))
    assert gate.begun.wait(10)
    closing = threading.Thread(target=publisher.close, args=(False,))
    closing.start()
    closing.join(0.05)
    assert closing.is_alive(), "close waits for a write that has begun, so that no file is half-written"
    gate.go.set()
    closing.join(10)
    assert not closing.is_alive() and written == []


def test_closing_with_finish_raises_the_error_of_a_write():
    publisher, bad = Publisher(threads=1), Gate(OSError("full"))
    publisher.submit(bad, lambda: None)
    bad.go.set()
    with pytest.raises(OSError, match="full"):
        publisher.close(finish=True)
    publisher.close(finish=False)
