"""Plain rules that read a clip: colours, shape and path of its object, and the pitch and level of its sound.

No network is involved. Frames are (F, H, W, 3) uint8, sound is (channels, samples) float in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ltx_ray.miniature.world import COLOURS

#: A pixel whose colour is farther than this from the ground's (in sRGB units) may belong to the object.
_APART = 45.0
#: Part of its bounding box that each shape fills. The bounds lie between them.
_FILLS = (("star", 0.415), ("triangle", 0.64), ("circle", 0.89), ("square", 1.01))
#: Least path as a fraction of width or height, and least change of area, for a motion to count.
_PATH, _GROWTH = 0.15, 1.5
#: A tone counts as the one asked for when its pitch is off by no more than this factor.
_PITCH = 1.06
_PITCHES = {"low": 220.0, "middle": 440.0, "high": 880.0}
_SILENT_DBFS = -45.0


def nearest_colour(rgb: np.ndarray) -> str:
    """Name of the world's colour that is nearest to (r, g, b) in 0 to 255."""
    return min(COLOURS, key=lambda name: float(np.square(np.asarray(COLOURS[name]) - rgb).sum()))


@dataclass(frozen=True)
class Seen:
    """One frame: the colours (r, g, b) of ground and object, the object's centre (x, y) and area in pixels, how much
    of its bounding box it fills, and its mask (H, W). Without an object `colour` is None and the numbers are 0."""

    ground: np.ndarray
    colour: np.ndarray | None
    centre: tuple[float, float]
    area: float
    fill: float
    mask: np.ndarray

    @property
    def shape(self) -> str:
        """Name of the shape that fills its bounding box as this one does."""
        return next(name for name, bound in _FILLS if self.fill < bound or name == "square")


def look(frame: np.ndarray) -> Seen:
    """Read one frame (H, W, 3) uint8. The ground is what lies along the edges, the object the largest other thing."""
    pixels = frame.astype(np.float32)
    edge = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]])
    ground = np.median(edge, axis=0)
    mask = largest_component(np.sqrt(np.square(pixels - ground).sum(-1)) > _APART)
    if mask.sum() < 16:
        return Seen(ground, None, (0.0, 0.0), 0.0, 0.0, mask)
    inner = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    core = pixels[1:-1, 1:-1][inner] if inner.any() else pixels[mask]
    colour = np.median(core, axis=0)
    # half covered pixels are inside or outside by half of the way from ground to object
    span = colour - ground
    cover = ((pixels - ground) @ span / max(float(span @ span), 1.0)).clip(0, 1)
    cover = np.where(_grown(mask), cover, 0.0)
    area = float(cover.sum())
    rows, columns = cover.sum(1), cover.sum(0)
    centre = tuple(float((line * (np.arange(line.size) + 0.5)).sum() / area) for line in (columns, rows))
    box = _extent(cover.max(1)) * _extent(cover.max(0))
    return Seen(ground, colour, centre, area, area / box, mask)


def _grown(mask: np.ndarray) -> np.ndarray:
    wide = np.pad(mask, 1)
    return wide[1:-1, 1:-1] | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]


def _extent(line: np.ndarray) -> float:
    """Length of what a row or column covers, with its ends counted by how much they are covered."""
    inside = np.flatnonzero(line > 0.5)
    if inside.size == 0:
        return 1.0
    first, last = inside[0], inside[-1]
    ends = (line[first - 1] if first else 0) + (line[last + 1] if last + 1 < line.size else 0)
    return float(last - first + 1 + ends * 0.5)


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest part of a mask (H, W) whose pixels touch along their sides."""
    parents: list[int] = []
    runs: list[tuple[int, int, int]] = []  # row, first, one past the last; a run's index is its label

    def root(label: int) -> int:
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

    above: list[int] = []
    for row, line in enumerate(mask):
        steps = np.flatnonzero(np.diff(np.concatenate(([0], line.astype(np.int8), [0]))))
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


def motion_of(first: Seen, last: Seen, height: int, width: int) -> str:
    """Name of the motion between the first and the last frame of a clip."""
    ratio = last.area / max(first.area, 1.0)
    if ratio > _GROWTH or ratio < 1 / _GROWTH:
        return "growing" if ratio > 1 else "shrinking"
    dx = (last.centre[0] - first.centre[0]) / width
    dy = (last.centre[1] - first.centre[1]) / height
    if max(abs(dx), abs(dy)) < _PATH:
        return "still"
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


# --- sound -------------------------------------------------------------------------------------------------------


def pitch(sound: np.ndarray, rate: int) -> float:
    """Hz of the strongest frequency from 50 Hz on, by FFT, between bins by a parabola. 0 for digital silence."""
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
    """Level of a sound; a sine from -1 to 1 has 0 dBFS."""
    return float(10 * np.log10(2 * np.mean(np.square(np.asarray(sound, np.float64))) + 1e-12))


def sound_of(sound: np.ndarray, rate: int) -> str:
    """Name of the world's sound, or "other"."""
    if level_dbfs(sound) < _SILENT_DBFS:
        return "silent"
    quarter = max(sound.shape[-1] // 4, 1)
    ends = pitch(sound[..., :quarter], rate), pitch(sound[..., -quarter:], rate)
    # in its outer quarters a tone that rises by two octaves is on average 1.19 and 3.36 times its first pitch
    if ends[0] < 330 and ends[1] > 550:
        return "rising"
    if max(ends) > min(ends) * _PITCH**2:
        return "other"
    whole = pitch(sound, rate)
    for name, hertz in _PITCHES.items():
        if hertz / _PITCH < whole < hertz * _PITCH:
            return name
    return "other"
