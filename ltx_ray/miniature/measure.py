"""Plain rules that read a clip: the colours, shape and motion of its object, and the pitch and level of its sound.

No neural network is involved. Frames are (F, H, W, 3) uint8, sound is (channels, samples) float in [-1, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ltx_ray.miniature.sound import TONES
from ltx_ray.miniature.world import COLOURS

#: A pixel may belong to the object when its colour differs from the ground's by more than this (sRGB units).
_OBJECT_DISTANCE = 45.0
#: An edge is looked for within this fraction of the shorter side around the object.
_EDGE_REACH = 0.05
#: Shape -> its number of corners or points, and its symmetry of that order (`FrameReading.symmetries`). A circle has
#: none.
_SYMMETRIES = {"triangle": (3, 0.659), "square": (4, 0.429), "star": (5, 0.883)}
#: A shape with less than this fraction of each of these symmetries is a circle.
_LEAST_SYMMETRY = 0.4
#: A path shorter than this fraction of width or height counts as still.
_SHORTEST_PATH = 0.15
#: Growing and shrinking change the area by more than this factor.
_LEAST_GROWTH = 1.5
#: A tone is recognised when its pitch is off by at most this factor.
_PITCH_TOLERANCE = 1.06
#: A sound below this level counts as silent.
_SILENT_DBFS = -45.0


def nearest_colour(rgb: np.ndarray) -> str:
    """Name of the colour of the world nearest to (r, g, b) in 0 to 255."""
    return min(COLOURS, key=lambda name: float(np.square(np.asarray(COLOURS[name]) - rgb).sum()))


@dataclass(frozen=True)
class FrameReading:
    """What was read from one frame.

    `ground` and `colour` are (r, g, b) in 0 to 255. `centre` (x, y) and `area` are in pixels, and `mask` (H, W) covers
    the object. `symmetries` are |sum of z^k| / sum of |z|^k over the object for k = 3, 4, 5, where z = x + iy counts
    from its centre: how far it looks the same after a turn by 1/k. Without an object, `colour` is None and the numbers
    are 0.
    """

    ground: np.ndarray
    colour: np.ndarray | None
    centre: tuple[float, float]
    area: float
    symmetries: tuple[float, ...]
    mask: np.ndarray

    @property
    def shape(self) -> str:
        """The shape whose symmetry the object has most of; "circle" when it has none, or there is no object.

        Soft corners lower a symmetry and leave its order. Any size has the same symmetries.
        """
        have = {name: found / _SYMMETRIES[name][1] for name, found in zip(_SYMMETRIES, self.symmetries, strict=True)}
        best = max(have, key=lambda name: have[name])
        return best if have[best] >= _LEAST_SYMMETRY else "circle"


def read_frame(frame: np.ndarray) -> FrameReading:
    """Read one frame (H, W, 3) uint8.

    The ground is the median colour along the edges. The object is the largest connected part of another colour.
    """
    pixels = frame.astype(np.float32)
    edge = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]])
    ground = np.median(edge, axis=0)
    mask = largest_component(np.sqrt(np.square(pixels - ground).sum(-1)) > _OBJECT_DISTANCE)
    if mask.sum() < 16:
        return FrameReading(ground, None, (0.0, 0.0), 0.0, (0.0,) * len(_SYMMETRIES), mask)
    inner = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    core = pixels[1:-1, 1:-1][inner] if inner.any() else pixels[mask]
    colour = np.median(core, axis=0)
    # A pixel on the object's edge mixes both colours; the mixture says how much of the pixel is covered.
    span = colour - ground
    cover = ((pixels - ground) @ span / max(float(span @ span), 1.0)).clip(0, 1)
    cover = np.where(_dilated(mask), cover, 0.0)
    area = float(cover.sum())
    rows, columns = cover.sum(1), cover.sum(0)
    x, y = (float((cover_1d * (np.arange(cover_1d.size) + 0.5)).sum() / area) for cover_1d in (columns, rows))
    return FrameReading(ground, colour, (x, y), area, _symmetries(cover, x, y), mask)


def _symmetries(cover: np.ndarray, x: float, y: float) -> tuple[float, ...]:
    """`FrameReading.symmetries` of an object that covers pixels (H, W) by fractions and has its centre at (x, y)."""
    rows, columns = np.nonzero(cover)
    z = (columns + 0.5 - x) + 1j * (rows + 0.5 - y)
    weights = cover[rows, columns]
    found = []
    for order, _ in _SYMMETRIES.values():
        scale = float((weights * np.abs(z) ** order).sum())
        found.append(float(abs((weights * z**order).sum())) / max(scale, 1e-9))
    return tuple(found)


def edge_width(frame: np.ndarray) -> float:
    """Mean width in pixels of the object's edge in one frame (H, W, 3) uint8; 0 without an object.

    It is the area in which colours of the object and of the ground are mixed, from a tenth to nine tenths, over the
    length of the edge. Where an edge is one pixel wide it is about 1.
    """
    seen = read_frame(frame)
    if seen.colour is None:
        return 0.0
    pixels, span = frame.astype(np.float32), seen.colour - seen.ground
    cover = (pixels - seen.ground) @ span / max(float(span @ span), 1.0)
    near = seen.mask
    for _ in range(max(2, round(min(frame.shape[:2]) * _EDGE_REACH))):
        near = _dilated(near)
    mixed = float((near & (cover > 0.1) & (cover < 0.9)).sum())
    half = (near & (cover > 0.5)).astype(np.int8)
    # Sides between pixels are longer than the line that they follow: by 4 / pi on average over its directions.
    sides = float(abs(np.diff(half, axis=0)).sum() + abs(np.diff(half, axis=1)).sum())
    return mixed / max(sides * math.pi / 4, 1.0)


def _dilated(mask: np.ndarray) -> np.ndarray:
    """The mask and the pixels that touch it along a side."""
    wide = np.pad(mask, 1)
    return wide[1:-1, 1:-1] | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest part of a mask (H, W) whose pixels are connected along their sides."""
    parents: list[int] = []
    # Row, first column and end column of each horizontal run; a run's index is its label.
    runs: list[tuple[int, int, int]] = []

    def root(label: int) -> int:
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

    above: list[int] = []
    for row, pixels in enumerate(mask):
        steps = np.flatnonzero(np.diff(np.concatenate(([0], pixels.astype(np.int8), [0]))))
        here = []
        for first, end in zip(steps[::2], steps[1::2]):
            label = len(runs)
            runs.append((row, int(first), int(end)))
            parents.append(label)
            for other in above:
                if runs[other][1] < end and first < runs[other][2]:
                    parents[root(other)] = root(label)
            here.append(label)
        above = here
    sizes: dict[int, int] = {}
    for label, (_, first, end) in enumerate(runs):
        sizes[root(label)] = sizes.get(root(label), 0) + end - first
    largest = np.zeros_like(mask)
    if sizes:
        best = max(sizes, key=lambda label: sizes[label])
        for label, (row, first, end) in enumerate(runs):
            if root(label) == best:
                largest[row, first:end] = True
    return largest


def classify_motion(first: FrameReading, last: FrameReading, height: int, width: int) -> str:
    """Name of the motion between the first and the last frame of a clip; `height` and `width` in pixels."""
    ratio = last.area / max(first.area, 1.0)
    if ratio > _LEAST_GROWTH or ratio < 1 / _LEAST_GROWTH:
        return "growing" if ratio > 1 else "shrinking"
    dx = (last.centre[0] - first.centre[0]) / width
    dy = (last.centre[1] - first.centre[1]) / height
    if max(abs(dx), abs(dy)) < _SHORTEST_PATH:
        return "still"
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


# --- sound -------------------------------------------------------------------------------------------------------


def pitch(sound: np.ndarray, rate: int) -> float:
    """Hz of the strongest frequency above 50 Hz, or 0 for digital silence.

    A parabola through the logarithms of the FFT's peak and its neighbours places it between bins.
    """
    wave = np.asarray(sound, np.float64)
    wave = wave.mean(0) if wave.ndim == 2 else wave
    size = 1 << max(wave.size - 1, 1).bit_length()
    power = np.abs(np.fft.rfft(wave * np.hanning(wave.size), size))
    power[: int(50 * size / rate) + 1] = 0
    peak = int(power.argmax())
    if power[peak] == 0:
        return 0.0
    if 0 < peak < power.size - 1:
        left, mid, right = np.log(power[peak - 1 : peak + 2] + 1e-12)
        bend = left - 2 * mid + right
        return float((peak + (0.5 * (left - right) / bend if bend else 0)) * rate / size)
    return float(peak * rate / size)


def level_dbfs(sound: np.ndarray) -> float:
    """RMS level in dBFS, where a sine from -1 to 1 has 0 dBFS."""
    return float(10 * np.log10(2 * np.mean(np.square(np.asarray(sound, np.float64))) + 1e-12))


def classify_sound(sound: np.ndarray, rate: int) -> str:
    """Name of the world's sound that this is, or "other"."""
    if level_dbfs(sound) < _SILENT_DBFS:
        return "silent"
    quarter = max(sound.shape[-1] // 4, 1)
    ends = pitch(sound[..., :quarter], rate), pitch(sound[..., -quarter:], rate)
    # A tone rising by two octaves has 1.19 times its first pitch on average in the first quarter, 3.36 in the last.
    if ends[0] < 330 and ends[1] > 550:
        return "rising"
    if max(ends) > min(ends) * _PITCH_TOLERANCE**2:
        return "other"
    whole = pitch(sound, rate)
    for name, hertz in TONES.items():
        if hertz / _PITCH_TOLERANCE < whole < hertz * _PITCH_TOLERANCE:
            return name
    return "other"
