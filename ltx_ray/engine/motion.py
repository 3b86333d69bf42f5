"""Whether a clip's pictures move, and where they are cut. No torch.

Motion is judged by the means of blocks of pixels. They do not see noise, dither and seams of one code, which the
decoder and its rounding add to a still picture, and they do see a small object. docs/dataset.md gives the rules.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

#: Pixels on a side of a block.
BLOCK = 8
#: A block has moved when its mean luma differs by this many codes from that of so many frames before: the frames of a
#: latent frame.
_MOVED_CODES, _MOVED_FRAMES = 2.0, 8
#: A stretch is still while the mean luma of every block is within this many codes of the stretch's first frame.
_STILL_CODES = 4.0
#: A cut changes blocks by so many codes on average, by so many times as much as the two frames before and after it, and
#: for longer than a flash lasts, in frames.
_CUT_CODES, _CUT_RATIO, _FLASH_FRAMES = 10.0, 3.0, 6


@dataclass
class MotionCheck:
    """Compares frames, as the means (rows, columns) of their blocks, with earlier ones."""

    frames: int = 0
    #: Of every frame but the first, the share of blocks that have moved.
    moved: list[float] = field(default_factory=list)
    #: Frames of the longest still stretch.
    longest: int = 0
    _stretch: int = 0
    _stretch_first: np.ndarray | None = None
    _recent: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=_MOVED_FRAMES))

    def add(self, blocks: np.ndarray) -> None:
        if self._recent:
            # The first frames are compared with the first of all.
            self.moved.append(float(np.mean(np.abs(blocks - self._recent[0]) >= _MOVED_CODES)))
        self._recent.append(blocks)
        if self._stretch_first is None or np.abs(blocks - self._stretch_first).max() >= _STILL_CODES:
            self._stretch, self._stretch_first = 0, blocks
        self._stretch += 1
        self.longest = max(self.longest, self._stretch)
        self.frames += 1


@dataclass
class CutCheck:
    """Finds hard cuts between frames, given as the means (rows, columns) of their blocks."""

    #: Of every frame but the first, its difference from the one before.
    _changes: list[float] = field(default_factory=list)
    #: All frames so far, rounded to codes: a fiftieth of their bytes.
    _pictures: list[np.ndarray] = field(default_factory=list)

    def add(self, blocks: np.ndarray) -> None:
        self._pictures.append(np.rint(blocks).astype(np.int16))
        if len(self._pictures) > 1:
            self._changes.append(self._difference(-2, -1))

    def count(self) -> int:
        """The number of cuts so far."""
        return sum(self._is_cut(after) for after in range(1, len(self._pictures)))

    def _is_cut(self, after: int) -> bool:
        """Whether there is a cut before frame `after`."""
        change = self._changes[after - 1]
        if change < _CUT_CODES:
            return False
        around = self._changes[max(after - 3, 0) : after - 1] + self._changes[after : after + 2]
        if around and change < _CUT_RATIO * np.mean(around):
            return False
        # A flash ends with the picture that it began with.
        before = range(max(after - 1 - _FLASH_FRAMES, 0), after)
        following = range(after, min(after + _FLASH_FRAMES + 1, len(self._pictures)))
        return all(self._difference(a, b) >= change / 2 for a in before for b in following)

    def _difference(self, a: int, b: int) -> float:
        """How much two frames differ, in codes, on average over the blocks."""
        return float(np.mean(np.abs(self._pictures[a] - self._pictures[b])))
