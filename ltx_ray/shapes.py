"""Sizes of LTX-2.3's clips, latents and packed latents, and which sizes are legal.

The video VAE compresses 8 x 32 x 32 (time, height, width), stage 1 runs at half resolution, and audio has 25 latents a
second of 8 channels x 16 bins. Source: docs/ltx-2.3.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

TIME_FACTOR = 8
SPACE_FACTOR = 32
#: Stage 1 renders at half of the requested height and width, each of which must be a multiple of `SPACE_FACTOR` there.
SIZE_MULTIPLE = 2 * SPACE_FACTOR
#: Pixels of a side that the H.264 encoder of the clips takes.
LARGEST_SIDE = 16_384
#: FFmpeg takes pictures whose sides, each with a margin, have a product below this. Source: `av_image_check_size2` in
#: its `libavutil/imgutils.c`.
_PICTURE_LIMIT, _PICTURE_MARGIN = 2**28, 128
VIDEO_CHANNELS = 128
AUDIO_LATENTS_PER_SECOND = 16000 / 160 / 4
AUDIO_CHANNELS = 8
AUDIO_BINS = 16
AUDIO_SAMPLE_RATE = 48000
#: Lowest and highest frame rate. A file cannot hold the fraction of a lower one.
FRAME_RATES = (0.01, 1000.0)
FRAME_RATES_LEGAL = "frames a second, from 0.01 to 1000"


@dataclass(frozen=True)
class ClipShape:
    """Size of a clip in pixels: (num_frames, height, width) at `frame_rate` frames a second."""

    num_frames: int
    height: int
    width: int
    frame_rate: float

    def half(self) -> ClipShape:
        """The stage-1 size of this clip."""
        return ClipShape(self.num_frames, self.height // 2, self.width // 2, self.frame_rate)

    @property
    def latent_frames(self) -> int:
        return (self.num_frames - 1) // TIME_FACTOR + 1

    @property
    def latent_height(self) -> int:
        return self.height // SPACE_FACTOR

    @property
    def latent_width(self) -> int:
        return self.width // SPACE_FACTOR

    @property
    def video_tokens(self) -> int:
        """Packed length of the video latent (without conditioning tokens)."""
        return self.latent_frames * self.latent_height * self.latent_width

    @property
    def audio_latents(self) -> int:
        """Packed length of the audio latent. Rounds half to even, like the reference."""
        return round(float(self.num_frames) / float(self.frame_rate) * AUDIO_LATENTS_PER_SECOND)

    @property
    def audio_samples(self) -> int:
        """Samples at 48 kHz that last as long as the picture."""
        return round(Fraction(self.num_frames) / frame_rate_fraction(self.frame_rate) * AUDIO_SAMPLE_RATE)

    @property
    def seconds(self) -> float:
        return float(self.num_frames / frame_rate_fraction(self.frame_rate))


def frame_rate_fraction(frame_rate: float) -> Fraction:
    """`frame_rate` as the fraction that is written to the file.

    An NTSC rate n*1000/1001, rounded to two decimals or more or cut after three or more (23.98, 23.976, 29.97 ...),
    means that rate. Any other number is taken as it was written, in fractions of denominators up to a million.
    """
    written = Fraction(repr(float(frame_rate)))
    nearest = round(frame_rate)
    if nearest > 0 and written != nearest:
        ntsc = Fraction(nearest * 1000, 1001)
        decimals = max(2, _decimals(frame_rate))
        cut = Fraction(ntsc * 10**decimals // 1, 10**decimals)
        if written == round(ntsc, decimals) or (decimals > 2 and written == cut):
            return ntsc
    return written.limit_denominator(1_000_000)


def _decimals(number: float) -> int:
    """Decimals with which Python writes `number`."""
    exponent = Decimal(repr(float(number))).as_tuple().exponent
    assert isinstance(exponent, int)
    return max(0, -exponent)


def _highest(width: int) -> int:
    """The largest legal height of pictures of this width, as far as FFmpeg limits it."""
    return ((_PICTURE_LIMIT - 1) // (width + _PICTURE_MARGIN) - _PICTURE_MARGIN) // SIZE_MULTIPLE * SIZE_MULTIPLE


def legal_frame_rate(frame_rate: float) -> bool:
    return FRAME_RATES[0] <= frame_rate <= FRAME_RATES[1]


def size_problems(shape: ClipShape) -> list[tuple[str, object, str]]:
    """Why `shape` cannot be rendered, as (column, value, what is legal); empty when it can."""
    problems: list[tuple[str, object, str]] = []
    for column in ("height", "width"):
        value = getattr(shape, column)
        if value < SIZE_MULTIPLE or value % SIZE_MULTIPLE:
            lower = max(SIZE_MULTIPLE, value // SIZE_MULTIPLE * SIZE_MULTIPLE)
            problems.append(
                (column, value, f"a positive multiple of {SIZE_MULTIPLE} (next: {lower} or {lower + SIZE_MULTIPLE})")
            )
        elif value > LARGEST_SIDE:
            problems.append((column, value, f"at most {LARGEST_SIDE}, the longest side that H.264 encoders take"))
    if not problems and shape.height > (highest := _highest(shape.width)):
        problems.append(
            ("height", shape.height, f"at most {highest} where the width is {shape.width}, as FFmpeg takes pictures")
        )
    if shape.num_frames < 1 or (shape.num_frames - 1) % TIME_FACTOR:
        lower = max(1, (shape.num_frames - 1) // TIME_FACTOR * TIME_FACTOR + 1)
        problems.append(
            ("num_frames", shape.num_frames, f"8*k + 1 with k >= 0 (next: {lower} or {lower + TIME_FACTOR})")
        )
    if not legal_frame_rate(shape.frame_rate):
        problems.append(("frame_rate", shape.frame_rate, FRAME_RATES_LEGAL))
    elif not problems and shape.audio_latents < 1:
        problems.append(
            (
                "num_frames",
                shape.num_frames,
                f"long enough for one audio latent (1/{AUDIO_LATENTS_PER_SECOND:g} s)"
                f" at frame_rate {shape.frame_rate:g}",
            )
        )
    return problems
