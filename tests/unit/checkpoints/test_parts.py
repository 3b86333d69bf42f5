"""The parts around the transformer, checked before any actor starts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from ltx_ray.checkpoints.checkpoint import check_gemma
from ltx_ray.checkpoints.diffusers_layout import COMPONENTS, WEIGHTS
from ltx_ray.checkpoints.parts import check_parts, check_text_width
from ltx_ray.cli.app import main
from tests.support.samples import write_jsonl, write_safetensors


def edited(path: str, folder: Path, edit) -> str:
    """A copy of a safetensors file with an edited config."""
    data = Path(path).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    config = json.loads(header["__metadata__"]["config"])
    edit(config)
    header["__metadata__"]["config"] = json.dumps(config)
    text = json.dumps(header).encode()
    copy = folder / "edited.safetensors"
    copy.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    return str(copy)


def test_the_toys_parts_fit(toy):
    check_parts(toy["checkpoint_path"], toy["spatial_upsampler_path"])
    check_text_width(toy["checkpoint_path"], toy["gemma_root"])


@pytest.mark.parametrize(
    "words, edit",
    [
        ("config.vae.norm_layer is 'group_norm'", lambda c: c["vae"].update(norm_layer="group_norm")),
        ("config.vae.decoder_blocks is", lambda c: c["vae"]["decoder_blocks"].insert(0, ["attn", {}])),
        ("do not describe the part video_vae", lambda c: c["vae"].pop("encoder_blocks")),
        ("video VAE: latent_channels is 64; legal: 128", lambda c: c["vae"].update(latent_channels=64)),
        ("video VAE: spatial_compression_ratio is 16; legal: 32", lambda c: c["vae"].update(patch_size=2)),
        ("no config.vae", lambda c: c.pop("vae")),
        ("do not describe the part audio_vae", lambda c: c["audio_vae"].update(preprocessing=[])),
        ("audio VAE: sample_rate is 24000", lambda c: c["audio_vae"]["model"]["params"].update(sampling_rate=24000)),
        ("config.vocoder.vocoder.stereo is False", lambda c: c["vocoder"]["vocoder"].update(stereo=False)),
        ("vocoder: output_sampling_rate is 44100",
         lambda c: c["vocoder"]["bwe"].update(output_sampling_rate=44100)),
        ("vocoder: input_sampling_rate is 24000", lambda c: c["vocoder"]["bwe"].update(input_sampling_rate=24000)),
        ("do not describe the part connectors", lambda c: c["transformer"].pop("connector_attention_head_dim")),
    ],
)  # fmt: skip
def test_a_part_of_another_model_is_refused_before_it_is_loaded(toy, tmp_path, words, edit):
    copy = edited(toy["checkpoint_path"], tmp_path, edit)
    with pytest.raises(ValueError, match=rf"edited\.safetensors: .*{re.escape(words)}"):
        check_parts(copy, toy["spatial_upsampler_path"])


@pytest.mark.parametrize("field, value", [("in_channels", 16), ("dims", 2), ("spatial_scale", [2])])
def test_an_upsampler_of_other_latents_is_refused_before_it_is_loaded(toy, tmp_path, field, value):
    copy = edited(toy["spatial_upsampler_path"], tmp_path, lambda config: config.update({field: value}))
    with pytest.raises(ValueError, match=r"edited\.safetensors: .*upsampler"):
        check_parts(toy["checkpoint_path"], copy)


def test_a_part_of_a_directory_is_refused_before_it_is_loaded(toy, tmp_path):
    """Settings that its configuration does not state are diffusers' defaults."""
    for name in ("connectors", "vae", "audio_vae", "vocoder"):
        config = {"_class_name": COMPONENTS[name], "per_modality_projections": True, "rope_type": "split"}
        config |= {"latent_channels": 64} if name == "vae" else {}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        write_safetensors(tmp_path / name / WEIGHTS, {"x": (1,)})
    with pytest.raises(ValueError, match=rf"{tmp_path}/vae: video VAE: latent_channels is 64; legal: 128"):
        check_parts(str(tmp_path), toy["spatial_upsampler_path"])
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": COMPONENTS["vae"]}))
    check_parts(str(tmp_path), toy["spatial_upsampler_path"])


def another_gemma(toy, folder: Path, **changes) -> str:
    shutil.copytree(toy["gemma_root"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= changes.pop("text_config", {})
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


@pytest.mark.parametrize(
    "changes, has",
    [({"num_hidden_layers": 34, "hidden_size": 2560}, "34 layers of 2560 channels"),
     ({"num_hidden_layers": 13, "hidden_size": 32}, "13 layers of 32 channels")],
)  # fmt: skip
def test_a_gemma_of_another_size_is_refused(toy, tmp_path, changes, has):
    """Gemma 3 has five sizes. With another one than the text projection takes, each row failed as if by its own
    fault."""
    root = another_gemma(toy, tmp_path / "gemma", text_config=changes)
    with pytest.raises(ValueError, match=rf"^--gemma-root: {root}, has {has}; legal: 6 layers of 64 channels, "):
        check_text_width(toy["checkpoint_path"], root)


def test_a_gemma_whose_configuration_says_no_size_is_left_to_the_load(toy, tmp_path):
    check_text_width(toy["checkpoint_path"], another_gemma(toy, tmp_path / "gemma", text_config={"hidden_size": None}))
    root = another_gemma(toy, tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "gemma3", "text_config": 3}')
    with pytest.raises(ValueError, match="has the text_config 3; legal: a JSON object"):
        check_text_width(toy["checkpoint_path"], root)


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma3n"])
def test_relatives_of_gemma_3_are_refused(toy, tmp_path, kind):
    root = another_gemma(toy, tmp_path / "gemma", model_type=kind)
    with pytest.raises(ValueError, match=rf"^--gemma-root: {root}, is a {kind} .*; legal: a Gemma 3 model directory"):
        check_gemma(root)


@pytest.mark.parametrize("installed", [False, True])
def test_a_tokenizer_that_needs_another_package_is_refused_without_it(toy, tmp_path, monkeypatch, installed):
    root = Path(another_gemma(toy, tmp_path / "gemma"))
    (root / "tokenizer.json").rename(root / "tokenizer.model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: installed or None)
    if installed:
        check_gemma(str(root))
    else:
        with pytest.raises(ValueError, match=rf"^--gemma-root: {root}, has no tokenizer\.json; legal: "):
            check_gemma(str(root))


@pytest.mark.parametrize("named_by", ["tokenizer_config.json", "special_tokens_map.json", None])
def test_a_tokenizer_without_its_special_tokens_is_refused(toy, tmp_path, named_by):
    """Beside no config.json, as in diffusers' layout, transformers does not know what begins and pads a text. Each row
    failed as if by its own fault."""
    from transformers import AutoTokenizer

    whole, tokenizer = Path(another_gemma(toy, tmp_path / "text_encoder")), tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in filter(None, ("tokenizer.json", named_by)):
        (whole / name).rename(tokenizer / name)
    if named_by:
        check_gemma(str(tmp_path))
        assert AutoTokenizer.from_pretrained(tokenizer).bos_token_id == 2
    else:
        with pytest.raises(ValueError, match=rf"^--gemma-root: {tokenizer}, has no tokenizer_config\.json; legal: "):
            check_gemma(str(tmp_path))


def test_a_tokenizer_that_was_cut_off_is_refused(toy, tmp_path):
    file = Path(another_gemma(toy, tmp_path / "gemma")) / "tokenizer.json"
    file.write_bytes(file.read_bytes() + b"\n \n")
    check_gemma(str(file.parent))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"^{file}: is not JSON \(its end is missing\); fetch it again"):
        check_gemma(str(file.parent))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_names_of_special_tokens_that_were_cut_off_are_refused(toy, tmp_path, name):
    """Replicas of text would end with what a parser says, which names no file."""
    file = Path(another_gemma(toy, tmp_path / "gemma")) / name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"^{file}: is not JSON \(.+\); fetch it again"):
        check_gemma(str(file.parent))


def test_a_quantized_gemma_is_refused(toy, tmp_path):
    """It wants a package that is not installed, as each replica of text would find out."""
    root = another_gemma(toy, tmp_path / "gemma", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match=rf"^{root}: is quantized .*; legal: plain weights"):
        check_gemma(root)


@pytest.mark.parametrize("command", ["plan", "render"])
def test_they_are_wrong_usage(toy, tmp_path, capfd, command):
    manifest = write_jsonl(tmp_path / "m.jsonl", [{"prompt": "a cat"}])
    copy = edited(toy["checkpoint_path"], tmp_path, lambda config: config.pop("vocoder"))
    for given in ({"checkpoint_path": copy}, {"gemma_root": another_gemma(
        toy, tmp_path / "gemma", text_config={"hidden_size": 128}
    )}):  # fmt: skip
        files = [f for name, path in {**toy, **given}.items() for f in (f"--{name.replace('_', '-')}", path)]
        with pytest.raises(SystemExit) as caught:
            main([command, manifest, "--output", str(tmp_path / "out"), *files])
        assert caught.value.code == 2 and next(iter(given.values())) in capfd.readouterr().err
        assert not (tmp_path / "out").exists()
