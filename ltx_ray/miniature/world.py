"""The small world: what a clip shows and sounds like, how prompts say it, and which of it training never sees.

A scene is one object on one ground with one sound. A clip is a scene with a place, a size and a path for the object.
Places and sizes are fractions of the frame, so one clip can be drawn at any size, length and frame rate.

No torch here: `picture.py` draws frames and `sound.py` makes sound.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cache

#: sRGB, 0 to 255.
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

#: Direction of the path as (x, y) in the frame, y downwards.
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
#: Width of an object's bounding box as a fraction of the frame's shorter side.
SIZES = (0.25, 0.40)
#: Length of a path as a fraction of the frame's width or height. The rule is at least 0.25.
PATHS = (0.30, 0.55)
#: By how much the width of a growing object grows. Twofold in area is 1.414.
GROWTHS = (1.48, 1.60)
#: Distance that an object keeps from the frame's edges, as a fraction of the shorter side.
MARGIN = 0.02


@dataclass(frozen=True)
class Scene:
    """What a prompt says. Raises ValueError naming the field, its value and what is legal."""

    shape: str
    colour: str
    motion: str
    ground: str
    sound: str

    def __post_init__(self):
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
#: The first is the one that documents and tests use. `{moves}` and `{sound}` take any of the words above.
_PHRASINGS = (
    "a {colour} {shape} {moves} over a {ground} ground, {sound}",
    "over a {ground} ground a {colour} {shape} {moves}, {sound}",
    "{sound}, and a {colour} {shape} {moves} on {ground}",
    "on a plain {ground} background the {colour} {shape} {moves} while one hears {sound}",
    "the ground is {ground}. a {shape} in {colour} {moves}. the sound: {sound}",
    "{colour} {shape}, {ground} background, it {moves}, {sound}",
    "we see a {shape} that is {colour} and {moves}. behind it all is {ground}. we hear {sound}",
)
#: Orders of words that training never sees; the words themselves it does.
_HELD_OUT_PHRASINGS = (
    "we hear {sound} while over {ground} a {colour} {shape} {moves}",
    "{ground} ground, {sound}, one {shape} in {colour} that {moves}",
)


def canonical_prompt(scene: Scene) -> str:
    """The prompt in its first phrasing: `a red circle moves left over a blue ground, a low tone`."""
    return _PHRASINGS[0].format(
        shape=scene.shape,
        colour=scene.colour,
        ground=scene.ground,
        moves=_MOVES[scene.motion][0],
        sound=_SOUND_WORDS[scene.sound][0],
    )


def prompts(scene: Scene, split: str = "train") -> list[str]:
    """Every prompt for a scene in the phrasings of a split, the canonical one first among those of "train"."""
    _check_split(split)
    return [
        phrasing.format(shape=scene.shape, colour=scene.colour, ground=scene.ground, moves=moves, sound=sound)
        for phrasing in (_PHRASINGS if split == "train" else _HELD_OUT_PHRASINGS)
        for moves in _MOVES[scene.motion]
        for sound in _SOUND_WORDS[scene.sound]
    ]


# --- which scenes there are -----------------------------------------------------------------------------------------


def _check_split(split: str):
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; legal is {' or '.join(SPLITS)}")


def is_held_out(scene: Scene) -> bool:
    """Whether training never sees this combination. One in eight is held out, chosen by a digest of its words."""
    return hashlib.sha256(" ".join(astuple(scene)).encode()).digest()[0] % 8 == 0


@cache
def scenes(split: str) -> tuple[Scene, ...]:
    """Every scene of a split, always in the same order."""
    _check_split(split)
    grid = itertools.product(SHAPES, COLOURS, MOTIONS, COLOURS, SOUNDS)
    every = (Scene(*words) for words in grid if words[1] != words[3])
    return tuple(scene for scene in every if is_held_out(scene) == (split == "held_out"))


# --- clips ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """A scene with its object's place, size and path, for a frame of a given ratio of width to height.

    Centres (x, y) are fractions of width and height, from the left and the top. Sizes are the width of the object's
    bounding box as fractions of the frame's shorter side. `start` is what the first frame shows and `end` what the
    last one shows; between them all change evenly. A clip of one frame shows the start.
    """

    scene: Scene
    prompt: str
    start: tuple[float, float]
    end: tuple[float, float]
    start_size: float
    end_size: float


def draw_clip(rng: random.Random, split: str, aspect: float, scene: Scene | None = None) -> Clip:
    """A clip drawn from `rng` for frames of `aspect` = width / height.

    Scene and phrasing are of `split`; a given `scene` replaces the drawn one. The held-out phrasings and the
    canonical one are equally likely in prompts of the split "held_out".
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


def _draw_path(rng: random.Random, motion: str, size: float, aspect: float):
    """Centres in the first and the last frame, so that the object stays whole all the way."""
    short = min(aspect, 1.0)
    keep = size / 2 + MARGIN
    rooms = tuple((keep * short / side, 1 - keep * short / side) for side in (aspect, 1.0))
    start, end = [], []
    for (low, high), direction in zip(rooms, DIRECTIONS.get(motion, (0, 0))):
        length = direction * rng.uniform(PATHS[0], min(PATHS[1], high - low)) if direction else 0.0
        at = rng.uniform(max(low, low - length), min(high, high - length))
        start.append(at)
        end.append(at + length)
    return tuple(start), tuple(end)


def clips(seed: int, split: str, aspect: float) -> Iterator[Clip]:
    """Clips without end, always the same for the same arguments."""
    rng = random.Random(f"{seed} {split} {aspect:.6f}")
    while True:
        yield draw_clip(rng, split, aspect)
