"""Sizes: pixels to latents to tokens, frame rates as fractions, what is legal."""

from __future__ import annotations

import contextlib
from fractions import Fraction

import av
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltx_ray.shapes import ClipShape, frame_rate_fraction, size_problems

HQ = ClipShape(121, 1088, 1920, 24.0)


def test_the_hq_default_has_the_documented_sizes():
    assert (HQ.latent_frames, HQ.latent_height, HQ.latent_width) == (16, 34, 60)
    assert HQ.video_tokens == 32_640
    assert HQ.half() == ClipShape(121, 544, 960, 24.0)
    assert HQ.half().video_tokens == 8_160
    assert HQ.audio_latents == 126
    assert HQ.seconds == pytest.approx(121 / 24)


@pytest.mark.parametrize("frames, latents", [(1, 1), (9, 2), (17, 3), (121, 16), (257, 33)])
def test_latent_frames(frames, latents):
    assert ClipShape(frames, 64, 64, 24.0).latent_frames == latents


@pytest.mark.parametrize("rate, latents", [(24.0, 126), (25.0, 121), (30.0, 101), (29.97, 101), (121.0, 25)])
def test_audio_latents_are_25_a_second(rate, latents):
    assert ClipShape(121, 64, 64, rate).audio_latents == latents


def test_audio_latents_round_half_to_even():
    # Nine frames last 2.5 latents at 90 frames a second, and 1.5 at 150.
    assert ClipShape(9, 64, 64, 90.0).audio_latents == 2
    assert ClipShape(9, 64, 64, 150.0).audio_latents == 2


@pytest.mark.parametrize(
    "rate, fraction",
    [
        (24.0, Fraction(24)),
        (24, Fraction(24)),
        (23.976, Fraction(24000, 1001)),
        (23.98, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (30000 / 1001, Fraction(30000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (119.88, Fraction(120000, 1001)),
        (23.976023, Fraction(24000, 1001)),
        (29.97003, Fraction(30000, 1001)),
        (5.99, Fraction(6000, 1001)),
        # Nearly an NTSC rate, but none of its decimals.
        (29.975, Fraction(1199, 40)),
        (29.971, Fraction(29971, 1000)),
        (29.9746, Fraction(149873, 5000)),
        (23.98001, Fraction(2398001, 100_000)),
        (0.0123456, Fraction(1929, 156_250)),
        (1 / 3, Fraction(1, 3)),
        (12.5, Fraction(25, 2)),
        (24.5, Fraction(49, 2)),
        (0.5, Fraction(1, 2)),
    ],
)
def test_frame_rates_become_fractions(rate, fraction):
    assert frame_rate_fraction(rate) == fraction


def test_sound_lasts_as_long_as_the_picture():
    assert HQ.audio_samples == 121 * 2000
    # 30 frames last 1.001 s at 30000/1001 frames a second.
    assert ClipShape(30, 64, 64, 29.97).audio_samples == 48_048
    assert ClipShape(30, 64, 64, 29.97).seconds == pytest.approx(1.001)


def test_a_legal_size_has_no_problems():
    assert size_problems(HQ) == []
    assert size_problems(ClipShape(9, 64, 64, 1000.0)) != [], "the clip lasts 0.225 of an audio latent"
    assert size_problems(ClipShape(1, 64, 64, 24.0)) == []


@pytest.mark.parametrize(
    "shape, column, value, words",
    [
        (ClipShape(121, 1080, 1920, 24.0), "height", 1080, "1024 or 1088"),
        (ClipShape(121, 1088, 1900, 24.0), "width", 1900, "1856 or 1920"),
        (ClipShape(121, 32, 64, 24.0), "height", 32, "64 or 128"),
        (ClipShape(121, 0, 64, 24.0), "height", 0, "positive multiple of 64"),
        (ClipShape(121, 64, -64, 24.0), "width", -64, "positive multiple of 64"),
        (ClipShape(120, 64, 64, 24.0), "num_frames", 120, "113 or 121"),
        (ClipShape(0, 64, 64, 24.0), "num_frames", 0, "1 or 9"),
        (ClipShape(121, 64, 64, 0.0), "frame_rate", 0.0, "from 0.01 to 1000"),
        (ClipShape(121, 64, 64, 1001.0), "frame_rate", 1001.0, "from 0.01 to 1000"),
        (ClipShape(121, 64, 64, float("inf")), "frame_rate", float("inf"), "from 0.01 to 1000"),
        (ClipShape(1, 64, 64, 60.0), "num_frames", 1, "audio latent"),
    ],
)
def test_an_illegal_size_is_reported_with_column_value_and_what_is_legal(shape, column, value, words):
    [(found, given_value, legal)] = size_problems(shape)
    assert (found, given_value) == (column, value)
    assert words in legal


def test_a_side_that_no_encoder_takes():
    assert size_problems(ClipShape(9, 64, 16_384, 24.0)) == []
    [problem] = size_problems(ClipShape(9, 16_448, 64, 24.0))
    assert problem == ("height", 16_448, "at most 16384, the longest side that H.264 encoders take")


@pytest.mark.parametrize("height, width, highest", [(16_384, 16_384, 16_128), (16_192, 16_384, 16_128)])
def test_a_picture_that_ffmpeg_does_not_take(height, width, highest):
    """It would be refused when the first frame is encoded, after all of the work."""
    [problem] = size_problems(ClipShape(1, height, width, 24.0))
    assert problem == ("height", height, f"at most {highest} where the width is {width}, as FFmpeg takes pictures")
    for legal, size in ((True, (highest, width)), (False, (highest + 64, width)), (True, (16_192, 16_192))):
        assert (size_problems(ClipShape(1, *size, 24.0)) == []) == legal
        with contextlib.nullcontext() if legal else pytest.raises(ValueError):
            av.VideoFrame(size[1], size[0], "gray")


def test_every_problem_of_a_size_is_reported():
    assert [p[0] for p in size_problems(ClipShape(2, 1, 1, 24.0))] == ["height", "width", "num_frames"]


@given(st.integers(0, 2**31 - 1), st.floats(min_value=0.0, max_value=1000.0))
def test_every_legal_size_has_positive_lengths(frames, rate):
    shape = ClipShape(frames, 64, 64, rate)
    if not size_problems(shape):
        assert shape.audio_latents >= 1
        assert shape.audio_samples >= 1
        assert shape.seconds > 0
        assert frame_rate_fraction(rate) > 0
