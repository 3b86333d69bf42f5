"""Loudness against known values and FFmpeg's meter, and the flag `silent` on sounds that are like something."""

from __future__ import annotations

import av
import numpy as np
import pytest

from ltx_ray.engine import loudness
from ltx_ray.engine.loudness import measure_sound
from ltx_ray.records import SoundMeasures

RATE = 48000
SECONDS = 5


def tone(frequency: float, dbfs: float, seconds: float = SECONDS, phase: float = 0.0) -> np.ndarray:
    """A sine in both channels whose peaks have this level, float32 (2, samples)."""
    time = np.arange(round(seconds * RATE)) / RATE
    wave = 10 ** (dbfs / 20) * np.sin(2 * np.pi * frequency * time + phase)
    return np.stack((wave, wave)).astype(np.float32)


def hiss(dbfs: float, seconds: float = SECONDS, seed: int = 0) -> np.ndarray:
    """White noise whose mean square has this level."""
    rng = np.random.default_rng(seed)
    return (10 ** (dbfs / 20) * rng.standard_normal((2, round(seconds * RATE)))).astype(np.float32)


def speech(dbfs: float) -> np.ndarray:
    """Noise of syllables, whose loudest has this level: bursts of 150 ms with pauses, and little above 3 kHz."""
    time = np.arange(SECONDS * RATE) / RATE
    noise = np.convolve(hiss(0.0)[0], np.hanning(16) / 8, "same")
    burst = np.clip(np.sin(2 * np.pi * 3 * time), 0, None) * (0.5 + 0.5 * np.sin(2 * np.pi * 0.4 * time) ** 2)
    wave = noise * burst
    wave *= 10 ** (dbfs / 20) / np.abs(wave).max()
    return np.stack((wave, wave)).astype(np.float32)


def at(second: float, sound: np.ndarray) -> np.ndarray:
    """The sound at a moment of a clip that has no other."""
    whole = np.zeros((2, SECONDS * RATE), np.float32)
    start = round(second * RATE)
    whole[:, start : start + sound.shape[1]] = sound
    return whole


def ffmpeg(sound: np.ndarray) -> float:
    """The integrated loudness that FFmpeg's filter `ebur128` finds."""
    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=RATE, format="fltp", layout="stereo", time_base="1/48000")
    meter, sink = graph.add("ebur128", "metadata=1"), graph.add("abuffersink")
    source.link_to(meter)
    meter.link_to(sink)
    graph.configure()
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound), format="fltp", layout="stereo")
    frame.sample_rate, frame.pts = RATE, 0
    graph.push(frame)
    graph.push(None)
    found = float("nan")
    while True:
        try:
            # The rest after the last 100 ms has none.
            found = float(sink.pull().metadata.get("lavfi.r128.I", found))
        except (av.error.EOFError, av.error.BlockingIOError):
            return found


@pytest.mark.parametrize("dbfs", [0.0, -23.0, -33.0, -60.0])
def test_a_sine_of_997_hz_is_as_loud_as_its_peaks_in_both_channels(dbfs):
    """In one channel it is 3 dB less: BS.1770-4, annex 1."""
    sound = tone(997, dbfs)
    assert measure_sound(sound).loudness_lufs == pytest.approx(dbfs, abs=0.02)
    sound[1] = 0
    assert measure_sound(sound).loudness_lufs == pytest.approx(dbfs - 3.01, abs=0.02)


#: Cases 3 to 5 of EBU Tech 3341, table 1: levels and seconds, which all come to -23 LUFS.
EBU = {
    "3": [(-36, 10), (-23, 60), (-36, 10)],
    "4": [(-72, 10), (-36, 10), (-23, 60), (-36, 10), (-72, 10)],
    "5": [(-26, 20), (-20, 20.1), (-26, 20)],
}


@pytest.mark.parametrize("case", EBU)
def test_the_gates(case):
    sound = np.concatenate([tone(1000, level, seconds) for level, seconds in EBU[case]], axis=1)
    assert measure_sound(sound).loudness_lufs == pytest.approx(-23.0, abs=0.1)


@pytest.mark.parametrize("name", ["tones", "hiss", "speech", "loud and quiet", "odd length"])
def test_it_agrees_with_ffmpeg(name):
    sound = {
        "tones": lambda: tone(60, -20) + tone(440, -25, phase=1) + tone(9000, -30),
        "hiss": lambda: hiss(-35),
        "speech": lambda: speech(-12),
        "loud and quiet": lambda: np.concatenate((hiss(-20, 2), hiss(-45, 4), hiss(-28, 2)), axis=1),
        "odd length": lambda: hiss(-30, 1.2345),
    }[name]()
    assert measure_sound(sound).loudness_lufs == pytest.approx(ffmpeg(sound), abs=0.06)


def test_long_sounds_are_measured_in_segments(monkeypatch):
    sound = hiss(-30, 3.3) * np.linspace(0, 1, round(3.3 * RATE), dtype=np.float32)
    whole = measure_sound(sound)
    monkeypatch.setattr(loudness, "_SEGMENT", RATE // 2)
    parts = measure_sound(sound)
    assert parts.loudness_lufs == pytest.approx(whole.loudness_lufs, abs=1e-9)
    assert parts.sound_seconds == whole.sound_seconds


def test_shorter_than_a_block_has_no_loudness():
    assert measure_sound(tone(997, -20, 0.4)).loudness_lufs == pytest.approx(-20, abs=0.2)
    assert measure_sound(tone(997, -20, 0.399)).loudness_lufs is None


def test_silence_has_no_loudness():
    assert measure_sound(hiss(-90)).loudness_lufs is None


def test_clipped_samples():
    """Of both channels, at full scale either way."""
    sound = 1.5 * tone(100, 0.0)
    clipped = np.clip(sound, -1, 1)
    assert measure_sound(clipped).clipped_samples == (np.abs(sound) >= 1).sum() > 0
    assert measure_sound(tone(100, -0.1)).clipped_samples == 0
    assert measure_sound(at(1.0, np.array([[1.0], [-1.0]], np.float32))).clipped_samples == 2


CLICK = np.full((2, 1), 0.8, np.float32)
#: Sounds by name, and whether they are silent.
SOUNDS = {
    "digital silence": (lambda: np.zeros((2, SECONDS * RATE), np.float32), True),
    "dither of the last of 16 bits": (lambda: np.round(hiss(-96) * 32768) / 32768, True),
    "hum of -70 dBFS": (lambda: tone(50, -70) + tone(100, -76), True),
    "a constant offset": (lambda: np.full((2, SECONDS * RATE), 0.01, np.float32), True),
    "rumble below hearing": (lambda: tone(2, -45), True),
    "one click": (lambda: at(2.0, CLICK), True),
    "a click of a millisecond": (lambda: at(2.0, np.repeat(CLICK, 48, axis=1)), True),
    "a click at the start": (lambda: at(0.0, CLICK), True),
    "a knock": (lambda: at(2.0, hiss(-12, 0.12) * np.exp(-np.linspace(0, 4, 5760, dtype=np.float32))), False),
    "quiet speech": (lambda: speech(-40), False),
    "very quiet speech": (lambda: speech(-50), False),
    "quiet hiss": (lambda: hiss(-58), False),
    "one channel only": (lambda: tone(440, -40) * np.array([[1], [0]], np.float32), False),
    "sound at the end": (lambda: at(4.8, tone(440, -30, 0.2)), False),
    "silence of a short clip": (lambda: np.zeros((2, 2000), np.float32), True),
    "a sound of a short clip": (lambda: tone(440, -30, 1 / 24), False),
    "a short sound in a short clip": (lambda: np.pad(tone(440, -30, 0.01), ((0, 0), (0, 1520))), False),
    "no sample": (lambda: np.zeros((2, 0), np.float32), True),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUNDS)
def test_silent(name):
    make, silent = SOUNDS[name]
    sound = make().astype(np.float32)
    found = measure_sound(sound)
    assert found.flags(sound.shape[1] / RATE) == (("silent",) if silent else ()), found


def test_without_a_sound_track_there_is_no_flag():
    assert SoundMeasures().flags(SECONDS) == ()


def test_how_long_it_sounds():
    assert measure_sound(at(1.0, tone(1000, -30, 0.5))).sound_seconds == pytest.approx(0.5, abs=0.02)
    assert measure_sound(tone(1000, -30, 0.1234)).sound_seconds == pytest.approx(0.1234, abs=1 / RATE)
