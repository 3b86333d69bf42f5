"""The sheet of frames that a decode worker makes of a clip, and what the report makes of it."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from ltx_ray.dataset.thumbnails import FrameSheet, make_strip, read_sheet
from ltx_ray.engine.mp4 import write_mp4


def pictures(count: int, width: int, height: int) -> np.ndarray:
    """I420 frames (count, 3 * height / 2, width) of colours that change evenly."""
    ys, xs = np.mgrid[0:height, 0:width]
    frames = []
    for n in range(count):
        share = n / max(1, count - 1)
        rgb = np.stack([xs / width * 255, np.full_like(xs, share * 255), ys / height * 255], axis=-1).astype(np.uint8)
        frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
        frames.append(frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG").to_ndarray())
    return np.stack(frames)


def sheet_of(frames: np.ndarray, chunk: int) -> bytes:
    sheet = FrameSheet(len(frames))
    for start in range(0, len(frames), chunk):
        sheet.update(frames[start : start + chunk])
    return sheet.webp()


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


@pytest.mark.parametrize("chunk", [1, 8, 9, 49])
def test_a_sheet_does_not_depend_on_how_the_frames_come(chunk):
    frames = pictures(49, 128, 64)
    assert sheet_of(frames, chunk) == sheet_of(frames, 17)


def test_a_sheet_shows_the_frames_that_the_clip_shows(tmp_path):
    """The colours are those of the mp4, whose frames the report would decode."""
    frames, path = pictures(49, 192, 96), tmp_path / "a.mp4"
    write_mp4(str(path), [frames], width=192, height=96, frame_rate=Fraction(24), audio=None, sample_rate=48000,
              metadata={})  # fmt: skip
    with path.open("rb") as file:
        strip = make_strip(file, seconds=49 / 24)
    sheet = opened(sheet_of(frames, 8))
    assert sheet.shape == (2 * 96, 3 * 192, 3), "two rows of three fill 8:3 better than one of six"
    for number, (_, data) in enumerate(strip.frames):
        row, column = divmod(number, 3)
        tile = sheet[row * 96 : (row + 1) * 96, column * 192 : (column + 1) * 192]
        assert np.abs(tile - opened(data)).mean() < 4


@pytest.mark.parametrize("width, height, columns", [(768, 512, 3), (512, 768, 6), (1920, 512, 3), (64, 64, 3)])
def test_a_sheet_is_laid_out_as_the_strip_is(width, height, columns):
    tile = max(width, height) / min(256, max(width, height))
    assert opened(sheet_of(pictures(13, width, height), 13)).shape[1] == columns * round(width / tile)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7])
def test_short_clips_show_each_frame_once(count):
    sheet = FrameSheet(count)
    assert len(set(sheet._wanted)) == len(sheet._wanted) == min(6, count) and max(sheet._wanted) < count
    sheet.update(pictures(count, 64, 64))
    assert opened(sheet.webp()).any()


@pytest.mark.slow
def test_a_sheet_of_noise_stays_small():
    noise = np.random.default_rng(1).integers(16, 235, (9, 3 * 1088 // 2, 1920), dtype=np.uint8)
    assert len(sheet_of(noise, 9)) < 120_000
    assert len(sheet_of(pictures(121, 1920, 1088), 8)) < 30_000


def test_the_report_takes_a_sheet_and_shrinks_it_to_its_budget():
    data = sheet_of(pictures(49, 768, 512), 49)
    whole = read_sheet(data, 72_000)
    assert whole.frames == ((None, data),) and whole.size == (3 * 256, 2 * 171) and whole.problem is None
    small = read_sheet(data, 2_000)
    assert len(small.frames[0][1]) <= 2_000 and small.size == whole.size
    assert 'alt="frames of x"' in small.html("x", "clips/x.mp4") and 'href="clips/x.mp4"' in small.html(
        "x", "clips/x.mp4"
    )


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"<svg/>", lambda data: data[:40]])
def test_another_file_is_no_sheet(damage):
    assert read_sheet(damage(sheet_of(pictures(9, 64, 64), 9)), 72_000) is None
