"""Writes beside the loop: what follows them comes in order, what they raise is raised, and an end is an end."""

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


def test_what_follows_comes_in_the_order_of_the_writes(publisher):
    followed, slow, quick = [], Gate(), threading.Event()
    publisher.submit(slow, lambda: followed.append("slow"))
    publisher.submit(quick.set, lambda: followed.append("quick"))
    assert quick.wait(10)
    publisher.poll()
    assert (followed, publisher.pending) == ([], 2)
    slow.go.set()
    publisher.poll(timeout=10)
    publisher.poll(timeout=10)
    assert (followed, publisher.pending) == (["slow", "quick"], 0)


def test_what_follows_runs_on_the_callers_thread(publisher):
    threads = []
    publisher.submit(lambda: threads.append(threading.get_ident()), lambda: threads.append(threading.get_ident()))
    publisher.poll(timeout=10)
    assert threads[0] != threads[1] == threading.get_ident()


def test_a_write_that_fails_is_raised_and_nothing_follows_it(publisher):
    followed, bad = [], Gate(OSError("the store is gone"))
    publisher.submit(bad, lambda: followed.append("bad"))
    publisher.submit(lambda: None, lambda: followed.append("good"))
    bad.go.set()
    with pytest.raises(OSError, match="the store is gone"):
        publisher.poll(timeout=10)
    publisher.poll(timeout=10)
    assert followed == ["good"]


def test_what_follows_may_write_again(publisher):
    followed = []
    publisher.submit(lambda: None, lambda: publisher.submit(lambda: None, lambda: followed.append("again")))
    publisher.poll(timeout=10)
    publisher.poll(timeout=10)
    assert followed == ["again"]


def test_polling_nothing_does_not_wait(publisher):
    publisher.poll(timeout=60)


def test_closing_with_finish_writes_everything(publisher):
    written, followed = [], []
    for n in range(20):
        publisher.submit(lambda n=n: written.append(n), lambda n=n: followed.append(n))
    publisher.close(finish=True)
    assert sorted(written) == followed == list(range(20))


def test_closing_without_finish_leaves_what_has_not_begun():
    publisher, gates, written = Publisher(threads=1), Gate(), []
    publisher.submit(gates, lambda: written.append("followed"))
    publisher.submit(lambda: written.append("late"), lambda: written.append("followed"))
    assert gates.begun.wait(10)
    closing = threading.Thread(target=publisher.close, args=(False,))
    closing.start()
    closing.join(0.05)
    assert closing.is_alive(), "a write that has begun is waited for: half a file is worth nothing"
    gates.go.set()
    closing.join(10)
    assert not closing.is_alive() and written == []


def test_closing_with_finish_raises_what_a_write_raised():
    publisher, bad = Publisher(threads=1), Gate(OSError("full"))
    publisher.submit(bad, lambda: None)
    bad.go.set()
    with pytest.raises(OSError, match="full"):
        publisher.close(finish=True)
    publisher.close(finish=False)
