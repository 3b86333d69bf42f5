"""Makes the sound of clips, at any length and sample rate."""

from __future__ import annotations

import math

import numpy as np

#: Hz of the steady tones.
TONES = {"low": 220.0, "middle": 440.0, "high": 880.0}
#: Hz at the start and the end of the rising tone. Its pitch rises exponentially, by two octaves over the clip.
RISING = (220.0, 880.0)
#: RMS level of every tone.
LEVEL_DBFS = -20.0
#: Peak of a sine of this level; a sine from -1 to 1 has 0 dBFS.
AMPLITUDE = 10 ** (LEVEL_DBFS / 20)


def frequency(sound: str, at: np.ndarray) -> np.ndarray:
    """Pitch in Hz at the fractions `at` of the clip, 0 for silence. Raises KeyError for an unknown sound."""
    if sound == "silent":
        return np.zeros_like(at)
    if sound == "rising":
        return RISING[0] * (RISING[1] / RISING[0]) ** at
    return np.full_like(at, TONES[sound])


def make_sound(sound: str, seconds: float, rate: int = 48000, phase: float = 0.0) -> np.ndarray:
    """Two equal channels (2, round(seconds * rate)) float32 in [-1, 1]; `phase` is the first phase in turns."""
    samples = round(seconds * rate)
    time = np.arange(samples) / rate
    if sound == "silent":
        turns, level = np.zeros_like(time), 0.0
    elif sound == "rising":
        rate_of_rise = math.log(RISING[1] / RISING[0]) / seconds
        turns, level = RISING[0] * np.expm1(time * rate_of_rise) / rate_of_rise, AMPLITUDE
    else:
        turns, level = TONES[sound] * time, AMPLITUDE
    wave = level * np.sin(2 * np.pi * (turns + phase))
    return np.broadcast_to(wave.astype(np.float32), (2, samples)).copy()
