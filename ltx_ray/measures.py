"""What is measured of a clip's pictures and sound, and the flags that follow. docs/dataset.md describes them for users.

Every field is a column of the index, so a flag can be told again from a row. None: it was not, or cannot be, measured.
"""

from __future__ import annotations

from dataclasses import dataclass

#: A clip is frozen when one still stretch has more than this share of its frames.
FROZEN_SHARE = 0.5
#: A clip is silent when its sound lasts less than this, as that of a click does. In a clip shorter than a block of
#: loudness, anything audible counts.
SILENT_SECONDS, SHORT_CLIP_SECONDS = 0.05, 0.4


@dataclass(frozen=True)
class PictureMeasures:
    """Measured on the frames before they are encoded. Luma is in codes of limited range: 16 is black, 235 white.

    mean_luma: the mean over all pixels and frames.
    black_share: the share of the frames that are black (engine/frames.py).
    motion: the median, over all frames but the first, of the share of blocks that have changed in eight frames; None
    for one frame.
    still_share: the longest stretch of frames that look like its first, as a share of all; None for one frame.
    sharpness: the median over the frames of the variance of the luma's Laplacian, in codes squared; None where a side
    is below 3 pixels.
    cuts: the number of hard cuts.
    """

    mean_luma: float | None = None
    black_share: float | None = None
    motion: float | None = None
    still_share: float | None = None
    sharpness: float | None = None
    cuts: int | None = None

    def flags(self) -> tuple[str, ...]:
        """What applies of "black" and "frozen"."""
        black = ("black",) if self.black_share == 1.0 else ()
        frozen = ("frozen",) if self.still_share is not None and self.still_share > FROZEN_SHARE else ()
        return black + frozen


@dataclass(frozen=True)
class SoundMeasures:
    """Measured on the samples before they are encoded.

    loudness_lufs: the integrated loudness of ITU-R BS.1770-4; None for silence and below 400 ms.
    clipped_samples: the number of samples at full scale, of both channels.
    sound_seconds: how long the sound is audible (engine/loudness.py).
    """

    loudness_lufs: float | None = None
    clipped_samples: int | None = None
    sound_seconds: float | None = None

    def flags(self, clip_seconds: float) -> tuple[str, ...]:
        """("silent",) where that applies, of a clip that lasts `clip_seconds`."""
        if self.sound_seconds is None:
            return ()
        short = clip_seconds < SHORT_CLIP_SECONDS
        return ("silent",) if self.sound_seconds == 0 or (self.sound_seconds < SILENT_SECONDS and not short) else ()
