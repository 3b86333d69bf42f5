"""A generator in a thread of its own, one item ahead of its consumer."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import torch

from ltx_ray.engine.prefetch import prefetch


def test_every_item_comes_once_and_in_order():
    assert list(prefetch(x for x in range(50))) == list(range(50))
    assert list(prefetch(x for x in ())) == []


def test_the_next_item_is_produced_while_one_is_used():
    produced = []

    def items():
        for number in range(4):
            produced.append(number)
            yield number

    consumer = prefetch(items())
    assert next(consumer) == 0
    deadline = time.monotonic() + 120
    while len(produced) < 3 and time.monotonic() < deadline:  # One is ready, and the one after it waits.
        time.sleep(0.01)
    time.sleep(0.05)
    assert produced == [0, 1, 2]
    assert list(consumer) == [1, 2, 3]


def test_an_error_comes_after_the_items_before_it_and_keeps_no_tensor():
    alive = []

    def items():
        tensor = torch.zeros(3)
        alive.append(weakref.ref(tensor))
        yield 1
        raise ValueError(f"of {len(tensor)}")

    consumer = prefetch(items())
    assert next(consumer) == 1
    gc.disable()  # A reference cycle would keep device memory until the collector runs.
    try:
        with pytest.raises(ValueError, match="of 3") as caught:
            next(consumer)
        del caught
        consumer.close()
        assert alive[0]() is None
    finally:
        gc.enable()


def test_the_thread_ends_with_its_consumer():
    before, ended = threading.active_count(), []

    def items():
        try:
            while True:
                yield 0
        finally:
            ended.append(True)

    consumer = prefetch(items())
    next(consumer)
    consumer.close()
    assert ended == [True] and threading.active_count() == before


def test_items_are_produced_in_inference_mode():
    def items():
        yield torch.is_inference_mode_enabled()

    assert list(prefetch(items())) == [True]
