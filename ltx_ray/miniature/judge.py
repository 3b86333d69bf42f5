"""Whether a clip shows and sounds like its scene: what is read off its frames and its sound, attribute by attribute."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from ltx_ray.miniature import measure
from ltx_ray.miniature.world import Clip, Scene

#: What a scene says, in the order in which scores are shown.
ATTRIBUTES = ("ground", "colour", "shape", "motion", "sound")
#: Frames of a clip, evenly spaced, that vote on colours and shape.
_VOTES = 5
#: Longest time, in seconds, by which sound and picture may differ in length: two frames of AAC.
_LENGTH_TOLERANCE = 2 * 1024 / 48000
#: A tone lasts to the end when each part of a clip, a tenth of it but at least this many seconds, is at most so much
#: below the whole. The engine pads the end with up to 0.05 s of silence.
_SHORTEST_PART, _QUIETER_DB = 0.1, 8.0
#: Largest distance between the object in the first frame and in a given image, of the shorter side, and largest factor
#: between their areas.
_PLACE_TOLERANCE, _AREA_TOLERANCE = 0.08, 1.4


@dataclass(frozen=True)
class Reading:
    """The value of each attribute that was read off a clip. "none" stands for an object that is not there.

    `sound` is "other" for a sound that the world does not have, "short" or "long" for one that does not last as long as
    the picture, and "broken" for a tone that does not last from the beginning to the end.
    """

    ground: str
    colour: str
    shape: str
    motion: str
    sound: str

    def rights(self, scene: Scene) -> dict[str, bool]:
        """Attribute -> whether it is as the scene says."""
        return {name: getattr(self, name) == getattr(scene, name) for name in ATTRIBUTES}


def read_clip(frames: np.ndarray, sound: np.ndarray, rate: int, frame_rate: float) -> Reading:
    """Read a clip: frames (F, H, W, 3) uint8, `frame_rate` of them a second; sound (channels, samples) in [-1, 1].

    Colours and shape are what most of a few frames show. The motion is read off the first and the last frame.
    """
    height, width = frames.shape[1:3]
    picked = sorted(set(np.linspace(0, len(frames) - 1, _VOTES).round().astype(int).tolist()))
    seen = [measure.read_frame(frames[i]) for i in picked]
    grounds = [measure.nearest_colour(frame.ground) for frame in seen]
    colours = ["none" if frame.colour is None else measure.nearest_colour(frame.colour) for frame in seen]
    shapes = ["none" if frame.colour is None else frame.shape for frame in seen]
    first, last = seen[0], seen[-1]
    lost = first.colour is None or last.colour is None
    motion = "none" if lost else measure.classify_motion(first, last, height, width)
    return Reading(
        ground=_most(grounds),
        colour=_most(colours),
        shape=_most(shapes),
        motion=motion,
        sound=_read_sound(sound, rate, len(frames) / frame_rate),
    )


def starts_as_given(frame: np.ndarray, image: np.ndarray) -> bool:
    """Whether the object of a clip's first frame has the place, size and colour of that in a given image.

    Both are (H, W, 3) uint8 of one size.
    """
    seen, given = measure.read_frame(frame), measure.read_frame(image)
    if seen.colour is None or given.colour is None:
        return False
    off = np.hypot(*np.subtract(seen.centre, given.centre)) / min(frame.shape[:2])
    factor = max(seen.area, given.area) / min(seen.area, given.area)
    same_colour = measure.nearest_colour(seen.colour) == measure.nearest_colour(given.colour)
    return bool(off <= _PLACE_TOLERANCE and factor <= _AREA_TOLERANCE and same_colour)


def accuracy(clips: list[Clip], readings: list[Reading]) -> dict[str, float]:
    """Attribute -> the fraction of clips that have it right, of at least one clip."""
    rights = [reading.rights(clip.scene) for clip, reading in zip(clips, readings, strict=True)]
    return {name: sum(right[name] for right in rights) / len(rights) for name in ATTRIBUTES}


def confusions(clips: list[Clip], readings: list[Reading]) -> dict[str, list[tuple[str, str, int]]]:
    """Attribute -> (asked for, read, how often) of every wrong value, the most frequent first."""
    found = {}
    for name in ATTRIBUTES:
        pairs = ((getattr(clip.scene, name), getattr(read, name)) for clip, read in zip(clips, readings, strict=True))
        counts = Counter(pair for pair in pairs if pair[0] != pair[1])
        found[name] = [(asked, read, count) for (asked, read), count in counts.most_common()]
    return found


def _most(values: list[str]) -> str:
    """The most frequent value, of equally frequent ones the first."""
    return Counter(values).most_common(1)[0][0]


def _read_sound(sound: np.ndarray, rate: int, seconds: float) -> str:
    lasts = sound.shape[-1] / rate
    if abs(lasts - seconds) > _LENGTH_TOLERANCE:
        return "short" if lasts < seconds else "long"
    name = measure.classify_sound(sound, rate)
    if name == "silent":
        return name
    whole = measure.level_dbfs(sound)
    count = min(10, max(1, int(lasts / _SHORTEST_PART)))
    levels = [measure.level_dbfs(part) for part in np.array_split(sound, count, axis=-1)]
    return name if min(levels) > whole - _QUIETER_DB else "broken"
