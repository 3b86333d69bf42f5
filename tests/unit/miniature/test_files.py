"""The miniature's parts become files in the released layout, which load as the release does."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ltx_ray.checkpoints.checkpoint import open_checkpoint
from ltx_ray.checkpoints.lora import open_lora
from ltx_ray.checkpoints.parts import check_other_models
from ltx_ray.checkpoints.transformer_keys import TRANSFORMER_PREFIX
from ltx_ray.config import ModelFiles
from ltx_ray.engine import components
from ltx_ray.miniature import files
from tests.support.miniature_parts import random_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return random_parts(tmp_path_factory.mktemp("parts"))


def test_the_files_are_those_of_a_release(parts, tmp_path):
    made = files.ensure_miniature(tmp_path, parts)
    assert made.keys() == files.FILES.keys()
    check_other_models(ModelFiles(**made))
    checkpoint = open_checkpoint(made["checkpoint_path"])
    assert open_lora(made["distilled_lora"]).fit(checkpoint.linear_layers, checkpoint.path)
    whole = load_file(made["checkpoint_path"])
    separate = {}
    for name in ("vae", "audio", "transformer"):
        separate |= load_file(parts / f"{name}.safetensors")
    assert whole.keys() == separate.keys()
    assert all(torch.equal(value, separate[name]) for name, value in whole.items())
    for load in (components.load_connectors, components.load_video_vae, components.load_audio_decoder):
        load(made["checkpoint_path"], torch.float32, "cpu")
    components.load_upsampler(made["spatial_upsampler_path"], torch.float32, "cpu")


def test_the_distilled_checkpoint_is_the_first_with_the_lora_merged_at_1(parts, tmp_path):
    made = files.ensure_miniature_distilled(tmp_path, parts)
    assert "distilled_lora" not in made
    check_other_models(ModelFiles(**made, distilled=True))
    plain = load_file(files.ensure_miniature(tmp_path, parts)["checkpoint_path"])
    merged, lora = load_file(made["checkpoint_path"]), load_file(parts / "distilled_lora.safetensors")
    assert merged.keys() == plain.keys()
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    modules = {name.split(".lora_")[0].removeprefix("diffusion_model.") for name in lora}
    assert changed == {f"{TRANSFORMER_PREFIX}{module}.weight" for module in modules}
    for module in ("patchify_proj", "transformer_blocks.3.audio_ff.net.2"):
        a, b = (lora[f"diffusion_model.{module}.lora_{side}.weight"] for side in "AB")
        name = f"{TRANSFORMER_PREFIX}{module}.weight"
        assert torch.equal(merged[name], (b @ a) + plain[name])  # rounded as docs/ltx-2.3.md#lora says


def test_they_are_made_once_and_again_for_other_parts(parts, tmp_path, monkeypatch):
    cache, other = tmp_path / "cache", tmp_path / "parts"
    first = files.ensure_miniature(cache, parts)
    with monkeypatch.context() as patched:
        patched.setattr(files, "_assemble", lambda *_: pytest.fail("made again"))
        assert files.ensure_miniature(cache, parts) == first
    shutil.copytree(parts, other)
    with open(other / "gemma" / "config.json", "a") as file:
        file.write("\n")
    assert Path(files.ensure_miniature(cache, other)["gemma_root"]).parent != Path(first["gemma_root"]).parent


def test_the_bytes_depend_on_the_parts_alone(parts, tmp_path):
    for ensure in (files.ensure_miniature, files.ensure_miniature_distilled):
        first, second = (ensure(tmp_path / name, parts)["checkpoint_path"] for name in ("a", "b"))
        assert Path(first).read_bytes() == Path(second).read_bytes()


@pytest.mark.parametrize("missing", ["transformer.safetensors", "distilled_lora.safetensors", "gemma"])
def test_a_part_that_is_missing_is_named(parts, tmp_path, missing):
    folder = tmp_path / "parts"
    shutil.copytree(parts, folder, ignore=shutil.ignore_patterns(missing))
    with pytest.raises(ValueError, match=f"the miniature is incomplete: .*{missing}"):
        files.ensure_miniature(tmp_path / "cache", folder)
    assert not (tmp_path / "cache").exists()
