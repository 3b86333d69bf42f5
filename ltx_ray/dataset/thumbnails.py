"""The report's pictures: a clip as a strip of small WebP frames.

Bounded in bytes whatever the clip, and damaged input does not raise.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import BinaryIO

import av
from PIL import Image

from ltx_ray.dataset.timeline import esc

# (longest side in pixels, WebP quality), best first; a strip takes the first rung that fits its budget.
_RUNGS = ((320, 76), (288, 68), (240, 62), (192, 56), (160, 48), (128, 38), (96, 28), (64, 20))
# Below this many frames every frame is decoded; above it, those that no other frame refers to are skipped
# (about twice as fast), and a picture may lie a frame or two beside the wanted time.
_FEW_FRAMES = 49


@dataclass(frozen=True)
class Strip:
    """Pictures of one clip.

    frames: (time in seconds from the clip's start, WebP bytes), in order of time; empty when nothing decodes.
    size: (width, height) of the clip in pixels, or None.
    problem: why the strip is empty or incomplete, as one line for a person; None when all is well.
    """

    frames: tuple[tuple[float, bytes], ...]
    size: tuple[int, int] | None
    problem: str | None = None

    def html(self, name: str, href: str | None) -> str:
        """The pictures in a link to `href`, or why there are none. `name` and `href` are escaped already."""
        if not self.frames:
            return f'<div class="strip none">{esc(self.problem)}</div>'
        (width, height), number = self.size, len(self.frames)
        # Every strip is 8:3, so that cards line up; the rows of frames that fill it best are taken.
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
    """Decode `count` frames spread evenly over an mp4 and shrink them to about `budget` bytes together.

    source: a seekable binary file. seconds: the length the clip should have (the index knows it better than
    a damaged header does); None asks the file. Damage of any kind ends up in `problem`.
    """
    pictures: list[tuple[float, Image.Image]] = []
    size = problem = None
    try:
        with av.open(source, metadata_errors="replace") as container:
            stream = container.streams.video[0]
            size = (stream.width, stream.height)
            if stream.frames > _FEW_FRAMES:
                stream.codec_context.skip_frame = "NONREF"
            if not seconds:
                seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
            if stream.frames:
                count = min(count, stream.frames)
            _pick(container, stream, seconds, count, pictures)
    except Exception as error:  # any decoder error at all: one bad file must not cost the page
        problem = f"cannot be decoded ({type(error).__name__}: {getattr(error, 'strerror', None) or error})"
    if problem is None and not pictures:
        problem = "holds no picture"
    elif problem is None and len(pictures) < count - 1:
        problem = f"breaks off after {pictures[-1][0]:.1f} s of {seconds:.1f} s"
    return Strip(tuple(_encode(pictures, budget)), size, problem)


def _pick(container, stream, seconds: float, count: int, pictures: list[tuple[float, Image.Image]]) -> None:
    """Append (time, picture) for the first frame at or after the middle of each of `count` equal stretches.

    Middles rather than ends: first and last frames are the ones most often black. Appends as it goes, so that
    what was decoded before damage is kept.
    """
    wanted = [(i + 0.5) * seconds / count for i in range(count)]
    if stream.average_rate:  # a frame covers its own length: the one that is on screen at that time
        wanted = [t - 0.999 / float(stream.average_rate) for t in wanted]
    last = None
    for frame in container.decode(stream):
        if frame.time is None:
            continue
        last = frame
        if frame.time >= wanted[len(pictures)]:
            pictures.append((frame.time, _shrink(frame)))
            last = None
            if len(pictures) == count:
                return
    if last is not None:
        pictures.append((last.time, _shrink(last)))


def _shrink(frame: av.VideoFrame) -> Image.Image:
    """The frame as RGB, its longest side at most the first rung's; never enlarged."""
    scale = min(1.0, _RUNGS[0][0] / max(frame.width, frame.height))
    width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
    return frame.to_image(width=width, height=height, interpolation="AREA")


def _encode(pictures: list[tuple[float, Image.Image]], budget: int) -> list[tuple[float, bytes]]:
    """WebP bytes of every picture, at the best rung at which all fit `budget`, or at the last one."""
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
