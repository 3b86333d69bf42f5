"""Two halves of a work side by side: one thread makes what another one uses."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")
_END = object()
#: How often a thread that waits looks whether anybody still wants what it has, in seconds.
_LOOK = 0.1


class _Failed:
    def __init__(self, error: BaseException):
        self.error = error


def ahead(items: Generator[T, None, None]) -> Iterator[T]:
    """`items`, made in a thread of their own and one ahead of the one in use; raises what making them raised.

    The thread ends with this iterator, also when that is closed before its end.
    """
    ready: queue.Queue = queue.Queue(maxsize=1)
    stop = threading.Event()

    def hand_over(item: object) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=_LOOK)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            # the mode belongs to a thread, not to a process
            with torch.inference_mode():
                for item in items:
                    if not hand_over(item):
                        break
                    del item
                items.close()
        except BaseException as error:
            hand_over(_Failed(error))
        else:
            hand_over(_END)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Failed):
                error = item.error
                # what the error holds (the tensors of all its frames) must go with it
                del item
                try:
                    raise error
                finally:
                    del error
            yield item
    finally:
        stop.set()
        thread.join()
