"""The loudness of a clip, and how long it is audible. No torch.

Source: Recommendation ITU-R BS.1770-4, annex 1: the K-weighting filter for 48 kHz (tables 1 and 2), the loudness of a
block (equation 2) and the gates (equations 3 to 7).
"""

from __future__ import annotations

import numpy as np

from ltx_ray.records import SoundMeasures
from ltx_ray.shapes import AUDIO_SAMPLE_RATE

#: The two filters of K-weighting: a shelf for the head, then a high-pass; (b, a) of each.
_K_WEIGHTING = (
    ((1.53512485958697, -2.69169618940638, 1.19839281085285), (1.0, -1.69065929318241, 0.73248077421585)),
    ((1.0, -2.0, 1.0), (1.0, -1.99004745483398, 0.99007225036621)),
)
#: Samples after which nothing is left of the filters' response in double precision: half a second.
_RESPONSE = AUDIO_SAMPLE_RATE // 2
#: Samples that are filtered at once, so that memory does not grow with the length of the clip.
_SEGMENT = 20 * AUDIO_SAMPLE_RATE
#: Samples of a window, 10 ms. A gating block has 40 of them, and the next one begins 10 later.
_WINDOW = AUDIO_SAMPLE_RATE // 100
_BLOCK_WINDOWS, _HOP_WINDOWS = 40, 10
#: The gates: LUFS of the absolute one, and LU of the relative one.
_ABSOLUTE_GATE, _RELATIVE_GATE = -70.0, -10.0
#: A window of 10 ms is audible from this loudness, which is that of a sine of 1 kHz with peaks of -60 dBFS.
_AUDIBLE_LUFS = -60.0


def measure_sound(sound: np.ndarray) -> SoundMeasures:
    """What is measured of stereo sound: float32 (2, samples) at 48 kHz in [-1, 1], finite."""
    samples = sound.shape[1]
    energies = _window_energies(sound)
    lengths = np.full(len(energies), float(_WINDOW))
    if samples % _WINDOW:
        lengths[-1] = samples % _WINDOW
    audible = energies >= lengths * _power(_AUDIBLE_LUFS)
    return SoundMeasures(
        loudness_lufs=_integrated(energies[: samples // _WINDOW]),
        clipped_samples=int(np.count_nonzero(np.abs(sound) >= 1.0)),
        sound_seconds=float(lengths[audible].sum()) / AUDIO_SAMPLE_RATE,
    )


def _power(lufs: float) -> float:
    """The mean square, summed over the channels, that has this loudness."""
    return 10.0 ** ((lufs + 0.691) / 10.0)


def _loudness(power: float) -> float:
    return float(-0.691 + 10.0 * np.log10(power))


def _integrated(energies: np.ndarray) -> float | None:
    """The integrated loudness of whole windows; None without a block above the absolute gate."""
    if len(energies) < _BLOCK_WINDOWS:
        return None
    sums = np.concatenate(([0.0], np.cumsum(energies)))
    starts = np.arange(0, len(energies) - _BLOCK_WINDOWS + 1, _HOP_WINDOWS)
    powers = (sums[starts + _BLOCK_WINDOWS] - sums[starts]) / (_BLOCK_WINDOWS * _WINDOW)
    powers = powers[powers > _power(_ABSOLUTE_GATE)]
    if not len(powers):
        return None
    return _loudness(float(powers[powers > _power(_loudness(powers.mean()) + _RELATIVE_GATE)].mean()))


def _window_energies(sound: np.ndarray) -> np.ndarray:
    """The sum of squares of K-weighted sound in each window, the last of which may be cut; both channels added up."""
    found = [np.zeros(0)]
    for start in range(0, sound.shape[1], _SEGMENT):
        # The samples before the segment still sound in it.
        before = min(start, _RESPONSE)
        part = _k_weighted(sound[:, start - before : start + _SEGMENT])[:, before:]
        power = np.square(part).sum(axis=0)
        found.append(np.add.reduceat(power, np.arange(0, len(power), _WINDOW)))
    return np.concatenate(found)


def _k_weighted(sound: np.ndarray) -> np.ndarray:
    """K-weighted sound (channels, samples), float64. Filtered by the response's spectrum: numpy has no recursion."""
    samples = sound.shape[1]
    # The response dies away in the padding, so that nothing comes round.
    size = _RESPONSE * -(-samples // _RESPONSE) + _RESPONSE
    z = np.exp(-2j * np.pi * np.arange(size // 2 + 1) / size)
    spectrum = np.fft.rfft(sound.astype(np.float64), size)
    for (b0, b1, b2), (a0, a1, a2) in _K_WEIGHTING:
        spectrum *= (b0 + z * (b1 + z * b2)) / (a0 + z * (a1 + z * a2))
    return np.fft.irfft(spectrum, size)[:, :samples]
