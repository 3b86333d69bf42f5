"""The world of the miniature: its scenes, their prompts, its clips, and the scenes held out from training.

A scene is one object on one ground with one sound. A clip is a scene in which the object has a place, a size and a
path. Places and sizes are fractions of the frame, so a clip can be drawn at any size, length and frame rate.

`picture.py` draws frames and `sound.py` makes sound. This module imports neither torch nor numpy.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cache

#: Name -> sRGB, 0 to 255.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 220, 50),
    "orange": (240, 140, 30),
    "purple": (140, 60, 170),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "star")
MOTIONS = ("left", "right", "up", "down", "still", "growing", "shrinking")
SOUNDS = ("silent", "low", "middle", "high", "rising")
SPLITS = ("train", "held_out")

#: Direction of the path as (x, y) in the frame; y points downwards.
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
#: Least and greatest width of the object's bounding box, as fractions of the frame's shorter side.
SIZES = (0.25, 0.40)
#: Least and greatest length of a path, as fractions of the frame's width or height.
PATHS = (0.30, 0.55)
#: Least and greatest factor by which the width of a growing object grows. The area at least doubles.
GROWTHS = (1.48, 1.60)
#: Least distance of the object from the frame's edges, as a fraction of the shorter side.
MARGIN = 0.02


@dataclass(frozen=True)
class Scene:
    """The content of a prompt. Raises ValueError that names the field, its value and what is legal."""

    shape: str
    colour: str
    motion: str
    ground: str
    sound: str

    def __post_init__(self) -> None:
        legal = {"shape": SHAPES, "colour": COLOURS, "motion": MOTIONS, "ground": COLOURS, "sound": SOUNDS}
        for field, values in legal.items():
            value = getattr(self, field)
            if value not in values:
                raise ValueError(f"Scene.{field} is {value!r}; legal is {', '.join(values)}")
        if self.colour == self.ground:
            raise ValueError(f"Scene.ground is {self.ground!r}; legal is a colour other than the object's")


# --- prompts -----------------------------------------------------------------------------------------------------

_MOVES = {
    "left": ("moves left", "slides to the left", "goes left"),
    "right": ("moves right", "slides to the right", "goes right"),
    "up": ("moves up", "climbs upwards", "goes up"),
    "down": ("moves down", "sinks downwards", "goes down"),
    "still": ("stays still", "does not move", "rests"),
    "growing": ("grows", "gets larger", "becomes bigger"),
    "shrinking": ("shrinks", "gets smaller", "becomes tiny"),
}
_SOUND_WORDS = {
    "silent": ("silence", "no sound", "quiet"),
    "low": ("a low tone", "a deep tone", "a low hum"),
    "middle": ("a middle tone", "a medium tone", "a middle hum"),
    "high": ("a high tone", "a bright tone", "a high hum"),
    "rising": ("a rising tone", "a climbing tone", "a rising hum"),
}
#: The first is the canonical phrasing. `{moves}` and `{sound}` take any of the wordings above.
_PHRASINGS = (
    "a {colour} {shape} {moves} over a {ground} ground, {sound}",
    "over a {ground} ground a {colour} {shape} {moves}, {sound}",
    "{sound}, and a {colour} {shape} {moves} on {ground}",
    "on a plain {ground} background the {colour} {shape} {moves} while one hears {sound}",
    "the ground is {ground}. a {shape} in {colour} {moves}. the sound: {sound}",
    "{colour} {shape}, {ground} background, it {moves}, {sound}",
    "we see a {shape} that is {colour} and {moves}. behind it all is {ground}. we hear {sound}",
)
#: Training never sees these phrasings. It sees nearly all their words in other phrasings.
_HELD_OUT_PHRASINGS = (
    "we hear {sound} while over {ground} a {colour} {shape} {moves}",
    "{ground} ground, {sound}, one {shape} in {colour} that {moves}",
)


def canonical_prompt(scene: Scene) -> str:
    """The prompt in the canonical phrasing: `a red circle moves left over a blue ground, a low tone`."""
    return _PHRASINGS[0].format(
        shape=scene.shape,
        colour=scene.colour,
        ground=scene.ground,
        moves=_MOVES[scene.motion][0],
        sound=_SOUND_WORDS[scene.sound][0],
    )


def prompts(scene: Scene, split: str = "train") -> list[str]:
    """Every prompt for a scene in the phrasings of a split. The canonical prompt is the first of "train"."""
    _check_split(split)
    return [
        phrasing.format(shape=scene.shape, colour=scene.colour, ground=scene.ground, moves=moves, sound=sound)
        for phrasing in (_PHRASINGS if split == "train" else _HELD_OUT_PHRASINGS)
        for moves in _MOVES[scene.motion]
        for sound in _SOUND_WORDS[scene.sound]
    ]


def wordings(word: str) -> tuple[str, ...]:
    """The wordings of a motion or of a sound in prompts, the canonical one first. Raises KeyError for other words."""
    return _MOVES[word] if word in _MOVES else _SOUND_WORDS[word]


@cache
def words() -> tuple[str, ...]:
    """Every word of the prompts of both splits, in alphabetical order."""
    phrasings = (re.sub(r"\{\w+\}", "", phrasing) for phrasing in _PHRASINGS + _HELD_OUT_PHRASINGS)
    wordings = itertools.chain(*_MOVES.values(), *_SOUND_WORDS.values())
    return tuple(sorted({*COLOURS, *SHAPES, *re.findall(r"\w+", " ".join((*phrasings, *wordings)))}))


# --- scenes ------------------------------------------------------------------------------------------------------


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; legal is {' or '.join(SPLITS)}")


def is_held_out(scene: Scene) -> bool:
    """Whether training leaves out this scene. A digest of its words chooses one in eight."""
    return hashlib.sha256(" ".join(astuple(scene)).encode()).digest()[0] % 8 == 0


@cache
def scenes(split: str) -> tuple[Scene, ...]:
    """Every scene of a split, in a fixed order."""
    _check_split(split)
    grid = itertools.product(SHAPES, COLOURS, MOTIONS, COLOURS, SOUNDS)
    every = (Scene(*words) for words in grid if words[1] != words[3])
    return tuple(scene for scene in every if is_held_out(scene) == (split == "held_out"))


# --- clips ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """A scene with the place, size and path of its object, made for one aspect ratio.

    `start` and `end` are the object's centres (x, y) in the first and the last frame, as fractions of width and height
    from the left and the top. `start_size` and `end_size` are widths of its bounding box, as fractions of the frame's
    shorter side. Centre and size change linearly from frame to frame. A clip of one frame shows the start.
    """

    scene: Scene
    prompt: str
    start: tuple[float, float]
    end: tuple[float, float]
    start_size: float
    end_size: float


def draw_clip(rng: random.Random, split: str, aspect: float, scene: Scene | None = None) -> Clip:
    """A random clip for frames of `aspect` = width / height.

    Scene and phrasing belong to `split`, unless `scene` is given. In the split "held_out" one prompt in three is in the
    canonical phrasing, so the three phrasings are equally likely.
    """
    scene = scene or rng.choice(scenes(split))
    words = prompts(scene, split)
    prompt = rng.choice(words)
    if split == "held_out" and rng.random() < 1 / 3:
        prompt = canonical_prompt(scene)

    if scene.motion in ("growing", "shrinking"):
        growth = rng.uniform(*GROWTHS)
        small = rng.uniform(SIZES[0], SIZES[1] / growth)
        sizes = (small, small * growth) if scene.motion == "growing" else (small * growth, small)
    else:
        sizes = (rng.uniform(*SIZES),) * 2
    start, end = _draw_path(rng, scene.motion, max(sizes), aspect)
    return Clip(scene, prompt, start, end, *sizes)


def _draw_path(
    rng: random.Random, motion: str, size: float, aspect: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Centres in the first and the last frame; between them the object stays inside the frame."""
    short = min(aspect, 1.0)
    clearance = size / 2 + MARGIN
    bounds = tuple((clearance * short / side, 1 - clearance * short / side) for side in (aspect, 1.0))
    start, end = [], []
    for (low, high), direction in zip(bounds, DIRECTIONS.get(motion, (0, 0))):
        length = direction * rng.uniform(PATHS[0], min(PATHS[1], high - low)) if direction else 0.0
        at = rng.uniform(max(low, low - length), min(high, high - length))
        start.append(at)
        end.append(at + length)
    return (start[0], start[1]), (end[0], end[1])


def clips(seed: int, split: str, aspect: float) -> Iterator[Clip]:
    """An endless sequence of clips that depends only on the arguments."""
    rng = random.Random(f"{seed} {split} {aspect:.6f}")
    while True:
        yield draw_clip(rng, split, aspect)
