"""Drawn clips, encoded as the dataset encodes them, are read as what they are, and wrong ones are not."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from ltx_ray.miniature import judge, measure, picture, sound, world
from ltx_ray.shapes import ClipShape
from scripts.clip_quality.rendering import read_mp4
from tests.support.drawn_clips import write_drawn

JUDGED = ClipShape(33, 256, 384, 24.0)


def held_out(shape, count, seed):
    return list(itertools.islice(world.clips(seed, "held_out", shape.width / shape.height), count))


def reading(tmp_path, clip, shape, audio=None):
    frames, heard, rate, frame_rate = read_mp4(write_drawn(tmp_path / "clip.mp4", clip, shape, audio))
    assert frames.shape == (shape.num_frames, shape.height, shape.width, 3)
    return judge.read_clip(frames, heard, rate, frame_rate)


def wrong(clip, read):
    return {name for name, right in read.rights(clip.scene).items() if not right}


@pytest.mark.parametrize(
    "shape, count, seed",
    [
        (JUDGED, 4, 1),
        (ClipShape(9, 256, 384, 24.0), 6, 2),
        (ClipShape(33, 128, 192, 24.0), 8, 3),
        (ClipShape(9, 128, 128, 60.0), 10, 4),
        (ClipShape(9, 64, 64, 24.0), 12, 12),
        (ClipShape(33, 64, 128, 24.0), 12, 13),
        pytest.param(JUDGED, 60, 5, marks=pytest.mark.slow),
        pytest.param(ClipShape(25, 384, 256, 30.0), 20, 6, marks=pytest.mark.slow),
        pytest.param(ClipShape(25, 192, 448, 29.97), 20, 7, marks=pytest.mark.slow),
        pytest.param(ClipShape(17, 256, 256, 12.0), 20, 8, marks=pytest.mark.slow),
        pytest.param(ClipShape(9, 512, 768, 24.0), 8, 9, marks=pytest.mark.slow),
        pytest.param(ClipShape(121, 128, 192, 24.0), 8, 10, marks=pytest.mark.slow),
        pytest.param(ClipShape(121, 256, 384, 24.0), 4, 11, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_clip_that_was_encoded_is_read_as_drawn(tmp_path, shape, count, seed):
    for clip in held_out(shape, count, seed):
        assert not wrong(clip, reading(tmp_path, clip, shape)), clip


@pytest.mark.parametrize("attribute", judge.ATTRIBUTES)
def test_a_clip_with_one_wrong_attribute_loses_that_one(tmp_path, attribute):
    rng = random.Random(attribute)
    values = {
        "ground": world.COLOURS, "colour": world.COLOURS, "shape": world.SHAPES,
        "motion": world.MOTIONS, "sound": world.SOUNDS,
    }[attribute]  # fmt: skip
    shape = ClipShape(9, 256, 384, 24.0)
    for clip in held_out(shape, 3, seed=12):
        taken = {clip.scene.ground, clip.scene.colour, getattr(clip.scene, attribute)}
        other = replace(clip.scene, **{attribute: rng.choice([v for v in values if v not in taken])})
        drawn = world.draw_clip(rng, "train", shape.width / shape.height, other)
        assert wrong(clip, reading(tmp_path, drawn, shape)) == {attribute}


def test_a_sound_must_last_as_long_as_the_picture(tmp_path):
    shape = JUDGED
    clip = next(c for c in held_out(shape, 20, seed=13) if c.scene.sound == "high")
    whole = sound.make_sound("high", shape.seconds)
    half = whole.shape[1] // 2
    late = np.concatenate([np.zeros((2, half), np.float32), whole[:, half:]], axis=1)
    for audio, read in (
        (whole[:, :half], "short"),
        (np.tile(whole, 2), "long"),
        (late, "broken"),
        (late[:, ::-1], "broken"),
        (np.zeros_like(whole), "silent"),
        (sound.make_sound("middle", shape.seconds), "middle"),
    ):
        assert reading(tmp_path, clip, shape, audio).sound == read


def test_a_clip_without_an_object_has_none():
    frames, silence = np.full((9, 64, 96, 3), 40, np.uint8), np.zeros((2, 18000))
    read = judge.read_clip(frames, silence, 48000, 24.0)
    assert (read.colour, read.shape, read.motion, read.sound) == ("none", "none", "none", "silent")


def test_the_first_frame_is_compared_with_an_image():
    clip = held_out(JUDGED, 1, seed=14)[0]

    def frame(clip):
        drawn = picture.draw_frames([clip], 1, 256, 384)[0, :, 0]
        return ((drawn + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()

    image = frame(clip)
    assert judge.starts_as_given(image, image)
    (x, y), size = clip.start, clip.start_size
    assert judge.starts_as_given(frame(replace(clip, start=(x + 0.02, y))), image)
    assert not judge.starts_as_given(frame(replace(clip, start=(x + 0.1 * (1 if x < 0.5 else -1), y))), image)
    assert not judge.starts_as_given(frame(replace(clip, start_size=size * 1.4)), image)
    other = next(c for c in world.COLOURS if c not in (clip.scene.colour, clip.scene.ground))
    assert not judge.starts_as_given(frame(replace(clip, scene=replace(clip.scene, colour=other))), image)
    assert not judge.starts_as_given(np.zeros_like(image), image)


def test_the_width_of_an_edge():
    """A box blur of 9 pixels spreads an upright edge over 9 pixels, of which four fifths are counted."""
    frame = np.full((128, 192, 3), 15, np.uint8)
    frame[40:88, 60:108] = 245
    sharp = measure.edge_width(frame)
    spread = np.stack([np.roll(frame, shift, axis=1) for shift in range(-4, 5)]).mean(0)
    soft = measure.edge_width(np.stack([np.roll(spread, s, axis=0) for s in range(-4, 5)]).mean(0).astype(np.uint8))
    assert sharp == 0
    assert 7 < soft < 11
    assert measure.edge_width(np.zeros((64, 64, 3), np.uint8)) == 0
    drawn = picture.draw_frames([held_out(JUDGED, 1, seed=15)[0]], 1, 256, 384)[0, :, 0]
    assert 0.4 < measure.edge_width(((drawn + 1) * 127.5).byte().permute(1, 2, 0).numpy()) < 1.5


def test_scores_count_what_is_right_and_what_is_taken_for_what():
    clips = held_out(JUDGED, 4, seed=16)
    right = [judge.Reading(**{name: getattr(c.scene, name) for name in judge.ATTRIBUTES}) for c in clips]
    read = [*right[:3], replace(right[3], shape="none")]
    assert judge.accuracy(clips, read) == {"ground": 1, "colour": 1, "shape": 0.75, "motion": 1, "sound": 1}
    assert judge.confusions(clips, read)["shape"] == [(clips[3].scene.shape, "none", 1)]
    assert judge.confusions(clips, read)["ground"] == []
