"""The report's pictures: a clip as a strip of small WebP frames.

The size in bytes is bounded whatever the clip is, and damaged input does not raise.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import BinaryIO

import av
from av.container import InputContainer
from av.video.stream import VideoStream
from PIL import Image

from ltx_ray.dataset.report_text import esc

#: (longest side in pixels, WebP quality), best first. A strip takes the first that fits its budget.
_RUNGS = ((320, 76), (288, 68), (240, 62), (192, 56), (160, 48), (128, 38), (96, 28), (64, 20))
#: Up to this many frames, every frame is decoded. Above it, frames that no other refers to are skipped, which is about
#: twice as fast, and a picture may be a frame or two off its time.
_FEW_FRAMES = 49


@dataclass(frozen=True)
class Strip:
    """Pictures of one clip."""

    #: (seconds from the clip's start, WebP bytes), in order of time; empty when nothing decodes.
    frames: tuple[tuple[float, bytes], ...]
    #: (width, height) of the clip in pixels, known where there are frames.
    size: tuple[int, int] | None
    #: Why the strip is empty or incomplete, in one line; None when it is complete.
    problem: str | None = None

    def html(self, name: str, href: str | None) -> str:
        """The pictures in a link to `href`, or why there are none. `name` and `href` must be escaped."""
        if not self.frames or self.size is None:
            return f'<div class="strip none">{esc(self.problem)}</div>'
        (width, height), number = self.size, len(self.frames)
        # Every strip is 8:3, so that cards line up. One or two rows of frames are taken, whichever fill it better.
        layouts = ((columns, -(-number // columns)) for columns in {number, -(-number // 2)})
        share, columns = max((min(1 / c, 3 / 8 / rows * width / height), c) for c, rows in layouts)
        images = "".join(
            f'<img loading="lazy" decoding="async" alt="{name} at {time:.1f} s" title="{time:.1f} s" '
            f'src="data:image/webp;base64,{base64.b64encode(data).decode()}">'
            for time, data in self.frames
        )
        style = f'style="--ratio:{width}/{height};--cols:{columns};--share:{100 * share:.2f}%"'
        if href is None:
            return f'<div class="strip" {style}>{images}</div>'
        label = f"Open clip {name}, {number} frames shown"
        return f'<a class="strip" {style} href="{href}" tabindex="-1" aria-label="{label}">{images}</a>'


def make_strip(source: BinaryIO, *, seconds: float | None, count: int = 6, budget: int = 72_000) -> Strip:
    """Decode `count` frames spread evenly over an mp4 and shrink them to about `budget` bytes in all.

    `source` is a seekable file. `seconds` is the length that the clip should have, which the index knows better than a
    damaged header; None takes the file's. Damage of any kind is told in `problem`.
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
    except Exception as error:  # whatever the decoder raises: one bad file must not cost the page
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

    The middle, since first and last frames are most often black. Pictures are appended as they are decoded, so that
    those before a damage are kept.
    """
    times = [(i + 0.5) * seconds / count for i in range(count)]
    if stream.average_rate:  # a frame stays on screen for the length of a frame
        times = [t - 0.999 / float(stream.average_rate) for t in times]
    last = None
    for frame in container.decode(stream):
        if frame.time is None:  # not so in PyAV's stubs
            continue  # type: ignore[unreachable]
        last = frame
        if frame.time >= times[len(pictures)]:
            pictures.append((frame.time, _shrink(frame)))
            last = None
            if len(pictures) == count:
                return
    if last is not None:
        pictures.append((last.time, _shrink(last)))


def _shrink(frame: av.VideoFrame) -> Image.Image:
    """The frame as RGB, with its longest side at most that of the first of `_RUNGS`. It is never enlarged."""
    scale = min(1.0, _RUNGS[0][0] / max(frame.width, frame.height))
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
            buffer = io.BytesIO()
            small.save(buffer, "WEBP", quality=quality, method=3)
            encoded.append((time, buffer.getvalue()))
        if sum(len(data) for _, data in encoded) <= budget:
            break
    return encoded
