"""Making things in a thread, one ahead of their use."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import torch

from ltx_ray.engine.prefetch import ahead


def test_everything_comes_once_and_in_order():
    assert list(ahead(x for x in range(50))) == list(range(50))
    assert list(ahead(x for x in ())) == []


def test_the_next_is_made_while_one_is_used():
    made = []

    def items():
        for number in range(4):
            made.append(number)
            yield number

    using = ahead(items())
    assert next(using) == 0
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:  # one is ready, the one after it waits for its place
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2]
    assert list(using) == [1, 2, 3]


def test_what_is_raised_comes_after_what_was_made_and_holds_nothing():
    held = []

    def items():
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        yield 1
        raise ValueError(f"of {len(tensor)}")

    using = ahead(items())
    assert next(using) == 1
    gc.disable()  # what lives on until the collector runs keeps the device's memory until then
    try:
        with pytest.raises(ValueError, match="of 3") as caught:
            next(using)
        del caught
        using.close()
        assert held[0]() is None
    finally:
        gc.enable()


def test_the_thread_ends_with_its_reader():
    before, ended = threading.active_count(), []

    def items():
        try:
            while True:
                yield 0
        finally:
            ended.append(True)

    using = ahead(items())
    next(using)
    using.close()
    assert ended == [True] and threading.active_count() == before


def test_inference_mode_goes_with_the_work():
    def items():
        yield torch.is_inference_mode_enabled()

    assert list(ahead(items())) == [True]
