"""The world: its wording, colours, sizes, paths, tones and held-out set are as docs/miniature.md says."""

import itertools
import random
import subprocess
import sys

import numpy as np
import pytest

from ltx_ray.miniature import measure, picture, sound, world
from ltx_ray.miniature.world import COLOURS, MOTIONS, SHAPES, SOUNDS, Scene


def some_clips(count, split="train", height=128, width=192, seed=3):
    return list(itertools.islice(world.clips(seed, split, width / height), count))


def frames_of(clip, num_frames=9, height=128, width=192):
    drawn = picture.draw_frames([clip], num_frames, height, width)[0]
    return ((drawn + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()


def test_canonical_prompt():
    say = world.canonical_prompt
    assert (
        say(Scene("circle", "red", "left", "blue", "low")) == "a red circle moves left over a blue ground, a low tone"
    )
    assert say(Scene("star", "orange", "still", "white", "silent")) == (
        "a orange star stays still over a white ground, silence"
    )
    moves = {say(Scene("star", "red", m, "blue", "low")).split(" over")[0].split("star ")[1] for m in MOTIONS}
    assert moves == {"moves left", "moves right", "moves up", "moves down", "stays still", "grows", "shrinks"}
    tones = {say(Scene("star", "red", "up", "blue", s)).split(", ")[1] for s in SOUNDS}
    assert tones == {"silence", "a low tone", "a middle tone", "a high tone", "a rising tone"}
    assert world.prompts(Scene("star", "red", "up", "blue", "low"))[0] == say(Scene("star", "red", "up", "blue", "low"))


def test_a_scene_is_checked():
    with pytest.raises(ValueError, match=r"Scene\.shape is 'cube'; legal is circle"):
        Scene("cube", "red", "left", "blue", "low")
    with pytest.raises(ValueError, match=r"Scene\.ground is 'red'"):
        Scene("circle", "red", "left", "red", "low")
    with pytest.raises(ValueError, match="split is 'test'"):
        world.scenes("test")


def test_the_held_out_set_is_apart_and_leaves_training_every_pair_of_words():
    train, held = world.scenes("train"), world.scenes("held_out")
    assert not set(train) & set(held)
    assert len(train) + len(held) == 4 * 8 * 7 * 7 * 5
    assert 0.1 < len(held) / (len(train) + len(held)) < 0.15
    fields = ("shape", "colour", "motion", "ground", "sound")
    pairs = lambda scenes: {  # noqa: E731
        (a, getattr(s, a), b, getattr(s, b)) for s in scenes for a, b in itertools.combinations(fields, 2)
    }
    assert pairs(train) == pairs(train + held)
    scene = train[0]
    assert not set(world.prompts(scene)) & set(world.prompts(scene, "held_out"))
    words = lambda split: {  # noqa: E731
        w.strip(",.:") for s in train[::97] for p in world.prompts(s, split) for w in p.split()
    }
    assert words("held_out") - words("train") <= {"one", "in"}


def test_clips_are_the_same_for_the_same_seed_and_of_their_split():
    assert some_clips(20) == some_clips(20)
    assert some_clips(20) != some_clips(20, seed=4)
    assert all(world.is_held_out(c.scene) for c in some_clips(50, "held_out"))
    assert not any(world.is_held_out(c.scene) for c in some_clips(50))
    prompts = [c.prompt for c in some_clips(60, "held_out")]
    canonical = [world.canonical_prompt(c.scene) for c in some_clips(60, "held_out")]
    assert 5 < sum(map(str.__eq__, prompts, canonical)) < 40


@pytest.mark.parametrize("height, width", [(128, 192), (64, 448), (320, 128)])
def test_sizes_and_paths(height, width):
    short = min(height, width)
    for clip in some_clips(300, height=height, width=width):
        motion = clip.scene.motion
        for (x, y), size in ((clip.start, clip.start_size), (clip.end, clip.end_size)):
            assert 0.25 <= size <= 0.40
            half = size * short / 2
            assert half <= x * width <= width - half and half <= y * height <= height - half
        dx, dy = clip.end[0] - clip.start[0], clip.end[1] - clip.start[1]
        want = world.DIRECTIONS.get(motion, (0, 0))
        assert (np.sign(dx), np.sign(dy)) == want
        assert abs(dx) >= 0.25 * abs(want[0]) and abs(dy) >= 0.25 * abs(want[1])
        area = (clip.end_size / clip.start_size) ** 2
        assert {"growing": area >= 2, "shrinking": area <= 0.5}.get(motion, area == 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("height, width", [(128, 192), (256, 160)])
def test_what_is_drawn_can_be_measured(shape, height, width):
    rng = random.Random(5)
    for motion, (colour, ground) in zip(MOTIONS, itertools.permutations(COLOURS, 2)):
        scene = Scene(shape, colour, motion, ground, "low")
        clip = world.draw_clip(rng, "train", width / height, scene)
        frames = frames_of(clip, 9, height, width)
        seen = [measure.read_frame(frame) for frame in frames]
        assert {s.shape for s in seen} == {shape}
        assert measure.classify_motion(seen[0], seen[-1], height, width) == motion
        for s in seen:
            assert tuple(s.ground) == COLOURS[ground] and tuple(s.colour) == COLOURS[colour]
        if shape in ("circle", "square"):
            assert seen[0].centre == pytest.approx((clip.start[0] * width, clip.start[1] * height), abs=0.1)
            side = clip.start_size * min(height, width)
            assert seen[0].area == pytest.approx(side**2 * (1 if shape == "square" else np.pi / 4), rel=0.02)


@pytest.mark.parametrize("num_frames", [1, 9, 121])
def test_a_path_does_not_depend_on_length(num_frames):
    clip = some_clips(1)[0]
    frames = frames_of(clip, num_frames)
    assert frames.shape == (num_frames, 128, 192, 3)
    assert (frames[0] == frames_of(clip, 9)[0]).all()
    if num_frames > 1:
        assert (frames[-1] == frames_of(clip, 9)[-1]).all()


def test_corners_and_edges_are_smooth_and_whole():
    for clip in some_clips(12):
        frame = frames_of(clip, 1)[0]
        border = np.concatenate([frame[0], frame[-1], frame[:, 0], frame[:, -1]])
        assert (border == border[0]).all()
        assert len(np.unique(frame.reshape(-1, 3), axis=0)) > 2 or clip.scene.shape == "square"


@pytest.mark.parametrize("rate", [16000, 48000])
@pytest.mark.parametrize("seconds", [0.4, 1.375, 5.04])
def test_sounds(rate, seconds):
    for name in SOUNDS:
        wave = sound.make_sound(name, seconds, rate, phase=0.3)
        assert wave.shape == (2, round(seconds * rate)) and wave.dtype == np.float32
        assert (wave[0] == wave[1]).all()
        assert measure.classify_sound(wave, rate) == name
        if name == "silent":
            assert not wave.any()
        else:
            assert measure.level_dbfs(wave) == pytest.approx(-20, abs=0.1)
            assert abs(wave).max() == pytest.approx(0.1, rel=0.01)
    for name, hertz in (("low", 220), ("middle", 440), ("high", 880)):
        assert measure.pitch(sound.make_sound(name, seconds, rate), rate) == pytest.approx(hertz, rel=0.003)


def test_the_rising_tone_runs_from_220_to_880():
    wave = sound.make_sound("rising", 8.0, 16000)
    assert measure.pitch(wave[:, :800], 16000) == pytest.approx(222, rel=0.03)
    assert measure.pitch(wave[:, -800:], 16000) == pytest.approx(876, rel=0.02)
    assert sound.frequency("rising", np.array([0.0, 0.5, 1.0])) == pytest.approx([220, 440, 880])


def test_largest_component():
    mask = np.zeros((6, 8), bool)
    mask[0, 0] = mask[0, 7] = True
    mask[2:5, 1] = mask[2:5, 3] = mask[4, 2] = True  # one U
    mask[3, 5:7] = True
    assert measure.largest_component(mask).sum() == 7
    assert measure.largest_component(np.zeros((3, 3), bool)).sum() == 0


def test_import_is_cheap():
    code = "import sys, ltx_ray.miniature.world; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "[]"
