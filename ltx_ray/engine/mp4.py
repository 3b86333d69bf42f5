"""H.264 and AAC encoded into one mp4 as frames arrive. No torch: frames are I420 bytes, sound is float32 samples.

Source of the settings: docs/ltx-2.3.md#encoding; `ltx_pipelines/utils/media_io/encode.py` and
`ltx_core/color/audio_mux.py` of the reference v1.2.0 (libx264 veryfast, CRF 19). The frame rate stays a fraction, where
the reference truncates it to a whole number.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction

import av
import numpy as np

from ltx_ray.config import ENCODER_THREADS
from ltx_ray.dataset.clips import ClipMetadata

CRF = 19
PRESET = "veryfast"
#: FFmpeg's codes.
_BT709 = 1
_LIMITED_RANGE = 1
#: Samples of an audio frame, as AAC encodes them.
_AUDIO_BLOCK = 1024


def write_mp4(
    path: str,
    frames: Iterable[np.ndarray],
    *,
    width: int,
    height: int,
    frame_rate: Fraction,
    audio: np.ndarray | None,
    sample_rate: int,
    metadata: Mapping[str, str],
) -> int:
    """Encode chunks of I420 frames (f, 3 * height / 2, width) uint8 and stereo `audio` (2, samples) to `path`.

    Both tracks start at 0, and the sound is neither cut nor padded. `frame_rate` is in frames per second, `sample_rate`
    in samples per second. Returns the number of frames. Raises ValueError without frames, or for sound that is not
    stereo.
    """
    if audio is not None and (audio.ndim != 2 or audio.shape[0] != 2):
        raise ValueError(f"audio has shape {audio.shape}; legal: (2, samples)")
    count = 0
    # The unit of durations. The default, milliseconds, would cut the sound between two samples.
    options = {"movflags": "use_metadata_tags+faststart", "movie_timescale": str(sample_rate)}
    with av.open(path, mode="w", format="mp4", options=options) as container:
        for key, value in metadata.items():
            container.metadata[key] = value
        video = container.add_stream("libx264", rate=frame_rate, options={"crf": str(CRF), "preset": PRESET})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        context = video.codec_context
        context.thread_count, context.thread_type = ENCODER_THREADS, "FRAME"
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        context.time_base = 1 / frame_rate
        sound = None
        if audio is not None:
            sound = container.add_stream("aac", rate=sample_rate, layout="stereo")
            sound.codec_context.time_base = Fraction(1, sample_rate)
        for chunk in frames:
            for picture in chunk:
                frame = av.VideoFrame.from_ndarray(picture, format="yuv420p")
                frame.pts, frame.time_base = count, 1 / frame_rate
                frame.colorspace, frame.color_range = _BT709, _LIMITED_RANGE
                count += 1
                container.mux(video.encode(frame))
        if not count:
            raise ValueError("no frames to encode")
        container.mux(video.encode())
        if audio is not None and sound is not None:
            for block in _audio_frames(audio, sample_rate):
                container.mux(sound.encode(block))
            container.mux(sound.encode())
    return count


def read_metadata(data: bytes) -> ClipMetadata | None:
    """What the bytes of a clip say of it; None when they are no mp4 with an item_id."""
    try:
        with av.open(io.BytesIO(data), format="mp4") as container:
            found = dict(container.metadata)
    except (av.FFmpegError, OSError, ValueError):
        return None
    return ClipMetadata(found["item_id"], found.get("latents_sha256")) if "item_id" in found else None


def _audio_frames(audio: np.ndarray, sample_rate: int) -> Iterator[av.AudioFrame]:
    # Samples pass through 16 bits, as in the reference. The encoder itself takes planar floats.
    samples = (np.clip(audio, -1.0, 1.0) * 32767.0).astype(np.int16)
    planar = samples.astype(np.float32) / 32768.0
    for start in range(0, planar.shape[1], _AUDIO_BLOCK):
        block = np.ascontiguousarray(planar[:, start : start + _AUDIO_BLOCK])
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = sample_rate, start, Fraction(1, sample_rate)
        yield frame
