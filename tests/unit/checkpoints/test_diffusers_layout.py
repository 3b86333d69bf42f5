"""Model directories in diffusers' layout: their official config, and what is refused and why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ltx_ray.checkpoints.checkpoint import check_gemma, check_upsampler, open_checkpoint
from ltx_ray.checkpoints.diffusers_layout import COMPONENTS, UPSAMPLER_CLASS, WEIGHTS, official_config, read_model
from ltx_ray.checkpoints.digests import cached_digest
from ltx_ray.checkpoints.transformer_config import TransformerConfig
from ltx_ray.cli import app
from ltx_ray.cli.status import inspect_lines
from tests.support.samples import write_jsonl, write_safetensors

#: Configurations of the released LTX-2.3 directories, which diffusers 0.37 wrote.
TRANSFORMER = {
    "_diffusers_version": "0.37.0.dev0", "activation_fn": "gelu-approximate",
    "attention_bias": True, "attention_head_dim": 128, "attention_out_bias": True, "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048, "audio_cross_attn_mod": True, "audio_gated_attn": True, "audio_hop_length": 160,
    "audio_in_channels": 128, "audio_num_attention_heads": 32, "audio_out_channels": 128, "audio_patch_size": 1,
    "audio_patch_size_t": 1, "audio_pos_embed_max_pos": 20, "audio_sampling_rate": 16000, "audio_scale_factor": 4,
    "base_height": 2048, "base_width": 2048, "caption_channels": 3840, "causal_offset": 1, "cross_attention_dim": 4096,
    "cross_attn_mod": True, "cross_attn_timestep_scale_multiplier": 1000, "gated_attn": True, "in_channels": 128,
    "norm_elementwise_affine": False, "norm_eps": 1e-06, "num_attention_heads": 32, "num_layers": 48,
    "out_channels": 128, "patch_size": 1, "patch_size_t": 1, "perturbed_attn": True, "pos_embed_max_pos": 20,
    "qk_norm": "rms_norm_across_heads", "rope_double_precision": True, "rope_theta": 10000.0, "rope_type": "split",
    "timestep_scale_multiplier": 1000, "use_prompt_embeddings": False, "vae_scale_factors": [8, 32, 32],
}  # fmt: skip
CONNECTORS = {
    "audio_connector_attention_head_dim": 64, "audio_connector_num_attention_heads": 32,
    "audio_connector_num_layers": 8, "audio_connector_num_learnable_registers": 128, "audio_gated_attn": True,
    "audio_hidden_dim": 2048, "caption_channels": 3840, "causal_temporal_positioning": False,
    "connector_rope_base_seq_len": 4096, "per_modality_projections": True, "proj_bias": True,
    "rope_double_precision": True, "rope_theta": 10000.0, "rope_type": "split", "text_proj_in_factor": 49,
    "video_connector_attention_head_dim": 128, "video_connector_num_attention_heads": 32,
    "video_connector_num_layers": 8, "video_connector_num_learnable_registers": 128, "video_gated_attn": True,
    "video_hidden_dim": 4096,
}  # fmt: skip
VAE = {"timestep_conditioning": False, "scaling_factor": 1.0, "decoder_inject_noise": [False] * 5}
UPSAMPLER = {"spatial_upsample": True, "temporal_upsample": False, "rational_spatial_scale": 2.0}
#: The same configuration with the field names of the official file (docs/ltx-2.3.md).
OFFICIAL = {
    "num_layers": 48, "num_attention_heads": 32, "attention_head_dim": 128, "audio_num_attention_heads": 32,
    "audio_attention_head_dim": 64, "cross_attention_dim": 4096, "audio_cross_attention_dim": 2048, "in_channels": 128,
    "out_channels": 128, "audio_in_channels": 128, "audio_out_channels": 128, "norm_eps": 1e-6,
    "positional_embedding_theta": 10000.0, "positional_embedding_max_pos": [20, 2048, 2048],
    "audio_positional_embedding_max_pos": [20], "timestep_scale_multiplier": 1000,
    "av_ca_timestep_scale_multiplier": 1000, "rope_type": "split", "frequencies_precision": "float64",
    "apply_gated_attention": True, "cross_attention_adaln": True, "caption_proj_before_connector": True,
    "caption_channels": 3840, "connector_num_layers": 8, "connector_num_attention_heads": 32,
    "connector_attention_head_dim": 128, "audio_connector_num_attention_heads": 32,
    "audio_connector_attention_head_dim": 64, "connector_num_learnable_registers": 128,
    "connector_positional_embedding_max_pos": [4096], "connector_apply_gated_attention": True,
}  # fmt: skip


def write_part(folder: Path, class_name: str, config: dict[str, Any], tensors=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": class_name, **config}))
    write_safetensors(folder / WEIGHTS, tensors or {"x": (2,)})
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    """An LTX-2.3 directory with a few tensors. The transformer's are in two files."""
    root = tmp_path / "model"
    for name, config in {"connectors": CONNECTORS, "vae": VAE, "audio_vae": {}, "vocoder": {}}.items():
        write_part(root / name, COMPONENTS[name], config)
    folder = write_part(root / "transformer", COMPONENTS["transformer"], TRANSFORMER)
    (folder / WEIGHTS).unlink()
    shards = {"a.safetensors": {"proj_in.weight": (8, 6), "time_embed.linear.bias": (3,)},
              "b.safetensors": {"transformer_blocks.0.attn1.norm_q.weight": (8,)}}  # fmt: skip
    for file, tensors in shards.items():
        write_safetensors(folder / file, tensors)
    index = {"weight_map": {key: file for file, tensors in shards.items() for key in tensors}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return root


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        open_checkpoint(str(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_directory_opens_like_the_official_file(model):
    found = open_checkpoint(str(model))
    assert found.model_version == "2.3"
    assert found.transformer == TransformerConfig.from_metadata(OFFICIAL)
    parts = read_model(str(model))
    official = official_config(parts["transformer"], parts["connectors"])
    assert {name: official[name] for name in OFFICIAL} == OFFICIAL
    where = {name: (Path(info.path).name, info.key) for name, info in found.tensors.items()}
    assert where == {
        "patchify_proj.weight": ("a.safetensors", "proj_in.weight"),
        "adaln_single.linear.bias": ("a.safetensors", "time_embed.linear.bias"),
        "transformer_blocks.0.attn1.q_norm.weight": ("b.safetensors", "transformer_blocks.0.attn1.norm_q.weight"),
    }
    assert found.linear_layers == {"patchify_proj": (8, 6)}
    assert found.size == 4 * (48 + 3 + 8 + 4 * 2)


def test_values_that_may_differ_are_read_from_the_config(model):
    change(model / "transformer", num_layers=7, norm_eps=1e-5, rope_double_precision=False, rope_theta=5.0)
    change(model / "transformer", pos_embed_max_pos=30, base_width=4096, audio_pos_embed_max_pos=40)
    change(model / "transformer", cross_attn_timestep_scale_multiplier=1)
    config = open_checkpoint(str(model)).transformer
    assert (config.num_layers, config.rope_float64, config.rope_theta, config.norm_eps) == (7, False, 5.0, 1e-5)
    assert (config.video.max_pos, config.audio.max_pos) == ((30, 2048, 4096), (40,))
    assert config.av_timestep_scale == 1


@pytest.mark.parametrize(
    "fields, version",
    [
        ({"gated_attn": False, "cross_attn_mod": False, "use_prompt_embeddings": True}, "2.0"),
        ({"use_prompt_embeddings": True}, "2.0"),
        ({"ff_bias": False}, "2.5"),
        ({"use_keyframes_abs_pos_embedding": True}, "2.5"),
    ],
)
def test_another_generation_is_refused(model, fields, version):
    change(model / "transformer", **fields)
    # The other components differ too. The message must still name the generation.
    (model / "vocoder" / "config.json").write_text('{"_class_name": "LTX2Vocoder"}')
    message = refused(model)
    assert f"model_version is '{version}' (transformer/config.json: {next(iter(fields))} is" in message
    assert "legal: 2.3.x" in message


@pytest.mark.parametrize(
    "part, fields, words",
    [
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "is of a FluxTransformer2DModel; legal: LTX2Video"),
        ("vocoder", {"_class_name": "LTX2Vocoder"}, "is of a LTX2Vocoder; legal: LTX2VocoderWithBWE"),
        ("transformer", {"quantization_config": {"load_in_4bit": True}}, "is quantized"),
        ("transformer", {"rope_type": "interleaved"}, "rope_type is 'interleaved'; legal: 'split'"),
        ("transformer", {"patch_size": 2}, "patch_size is 2; legal: 1"),
        ("transformer", {"vae_scale_factors": [4, 32, 32]}, "vae_scale_factors is [4, 32, 32]; legal: [8, 32, 32]"),
        ("transformer", {"sixth_sense": 3}, "sixth_sense is 3, a field that is not known here"),
        ("connectors", {"per_modality_projections": False}, "per_modality_projections is False; legal: True"),
        ("vae", {"timestep_conditioning": True}, "timestep_conditioning is True; legal: False"),
        ("vae", {"decoder_inject_noise": [False, True]}, "decoder_inject_noise is [False, True]"),
    ],
)
def test_configs_of_other_models_are_refused(model, part, fields, words):
    change(model / part, **fields)
    assert f"{model / part}: " in (message := refused(model)) and words in message


def test_registers_that_do_not_fill_a_prompt_are_refused(model):
    change(model / "connectors", video_connector_num_learnable_registers=96, audio_connector_num_learnable_registers=96)
    assert "connector_num_learnable_registers is 96; legal: a divisor of 1024" in refused(model)


def test_fields_of_newer_versions_that_are_off_are_ignored(model):
    change(model / "transformer", ff_bias=True, use_keyframes_abs_pos_embedding=False, sixth_sense=None)
    open_checkpoint(str(model))


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_missing_part_is_named(model, name):
    shutil.rmtree(model / name)
    words = "without transformer/config.json" if name == "transformer" else f"has no {name}/; legal: a whole model"
    assert words in refused(model)


def test_a_directory_of_single_files_names_them(tmp_path):
    write_safetensors(tmp_path / "ltx-2.3-22b-dev.safetensors", {"x": (1,)})
    assert "legal: name one of its files (ltx-2.3-22b-dev.safetensors)" in refused(tmp_path)


def test_files_that_are_missing_or_truncated_are_refused(model):
    folder = model / "transformer"
    whole = (folder / "b.safetensors").read_bytes()
    (folder / "b.safetensors").write_bytes(whole[:-1])
    assert f"{folder}/b.safetensors: truncated" in refused(model)
    (folder / "b.safetensors").unlink()
    assert f"{folder}/b.safetensors: cannot be read" in refused(model)
    (folder / "b.safetensors").write_bytes(whole)
    (model / "vae" / WEIGHTS).rename(model / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert f"{model}/vae: has neither {WEIGHTS}" in (message := refused(model)) and "model.fp16.safetens" in message


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"x": 1}}'])
def test_a_malformed_index_is_refused(model, content):
    index = model / "transformer" / f"{WEIGHTS}.index.json"
    index.write_text(content)
    assert str(index) in refused(model)


def test_keys_that_are_not_in_their_files_are_listed(model):
    index = model / "transformer" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {f"key{i:02}": "a.safetensors" for i in range(12)}}))
    assert "12 keys are not in the files it names: key00, key01" in (message := refused(model))
    assert "key09, …" in message and "key10" not in message


# --- the other components -------------------------------------------------------------------------


def test_upsamplers(tmp_path):
    tensors = {"initial_conv.weight": (2,)}
    folder = write_part(tmp_path / "latent_upsampler", UPSAMPLER_CLASS, UPSAMPLER, tensors)
    for path in (folder, tmp_path):  # the component, and the directory of a LTX2LatentUpsamplePipeline
        check_upsampler(str(path))
    for changed in ({"rational_spatial_scale": 1.5}, {"temporal_upsample": True}, {"spatial_upsample": False}):
        write_part(folder, UPSAMPLER_CLASS, {**UPSAMPLER, **changed}, tensors)
        with pytest.raises(ValueError, match=f"{folder}: not a spatial upsampler x2"):
            check_upsampler(str(folder))
    write_part(folder, COMPONENTS["vae"], {})
    with pytest.raises(ValueError, match="is of a AutoencoderKLLTX2Video; legal: LTX2LatentUpsamplerModel"):
        check_upsampler(str(folder))


def test_gemma_in_two_folders(tmp_path):
    text, tokenizer = tmp_path / "text_encoder", tmp_path / "tokenizer"
    steps = [
        (lambda: text.mkdir(), f"{text}, has no config.json"),
        (lambda: (text / "config.json").write_text('{"model_type": "gemma4_unified"}'), f"{tokenizer}, has no tokeni"),
        (
            lambda: (tokenizer.mkdir(), (tokenizer / "tokenizer.json").write_text("{}")),
            f"{tokenizer}, has no tokenizer_config.json",
        ),
        (lambda: (tokenizer / "tokenizer_config.json").write_text("{}"), f"{text}, is a gemma4_unified"),
        (lambda: (text / "config.json").write_text('{"model_type": "gemma3"}'), f"{text}: has neither model.safetens"),
        (lambda: (text / "model.safetensors").write_bytes(b"x" * 20), f"{text}/model.safetensors: not a safetensors"),
    ]
    for step, words in steps:
        step()
        with pytest.raises(ValueError) as caught:
            check_gemma(str(tmp_path))
        assert words in str(caught.value)
    write_safetensors(text / "model.safetensors", {"x": (1,)})
    check_gemma(str(tmp_path))


def test_components_in_the_directory_need_no_option(model, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(app, "render", lambda options: seen.append(options.model) or 0)
    manifest = write_jsonl(tmp_path / "m.jsonl", [{"prompt": "a cat"}])

    def render(*flags: str) -> int:
        with pytest.raises(SystemExit) as caught:
            app.main(["render", manifest, "--output", str(tmp_path / "out"), *flags])
        return caught.value.code

    (model / "text_encoder").mkdir()
    assert render("--distilled-checkpoint-path", str(model)) == 2
    assert "no model: give --spatial-upsampler-path, or" in capsys.readouterr().err
    (model / "latent_upsampler").mkdir()
    assert render("--distilled-checkpoint-path", str(model)) == 0
    assert render("--checkpoint-path", str(model), "--distilled-lora", "/l", "--gemma-root", "/g") == 0
    assert [(files.checkpoint_path, files.distilled) for files in seen] == [(str(model), True), (str(model), False)]
    assert [files.gemma_root for files in seen] == [str(model), "/g"]
    assert {files.spatial_upsampler_path for files in seen} == {str(model / "latent_upsampler")}


def test_inspect_lists_the_parts(model):
    lines = inspect_lines(str(model))
    assert "transformer: LTX2VideoTransformer3DModel, 0.0 MiB in 2 files, 3 tensors (3 F32)" in lines
    assert "model_version 2.3" in lines and any("48 layers, 32 heads of 128 (video) and 64" in line for line in lines)
    assert sum(line.split(":")[0] in COMPONENTS for line in lines) == len(COMPONENTS) + 1
    change(model / "transformer", ff_bias=False)
    assert "model_version 2.5 (ff_bias is False)" in inspect_lines(f"{model}/transformer/")
    (model.parent / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no folder in it has a config\.json"):
        inspect_lines(str(model.parent / "empty"))


def test_the_digest_follows_a_linked_part(model, tmp_path):
    elsewhere = (model / "vae").rename(tmp_path / "elsewhere")
    (model / "vae").symlink_to(elsewhere, target_is_directory=True)
    before = cached_digest(str(model), tmp_path / "cache")
    change(elsewhere, note=1)
    assert cached_digest(str(model), tmp_path / "cache") != before
