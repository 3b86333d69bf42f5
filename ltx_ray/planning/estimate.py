"""What the clips of a plan cost: work, dollars and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ltx_ray.checkpoints.transformer_config import TransformerConfig
from ltx_ray.dataset.run_cost import cost_of
from ltx_ray.planning.cost import H100_TFLOPS, clip_tflop
from ltx_ray.records import RenderRequest
from ltx_ray.shapes import AUDIO_BINS, AUDIO_CHANNELS, VIDEO_CHANNELS

#: Bytes of an mp4 for each pixel of its frames and for each second of its sound, roughly: at CRF 19 a clip of 121
#: frames in 1088x1920 has 4 to 10 MB.
_BYTES_OF_PIXEL, _BYTES_OF_SOUND = 0.03, 16_000
#: Bytes of a clip's picture in `thumbs/`, and of its row.
_BYTES_OF_THUMB, _BYTES_OF_ROW = 30_000, 400


@dataclass(frozen=True)
class ClipEstimate:
    """What a clip takes, or several together.

    pixels: of all frames. half_latents and latents: values of the latents of stage 1 and of stage 2, sound included.
    """

    tflop: float = 0.0
    seconds: float = 0.0
    pixels: float = 0.0
    half_latents: float = 0.0
    latents: float = 0.0

    def plus(self, other: ClipEstimate, times: float) -> ClipEstimate:
        """Those of `self` and `times` those of `other`."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return ClipEstimate(*(own + times * more for own, more in pairs))


class PlannedWork:
    """Sums clips up. Rows of one template mostly follow each other, and are counted before they are summed up."""

    def __init__(self) -> None:
        self._sum = self._last = ClipEstimate()
        self._count = 0

    def add(self, clip: ClipEstimate) -> None:
        """One more clip. The same object stands for clips of the same size."""
        if clip is not self._last:
            self._sum, self._last, self._count = self.total, clip, 0
        self._count += 1

    @property
    def total(self) -> ClipEstimate:
        return self._sum.plus(self._last, self._count)


@dataclass(frozen=True)
class Stored:
    """What a run writes for each clip: with the latents too, or only those of stage 1 and a preview."""

    save_latents: bool
    stop_after_stage1: bool
    dtype: str

    def nbytes(self, clips: float, total: ClipEstimate) -> float:
        """About how many bytes `clips` clips, which take `total` together, have in the output."""
        pixels = total.pixels / 4 if self.stop_after_stage1 else total.pixels
        size = _BYTES_OF_PIXEL * pixels + _BYTES_OF_SOUND * total.seconds + (_BYTES_OF_THUMB + _BYTES_OF_ROW) * clips
        if self.stop_after_stage1 or self.save_latents:
            values = total.half_latents + (0 if self.stop_after_stage1 else total.latents)
            size += values * (4 if self.dtype == "float32" else 2)
        return size


def estimate_clip(transformer: TransformerConfig, request: RenderRequest) -> ClipEstimate:
    shape, half = request.shape, request.shape.half()
    sound = shape.audio_latents * AUDIO_CHANNELS * AUDIO_BINS
    return ClipEstimate(
        tflop=clip_tflop(transformer, request),
        seconds=shape.seconds,
        pixels=shape.num_frames * shape.height * shape.width,
        half_latents=half.video_tokens * VIDEO_CHANNELS + sound,
        latents=shape.video_tokens * VIDEO_CHANNELS + sound,
    )


def cost_line(counts: Mapping[str, int], work: ClipEstimate, price: float | None = None) -> str:
    """The cost in words: TFLOP of what is to be rendered, hours of an H100, and dollars at `price` for an hour."""
    clips = counts.get("clips", 0)
    if not clips:
        return "nothing to render"
    hours = work.tflop / H100_TFLOPS / 3600
    what = f"{clips} clip{'s' if clips > 1 else ''}"
    line = f"about {_quantity(work.tflop)}TFLOP in {what}, {hours:.2g} hours of an H100 at {H100_TFLOPS:.0f} TFLOP/s"
    if price is not None:
        line += f"; with starting and waiting left out, {cost_of(hours * 3600, price, clips, work.seconds)}"
    return line


def _quantity(value: float) -> str:
    return f"{value:,.0f} " if value >= 100 else f"{value:.3g} "


def bytes_lines(counts: Mapping[str, int], work: ClipEstimate, stored: Stored, weights: int) -> list[str]:
    """How much the output and the disks of nodes need. `weights`: bytes of the model's files that nodes download."""
    if not (clips := counts.get("clips", 0)):
        return []
    output = stored.nbytes(clips, work)
    each = size_text(output / clips)
    lines = [f"output: about {size_text(output)}, {each} a clip; scratch: {each} for each clip that is being decoded"]
    if weights:
        lines.append(f"cache of each node: {size_text(weights)} of the model's files (LTX_RAY_CACHE)")
    return lines


def size_text(nbytes: float) -> str:
    """`950 kB`, `8.1 MB`, `1.2 TB`: three digits, in powers of 1000."""
    for unit in ("kB", "MB", "GB", "TB"):
        nbytes /= 1000
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
    return f"{nbytes:,.0f} TB"
