"""A generator run in a thread of its own, ahead of its consumer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
#: Seconds between two looks of a waiting producer at whether its consumer has stopped.
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class _Failed:
    error: BaseException


class _End:
    pass


def prefetch(items: Generator[T, None, None], depth: int = 1) -> Iterator[T]:
    """The items of a generator, of which a thread has up to `depth` ready. Raises what producing raised.

    The thread ends with this iterator, also when that is closed early.
    """
    ready: queue.Queue[T | _Failed | _End] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: T | _Failed | _End) -> bool:
        """Wait for the consumer to take the item before; False when it has stopped."""
        while not stop.is_set():
            try:
                ready.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            # Inference mode belongs to a thread, not to a process.
            with torch.inference_mode():
                for item in items:
                    if not put(item):
                        break
                    del item
                items.close()
        except BaseException as error:
            put(_Failed(error))
        else:
            put(_End())

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            if isinstance(item, _Failed):
                error = item.error
                # Nothing here may outlive the error, whose frames hold tensors.
                del item
                try:
                    raise error
                finally:
                    del error
            yield item
    finally:
        stop.set()
        thread.join()
