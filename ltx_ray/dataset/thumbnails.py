"""The report's pictures: a clip as small WebP frames.

A decode worker makes one sheet of a clip's frames as it has them (`FrameSheet`). The report decodes the clip itself
where there is none. The size in bytes is bounded for any clip, and damaged input does not raise.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from PIL import Image

from ltx_ray.dataset.report_text import esc

#: (longest side in pixels, WebP quality), best first. A strip takes the first with which it fits its budget.
_RUNGS = ((320, 76), (288, 68), (240, 62), (192, 56), (160, 48), (128, 38), (96, 28), (64, 20))
#: Up to this many frames, every frame is decoded. Above it, frames to which no other frame refers are skipped. That is
#: about twice as fast, but a picture may be a frame or two off its time.
_FEW_FRAMES = 49
#: Frames that are shown of a clip, fewer of one that has fewer.
_FRAMES = 6
#: Longest side in pixels of a frame in a sheet, and the sheet's WebP quality: about 30 KB.
_SHEET_SIDE, _SHEET_QUALITY = 256, 68
#: FFmpeg's codes of how clips are encoded.
_BT709, _LIMITED_RANGE = 1, 1


@dataclass(frozen=True)
class Strip:
    """Pictures of one clip."""

    #: (seconds from the clip's start, WebP bytes), in order of time; empty when nothing decodes. A sheet of all frames
    #: has no time.
    frames: tuple[tuple[float | None, bytes], ...]
    #: (width, height) of a picture in pixels, known where there are frames.
    size: tuple[int, int] | None
    #: Why the strip is empty or incomplete, in one line; None when it is complete.
    problem: str | None = None

    def html(self, name: str, href: str | None) -> str:
        """The pictures in a link to `href`, or why there are none. `name` and `href` must be escaped."""
        if not self.frames or self.size is None:
            return f'<div class="strip none">{esc(self.problem)}</div>'
        width, height = self.size
        share, columns = _layout(width, height, len(self.frames))
        images = "".join(_image(name, time, data) for time, data in self.frames)
        style = f'style="--ratio:{width}/{height};--cols:{columns};--share:{100 * share:.2f}%"'
        if href is None:
            return f'<div class="strip" {style}>{images}</div>'
        label = f"Open clip {name}"
        return f'<a class="strip" {style} href="{href}" tabindex="-1" aria-label="{label}">{images}</a>'


def _layout(width: int, height: int, number: int) -> tuple[float, int]:
    """(share of the width that a frame has, columns) for frames of this size.

    Every strip is 8:3, so that cards line up. One or two rows of frames are taken, whichever fill it better.
    """
    layouts = ((columns, -(-number // columns)) for columns in {number, -(-number // 2)})
    return max((min(1 / columns, 3 / 8 / rows * width / height), columns) for columns, rows in layouts)


def _image(name: str, time: float | None, data: bytes) -> str:
    shown = f'alt="frames of {name}"' if time is None else f'alt="{name} at {time:.1f} s" title="{time:.1f} s"'
    source = f"data:image/webp;base64,{base64.b64encode(data).decode()}"
    return f'<img loading="lazy" decoding="async" {shown} src="{source}">'


class FrameSheet:
    """A picture of frames that are spread evenly over a clip, side by side, made while the clip is decoded."""

    def __init__(self, frames: int):
        """`frames` of the clip in all."""
        count = min(_FRAMES, frames)
        #: Numbers of the frames to take, in the middle of equal intervals: first and last ones are often black.
        self._wanted = [int((i + 0.5) * frames / count) for i in range(count)]
        self._seen = 0
        self._pictures: list[Image.Image] = []

    def update(self, frames: np.ndarray) -> None:
        """Take the next I420 frames (f, 3 * height / 2, width), uint8 in BT.709 of limited range."""
        for number in self._wanted[len(self._pictures) :]:
            if number >= self._seen + len(frames):
                break
            frame = av.VideoFrame.from_ndarray(frames[number - self._seen], format="yuv420p")
            frame.colorspace, frame.color_range = _BT709, _LIMITED_RANGE
            self._pictures.append(_shrink(frame, _SHEET_SIDE))
        self._seen += len(frames)

    def webp(self) -> bytes:
        """The sheet of the frames so far; there must be one."""
        assert self._pictures
        return _sheet(self._pictures)


def _sheet(pictures: Sequence[Image.Image]) -> bytes:
    width, height = pictures[0].size
    _, columns = _layout(width, height, len(pictures))
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * width, number // columns * height))
    return _webp(sheet, _SHEET_QUALITY)


def sheet_of(strip: Strip) -> bytes:
    """The sheet of a clip that was decoded already; the strip must have frames."""
    pictures = [Image.open(io.BytesIO(data)) for _, data in strip.frames]
    for picture in pictures:
        picture.thumbnail((_SHEET_SIDE, _SHEET_SIDE))
    return _sheet(pictures)


def read_sheet(data: bytes, budget: int) -> Strip | None:
    """The strip that a sheet makes, in at most about `budget` bytes; None for a file that is no picture."""
    try:
        picture = Image.open(io.BytesIO(data), formats=["WEBP"])
        picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    size = picture.size
    for side, quality in _RUNGS:
        if len(data) <= budget:
            break
        small = picture.convert("RGB")
        small.thumbnail((2 * side, 2 * side))
        data = _webp(small, quality)
    return Strip(((None, data),), size)


def make_strip(source: BinaryIO, *, seconds: float | None, count: int = _FRAMES, budget: int = 72_000) -> Strip:
    """Decode `count` frames spread evenly over an mp4 and shrink them to about `budget` bytes in all.

    `source` is a seekable file. `seconds` is the length that the clip should have, which the index knows better than a
    damaged header; None takes the file's. Damage of any kind is reported in `problem`.
    """
    pictures: list[tuple[float, Image.Image]] = []
    size: tuple[int, int] | None = None
    problem: str | None = None
    try:
        with av.open(source, mode="r", metadata_errors="replace") as container:
            stream = container.streams.video[0]
            size = (stream.width, stream.height)
            if stream.frames > _FEW_FRAMES:
                stream.codec_context.skip_frame = "NONREF"
            if not seconds:
                base = stream.time_base
                seconds = float(stream.duration * base) if stream.duration and base is not None else 0.0
            if stream.frames:
                count = min(count, stream.frames)
            _pick(container, stream, seconds, count, pictures)
    except Exception as error:  # of any class that the decoder raises: one bad file must not prevent the page
        problem = f"cannot be decoded ({type(error).__name__}: {getattr(error, 'strerror', None) or error})"
    if problem is None and not pictures:
        problem = "holds no picture"
    elif problem is None and len(pictures) < count - 1:
        problem = f"breaks off after {pictures[-1][0]:.1f} s of {seconds:.1f} s"
    return Strip(tuple(_encode(pictures, budget)), size, problem)


def _pick(
    container: InputContainer,
    stream: VideoStream,
    seconds: float,
    count: int,
    pictures: list[tuple[float, Image.Image]],
) -> None:
    """Append (time, picture) for the frame on screen in the middle of each of `count` equal intervals.

    It is the middle because first and last frames are often black. Pictures are appended as they are decoded, so that
    a damaged file still gives those before the damage.
    """
    times = [(i + 0.5) * seconds / count for i in range(count)]
    if stream.average_rate:  # a frame stays on screen until the next one
        times = [t - 0.999 / float(stream.average_rate) for t in times]
    last = None
    for frame in container.decode(stream):
        if frame.time is None:  # PyAV's stubs say that it is never None
            continue  # type: ignore[unreachable]
        last = frame
        if frame.time >= times[len(pictures)]:
            pictures.append((frame.time, _shrink(frame, _RUNGS[0][0])))
            last = None
            if len(pictures) == count:
                return
    if last is not None:
        pictures.append((last.time, _shrink(last, _RUNGS[0][0])))


def _webp(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality, method=3)
    return buffer.getvalue()


def _shrink(frame: av.VideoFrame, longest: int) -> Image.Image:
    """The frame as RGB, with its longest side at most `longest` pixels. It is never enlarged."""
    scale = min(1.0, longest / max(frame.width, frame.height))
    width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
    return frame.to_image(width=width, height=height, interpolation="AREA")


def _encode(pictures: list[tuple[float, Image.Image]], budget: int) -> list[tuple[float, bytes]]:
    """WebP bytes of every picture, at the first of `_RUNGS` at which all fit `budget`, or else at the last."""
    encoded: list[tuple[float, bytes]] = []
    for side, quality in _RUNGS:
        encoded = []
        for time, picture in pictures:
            small = picture.copy()
            small.thumbnail((side, side))
            encoded.append((time, _webp(small, quality)))
        if sum(len(data) for _, data in encoded) <= budget:
            break
    return encoded
