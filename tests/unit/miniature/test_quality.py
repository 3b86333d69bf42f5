"""scripts/quality.py: what it asks `ltx-ray render` for, and how it scores clips that are drawn instead of rendered."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from ltx_ray.cli.app import app
from ltx_ray.dataset.layout import clip_path, latents_path
from ltx_ray.engine import codec, components
from ltx_ray.miniature import export, picture, world
from ltx_ray.shapes import ClipShape
from scripts import quality
from scripts.clip_quality import rendering
from scripts.clip_quality.settings import Settings
from tests.support.drawn_clips import write_drawn
from tests.support.miniature_parts import random_parts

SMALL = ("--height", "128", "--width", "192", "--num-frames", "9")


class Drawing:
    """Draws clips in the place of `rendering.render`. `change` turns (number, clip) into the clip to draw, or None."""

    def __init__(self, change=lambda number, clip: clip):
        self.change = change

    def __call__(self, clips, settings, output):
        shape = ClipShape(settings.num_frames, settings.height, settings.width, settings.frame_rate)
        shape = shape.half() if settings.stage1_alone else shape
        paths = {}
        for number, (name, clip) in enumerate(zip(settings.ids(), clips, strict=True)):
            if drawn := self.change(number, clip):
                paths[name] = write_drawn(output / clip_path(f"{number:032x}"), drawn, shape)
        return paths


def scores(tmp_path, render, *options):
    file = tmp_path / "scores.json"
    assert quality.main([*SMALL, "--json", str(file), "--output", str(tmp_path / "out"), *options], render) == 0
    return json.loads(file.read_text())


def test_clips_as_asked_for_score_1(tmp_path):
    found = scores(tmp_path, Drawing(), "--clips", "4", "--seed", "5", "--pipeline", "base", "--", "--precision", "fp8")
    assert [found[name] for name in ("ground", "colour", "shape", "motion", "sound")] == [1.0] * 5
    assert (found["clips"], found["pipeline"], found["seed"], found["sharpness"]) == (4, "base", 5, None)
    assert found["settings"]["options"] == ["--precision", "fp8"] and found["settings"]["height"] == 128
    assert "first_frame" not in found


def test_wrong_and_missing_clips_lower_the_score_and_are_named(tmp_path, capsys):
    def change(number, clip):
        other = next(c for c in world.COLOURS if c not in (clip.scene.colour, clip.scene.ground))
        return [clip, replace(clip, scene=replace(clip.scene, colour=other)), clip, None][number]

    found = scores(tmp_path, Drawing(change), "--clips", "4", "--seed", "5")
    assert [found[name] for name in ("ground", "colour", "shape", "motion", "sound")] == [0.75, 0.5, 0.75, 0.75, 0.75]
    shown = capsys.readouterr().out
    asked = Settings(4, "hq", 5, 128, 192).scenes()
    taken = next(c for c in world.COLOURS if c not in (asked[1].scene.colour, asked[1].scene.ground))
    assert f"{asked[1].scene.colour} as {taken} 1" in shown and "as not rendered 1" in shown
    assert "1 of 4 clips were not rendered" in shown


def test_clips_that_start_elsewhere_than_their_image_are_counted(tmp_path):
    def change(number, clip):
        other = world.draw_clip(random.Random(1), "train", 1.5, clip.scene)
        return clip if number < 3 else other

    found = scores(tmp_path, Drawing(change), "--clips", "4", "--seed", "5", "--images")
    assert found["first_frame"] == 0.75 and found["colour"] == 1


def test_previews_are_scored_at_their_size(tmp_path):
    options = ("--height", "256", "--width", "384", "--images", "--", "--stop-after=stage1")
    found = scores(tmp_path, Drawing(), "--clips", "2", "--seed", "5", *options)
    assert (found["motion"], found["first_frame"], found["sharpness"]) == (1, 1, None)


@pytest.mark.slow
def test_edges_are_softer_without_stage_2(tmp_path):
    weights = random_parts(tmp_path / "parts")
    vae = components.load_video_vae(export.WEIGHTS / "vae.safetensors", torch.float32, "cpu", part="encoder")
    draw = Drawing()

    def render(clips, settings, output):
        paths = draw(clips, settings, output)
        for number, clip in enumerate(clips):
            small = picture.draw_frames([clip], settings.num_frames, settings.height // 2, settings.width // 2)
            file = output / latents_path(f"{number:032x}")
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"stage_1.video": codec.encode_video(vae, small).contiguous()}, file)
        return paths

    found = scores(tmp_path, render, "--clips", "2", "--seed", "5", "--weights", str(weights))
    assert found["sharpness"] > 1.3


@pytest.mark.parametrize("images", [False, True])
def test_the_manifest_is_legal_and_has_the_prompts(tmp_path, images):
    settings = Settings(6, "base", 7, images=images)
    clips = settings.scenes()
    path = rendering.write_manifest(tmp_path / "rows", clips, settings)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [clip.prompt for clip in clips]
    assert all(world.is_held_out(clip.scene) for clip in clips)
    assert len({row["seed"] for row in rows}) == 6 and all(("images" in row) == images for row in rows)
    found = CliRunner().invoke(app, ["plan", str(path), "--model", "toy"])
    assert found.exit_code == 0 and "6 to render" in found.output, found.output


def test_the_render_is_asked_for_the_files_of_the_model_and_the_options(tmp_path, monkeypatch):
    weights = random_parts(tmp_path / "parts")
    monkeypatch.setenv("LTX_RAY_CACHE", str(tmp_path / "cache"))
    asked = {}

    def run(command, env):
        asked["command"] = command
        return type("Ended", (), {"returncode": 3})

    monkeypatch.setattr(rendering.subprocess, "run", run)
    settings = Settings(1, "distilled", 1, weights=weights, options=("--precision", "fp8"))
    assert rendering.render(settings.scenes(), settings, tmp_path / "out") == {}
    words = asked["command"]
    assert words[-3:] == ["--save-latents", "--precision", "fp8"]
    assert Path(words[words.index("--distilled-checkpoint-path") + 1]).is_file() and "--distilled-lora" not in words
    settings = replace(settings, pipeline="hq", options=("--stop-after", "stage1"))
    rendering.render(settings.scenes(), settings, tmp_path / "out")
    words = asked["command"]
    assert "--save-latents" not in words and "--checkpoint-path" in words and "--distilled-lora" in words


def test_a_render_that_cannot_be_done_is_said(tmp_path, capsys):
    empty = tmp_path / "none"
    empty.mkdir()
    assert quality.main(["--clips", "1", "--weights", str(empty)]) == 2
    assert "the miniature is incomplete" in capsys.readouterr().err
    assert quality.main(["--clips", "1", "--height", "0"]) == 2
    assert "--height: 0; legal: a positive multiple of 64" in capsys.readouterr().err
