"""The toy model: the same bytes as ever, the released key names and metadata, a tokenizer for any language."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ltx_ray import toy as package
from ltx_ray.checkpoints import transformer_keys
from ltx_ray.toy import FILES, ToyShape, ensure_toy_model, make_toy_model

ROOT = Path(__file__).resolve().parents[3]
#: sha256 over the name and digest of every file of the default toy model, one per line.
TOY_SHA256 = "c4f3ec5c7d1925db99de1bbde927444608d9e4647af9761e8606ae6957fcd9c9"


def digests(folder) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


def header(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {k: file.get_slice(k) for k in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy_model(tmp_path_factory.mktemp("toy"))


@pytest.mark.slow
def test_same_seed_same_bytes_in_another_process(toy, tmp_path):
    # In another process, because save_file orders metadata by a hash that is seeded once in a process.
    command = [sys.executable, str(ROOT / "scripts" / "make_toy_model.py"), str(tmp_path / "again")]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert all(name in shown for name in FILES.values())
    first = digests(Path(toy["checkpoint_path"]).parent)
    assert first == digests(tmp_path / "again")
    assert len(first) == 11


def test_the_bytes_do_not_change(toy):
    """Goldens and caches of every machine rely on them."""
    lines = "".join(f"{name} {digest}\n" for name, digest in digests(Path(toy["checkpoint_path"]).parent).items())
    assert hashlib.sha256(lines.encode()).hexdigest() == TOY_SHA256


def test_other_seed_other_weights(toy, tmp_path):
    other = make_toy_model(tmp_path, seed=1)
    for name in ("checkpoint_path", "distilled_lora", "spatial_upsampler_path"):
        assert Path(other[name]).read_bytes() != Path(toy[name]).read_bytes()


def test_size(toy):
    folder = Path(toy["checkpoint_path"]).parent
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 60e6


def test_key_prefixes_and_dtype(toy):
    tensors, _ = header(toy["checkpoint_path"])
    for prefix in (
        "model.diffusion_model.transformer_blocks.3.audio_to_video_attn.to_gate_logits.weight",
        "model.diffusion_model.prompt_adaln_single.linear.weight",
        "model.diffusion_model.video_embeddings_connector.learnable_registers",
        "model.diffusion_model.audio_embeddings_connector.transformer_1d_blocks.1.attn1.q_norm.weight",
        "text_embedding_projection.video_aggregate_embed.bias",
        "text_embedding_projection.audio_aggregate_embed.weight",
        "vae.encoder.down_blocks.8.res_blocks.0.conv1.conv.weight",
        "vae.decoder.up_blocks.8.res_blocks.0.conv1.conv.weight",
        "vae.per_channel_statistics.mean-of-means",
        "audio_vae.encoder.conv_out.conv.weight",
        "audio_vae.decoder.conv_in.conv.weight",
        "audio_vae.per_channel_statistics.std-of-means",
        "vocoder.vocoder.conv_pre.weight",
        "vocoder.bwe_generator.conv_post.weight",
        "vocoder.mel_stft.stft_fn.forward_basis",
    ):
        assert prefix in tensors
    assert {t.get_dtype() for t in tensors.values()} == {"BF16"}


def test_metadata(toy):
    _, metadata = header(toy["checkpoint_path"])
    assert metadata["model_version"] == "2.3.0"
    config = json.loads(metadata["config"])
    assert config.keys() >= {"transformer", "vae", "audio_vae", "vocoder", "scheduler"}
    t = config["transformer"]
    assert t["apply_gated_attention"] and t["cross_attention_adaln"] and t["caption_proj_before_connector"]
    assert (t["rope_type"], t["frequencies_precision"]) == ("split", "float64")
    assert t["connector_positional_embedding_max_pos"] == [4096]
    assert t["timestep_scale_multiplier"] == t["av_ca_timestep_scale_multiplier"] == 1000
    _, metadata = header(toy["spatial_upsampler_path"])
    assert json.loads(metadata["config"])["rational_resampler"] is False


def test_heads_can_be_split_by_four(toy):
    tensors, metadata = header(toy["checkpoint_path"])
    t = json.loads(metadata["config"])["transformer"]
    assert t["num_attention_heads"] % 4 == 0 and t["audio_num_attention_heads"] == t["num_attention_heads"]
    assert t["num_attention_heads"] * t["attention_head_dim"] == t["cross_attention_dim"]
    gate = tensors["model.diffusion_model.transformer_blocks.0.attn1.to_gate_logits.weight"]
    assert gate.get_shape()[0] == t["num_attention_heads"]


def test_lora_covers_the_linear_layers_of_the_transformer_only(toy):
    checkpoint, _ = header(toy["checkpoint_path"])
    lora, _ = header(toy["distilled_lora"])
    for key, factor in lora.items():
        module, side, _ = key.rsplit(".", 2)
        weight = checkpoint["model." + module + ".weight"].get_shape()
        assert factor.get_shape() == ([8, weight[1]] if side == "lora_A" else [weight[0], 8])
    modules = {key.rsplit(".", 2)[0] for key in lora}
    assert not any("connector" in m for m in modules)
    for name in ("patchify_proj", "proj_out", "adaln_single.linear", "transformer_blocks.0.ff.net.2",
                 "transformer_blocks.3.audio_attn2.to_out.0", "transformer_blocks.0.attn1.to_gate_logits"):  # fmt: skip
        assert f"diffusion_model.{name}" in modules


@pytest.mark.parametrize(
    "text",
    ["a woman walks on the beach", "她在雨中行走，背景是城市。", "🎬🌊👩🏽‍🚀", "naïve — Ünïcode\tтест\nالعربية", ""],
)
def test_tokenizer(toy, text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toy["gemma_root"])
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 2 and ids.count(2) == 1
    assert tokenizer.unk_token_id == 3 and 3 not in ids
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_pads_left_and_knows_words(toy):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toy["gemma_root"])
    out = tokenizer(["rain", "a camera follows the woman"], padding=True)
    assert out.input_ids[0][0] == 0 and out.attention_mask[0][0] == 0
    assert len(out.input_ids[1]) < 12  # Words are tokens, not only characters.


def test_gemma_loads_completely_and_is_finite(toy):
    import torch
    from transformers import Gemma3ForConditionalGeneration

    model, info = Gemma3ForConditionalGeneration.from_pretrained(
        toy["gemma_root"], dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert set(model.config.text_config.layer_types) == {"sliding_attention", "full_attention"}
    with torch.inference_mode():
        out = model.model(input_ids=torch.tensor([[2, 300, 301, 302]]), output_hidden_states=True)
    assert len(out.hidden_states) == model.config.text_config.num_hidden_layers + 1
    for hidden in out.hidden_states:
        assert torch.isfinite(hidden).all() and 0.1 < hidden.std() < 10


def test_shape_is_checked():
    with pytest.raises(ValueError, match=r"ToyShape\.vocoder_channels is 100; legal is a multiple of 64"):
        ToyShape(vocoder_channels=100)
    with pytest.raises(ValueError, match=r"ToyShape\.layers is 0"):
        ToyShape(layers=0)
    with pytest.raises(ValueError, match=r"ToyShape\.head_dim is 7"):
        ToyShape(head_dim=7)
    assert dataclasses.replace(ToyShape(), heads=8).dim == 8 * ToyShape().head_dim


def test_other_shape(tmp_path):
    shape = ToyShape(layers=1, heads=2, head_dim=8, audio_head_dim=4, connector_layers=1, gemma_layers=2, lora_rank=2)
    made = make_toy_model(tmp_path, shape=shape)
    tensors, metadata = header(made["checkpoint_path"])
    assert json.loads(metadata["config"])["transformer"]["num_layers"] == 1
    assert tensors["model.diffusion_model.audio_patchify_proj.weight"].get_shape() == [8, 128]


def test_ensure_makes_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LTX_RAY_CACHE", str(tmp_path / "cache"))
    first = ensure_toy_model()
    assert first.keys() == FILES.keys() and all(os.path.exists(p) for p in first.values())
    assert Path(first["gemma_root"]).is_relative_to(tmp_path / "cache")
    monkeypatch.setattr(package, "make_toy_model", lambda *a, **k: pytest.fail("made again"))
    assert ensure_toy_model() == first
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_another_generator_has_another_folder(tmp_path):
    source = Path(package.__file__).parent
    copy = tmp_path / "toy"
    shutil.copytree(source, copy)
    assert package._digest(copy) == package._digest()
    (copy / "__pycache__").mkdir(exist_ok=True)
    (copy / "__pycache__" / "config.cpython-311.pyc").write_bytes(b"x")
    assert package._digest(copy) == package._digest()
    files = sorted(source.glob("*.py"))
    assert [f.stem for f in files] == ["__init__", "config", "gemma", "gemma_format", "weights"]
    for file in files:
        (copy / file.name).write_bytes(file.read_bytes() + b"\n")
        assert package._digest(copy) != package._digest()
        shutil.copy(file, copy / file.name)
    (copy / "one_more.py").write_bytes(b"")
    assert package._digest(copy) != package._digest()


def test_other_tensor_names_have_another_folder(tmp_path):
    names = tmp_path / "transformer_keys.py"
    names.write_bytes(Path(transformer_keys.__file__).read_bytes())
    assert package._digest(tensor_names=names) == package._digest()
    names.write_bytes(names.read_bytes().replace(b"patchify_proj", b"patchify_in"))
    assert package._digest(tensor_names=names) != package._digest()


def test_ensure_survives_another_process_winning(tmp_path, monkeypatch):
    real = package.make_toy_model

    def slow(out_dir, **kwargs):
        made = real(out_dir, **kwargs)
        monkeypatch.setattr(package, "make_toy_model", real)
        ensure_toy_model(tmp_path)  # The other process, which publishes first.
        return made

    monkeypatch.setattr(package, "make_toy_model", slow)
    paths = ensure_toy_model(tmp_path)
    assert all(os.path.exists(p) for p in paths.values())
    assert len(list(tmp_path.iterdir())) == 1


def test_import_is_cheap():
    code = "import sys, ltx_ray.toy; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert out.strip() == "[]"
