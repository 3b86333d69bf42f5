"""The mp4: all frames at their exact rate, sound of the exact length, tagged colours."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest

from ltx_ray.engine.mp4 import write_mp4
from ltx_ray.shapes import ClipShape, frame_rate_fraction

WIDTH, HEIGHT = 128, 64
META = {"item_id": "a" * 32, "recipe_digest": "b" * 16}


def pictures(count: int) -> np.ndarray:
    """I420 frames (count, 96, 128): grey that brightens, with coloured chroma."""
    frames = np.full((count, HEIGHT * 3 // 2, WIDTH), 90, np.uint8)
    frames[:, :HEIGHT] = np.linspace(40, 200, count).astype(np.uint8)[:, None, None]
    return frames


def tone(samples: int) -> np.ndarray:
    wave = 0.5 * np.sin(np.arange(samples) * 2 * np.pi * 440 / 48_000)
    return np.stack([wave, 0.5 * wave]).astype(np.float32)


def write(path, frames=9, rate: float = 24.0, audio="matching", chunks=2) -> int:
    if isinstance(audio, str):
        audio = tone(ClipShape(frames, HEIGHT, WIDTH, rate).audio_samples)
    return write_mp4(
        str(path),
        np.array_split(pictures(frames), chunks),
        width=WIDTH,
        height=HEIGHT,
        frame_rate=frame_rate_fraction(rate),
        audio=audio,
        sample_rate=48_000,
        metadata=META,
    )


def decoded_sound(path) -> np.ndarray:
    """What a player plays, without the packets that the edit list cuts off."""
    with av.open(str(path)) as container:
        return np.concatenate([f.to_ndarray() for f in container.decode(audio=0)], axis=1)


@pytest.mark.parametrize(
    "frames, rate, fraction",
    [
        (9, 24.0, Fraction(24)),
        (1, 24.0, Fraction(24)),
        (17, 29.97, Fraction(30_000, 1001)),
        (9, 23.976, Fraction(24_000, 1001)),
        (9, 12.5, Fraction(25, 2)),
        (33, 59.94, Fraction(60_000, 1001)),
    ],
)
def test_picture_and_sound_have_their_lengths(tmp_path, frames, rate, fraction):
    path = tmp_path / "x.mp4"
    samples = ClipShape(frames, HEIGHT, WIDTH, rate).audio_samples
    assert write(path, frames, rate) == frames
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert video.average_rate == fraction
        assert video.guessed_rate == fraction
        times = [f.pts * f.time_base for f in container.decode(video=0)]
        assert times == [n / fraction for n in range(frames)]
        assert video.duration * video.time_base == frames / fraction
        assert audio.duration * audio.time_base == Fraction(samples, 48_000)
    assert decoded_sound(path).shape[1] >= samples
    with av.open(str(path)) as container:
        first = next(container.decode(audio=0))
        assert first.pts == 0, "sound starts with the picture"


def test_the_sound_is_in_sync_to_the_sample(tmp_path):
    """A click in the middle of silence comes back where it was."""
    samples = ClipShape(25, HEIGHT, WIDTH, 24.0).audio_samples
    sound = np.zeros((2, samples), np.float32)
    sound[:, 20_000] = 0.9
    write(tmp_path / "x.mp4", 25, audio=sound)
    heard = decoded_sound(tmp_path / "x.mp4")
    assert np.abs(heard).argmax(axis=1).tolist() == [20_000, 20_000]


def test_the_channels_do_not_mix_and_loud_sound_is_clipped(tmp_path):
    loud = tone(18_000) * 4
    write(tmp_path / "x.mp4", audio=loud)
    left, right = np.abs(decoded_sound(tmp_path / "x.mp4"))[:, 2000:16_000].max(axis=1)
    assert 0.9 < left < 1.3 and 0.85 < right < 1.15
    write(tmp_path / "y.mp4", audio=tone(18_000))
    left, right = np.abs(decoded_sound(tmp_path / "y.mp4"))[:, 2000:16_000].max(axis=1)
    assert left == pytest.approx(0.5, abs=0.05) and right == pytest.approx(0.25, abs=0.05)


def test_streams_are_what_the_contract_says(tmp_path):
    write(tmp_path / "x.mp4")
    with av.open(str(tmp_path / "x.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        context = video.codec_context
        assert (context.name, context.pix_fmt, context.width, context.height) == ("h264", "yuv420p", WIDTH, HEIGHT)
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1), "BT.709"
        assert context.color_range == 1, "limited"
        assert (audio.codec_context.name, audio.rate, audio.layout.name) == ("aac", 48_000, "stereo")
        assert len(container.streams) == 2
        assert {k: container.metadata[k] for k in META} == META


def test_the_pictures_come_back_in_order(tmp_path):
    write(tmp_path / "x.mp4", frames=17, chunks=5)
    with av.open(str(tmp_path / "x.mp4")) as container:
        luma = [f.to_ndarray()[:HEIGHT].mean() for f in container.decode(video=0)]
    assert luma == pytest.approx(pictures(17)[:, 0, 0].tolist(), abs=3)


def test_the_index_comes_first_so_that_a_browser_can_start(tmp_path):
    write(tmp_path / "x.mp4")
    content = (tmp_path / "x.mp4").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


def test_the_same_input_gives_the_same_bytes(tmp_path):
    write(tmp_path / "x.mp4", chunks=1)
    write(tmp_path / "y.mp4", chunks=9)
    assert (tmp_path / "x.mp4").read_bytes() == (tmp_path / "y.mp4").read_bytes()


def test_a_clip_without_sound(tmp_path):
    assert write(tmp_path / "x.mp4", audio=None) == 9
    with av.open(str(tmp_path / "x.mp4")) as container:
        assert len(container.streams.audio) == 0


def test_nothing_to_encode_and_sound_that_is_not_stereo(tmp_path):
    with pytest.raises(ValueError, match="no frames"):
        write(tmp_path / "x.mp4", frames=0, audio=None)
    for shape in ((18_000,), (1, 18_000), (18_000, 2)):
        with pytest.raises(ValueError, match=r"legal: \(2, samples\)"):
            write(tmp_path / "x.mp4", audio=np.zeros(shape, np.float32))
