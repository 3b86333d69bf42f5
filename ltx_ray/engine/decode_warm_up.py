"""What a decoder does while it waits for its first clip: one of the same size, of nothing, that goes nowhere.

The first clip on a card is slower than others by the kernels that are compiled, the libraries that are loaded and the
memory that is taken for it. Nothing here draws random numbers, and a decoder's results do not depend on what it has
decoded before.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator

import torch

_log = logging.getLogger(__name__)


class WarmUp:
    """Takes the steps of a warm-up one after the other in a thread of its own.

    `steps` yields between two steps, at each of which the warm-up can be stopped. An error ends the warm-up and is
    logged: a clip that meets it again reports it. `finish` is called in the end, whatever happened.
    """

    def __init__(self, steps: Generator[None, None, None], finish: Callable[[], None]):
        self._steps, self._finish = steps, finish
        self._stop = threading.Event()
        #: Seconds that it took, and whether it was stopped before its last step, once it is over.
        self.seconds, self.cut_short = 0.0, False
        self._thread = threading.Thread(target=self._run, name="warm-up", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Give way to a clip. Returns once the step under way is done."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            # Inference mode belongs to a thread, not to a process.
            with torch.inference_mode(), contextlib.closing(self._steps) as steps:
                for _ in steps:
                    if self._stop.is_set():
                        self.cut_short = True
                        break
        except Exception as error:
            self._log_error(error)
        try:
            self._finish()
        except Exception as error:  # The device has failed. The next clip reports that.
            self._log_error(error)
        self.seconds = time.perf_counter() - began

    def _log_error(self, error: Exception) -> None:
        _log.warning("the decoder is not warmed up: %s: %s", type(error).__name__, error)
