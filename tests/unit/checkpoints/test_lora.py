"""LoRA files: spellings, alpha, quantized factors, and what is refused before any GPU is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx_ray.checkpoints import lora as lora_files
from ltx_ray.checkpoints.checkpoint import open_checkpoint
from ltx_ray.checkpoints.diffusers_names import to_diffusers, to_official
from ltx_ray.checkpoints.lora import check_lora, lora_digest, open_lora
from ltx_ray.cli.options import lora_specs
from ltx_ray.cli.status import inspect_lines
from ltx_ray.parallel.collectives import RankGroup
from ltx_ray.parallel.lora import LoraMerger, LoraSetting
from tests.support.transformers import load_ours

#: (out, in) of each module. The names cover every rule of renaming.
LINEARS = {
    "transformer_blocks.0.attn1.to_q": (8, 6),
    "transformer_blocks.1.audio_to_video_attn.to_out.0": (8, 4),
    "transformer_blocks.1.ff.net.0.proj": (16, 8),
    "patchify_proj": (8, 4),
    "audio_adaln_single.emb.timestep_embedder.linear_1": (8, 4),
    "av_ca_a2v_gate_adaln_single.linear": (8, 8),
}
RANK = 2


def write(folder: Path, tensors: dict[str, torch.Tensor], metadata=None, name: str = "style.safetensors") -> str:
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name, metadata)
    return str(folder / name)


def factors(seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        module: (torch.randn(RANK, n_in, generator=generator), torch.randn(n_out, RANK, generator=generator))
        for module, (n_out, n_in) in LINEARS.items()
    }


def spelled(name, a="lora_A", b="lora_B", alpha=None) -> dict[str, torch.Tensor]:
    """Tensors of a LoRA whose modules are called `name(module)` and whose factors `a` and `b`."""
    tensors = {}
    for module, (factor_a, factor_b) in factors().items():
        tensors |= {f"{name(module)}.{a}.weight": factor_a, f"{name(module)}.{b}.weight": factor_b}
        if alpha is not None:
            tensors[f"{name(module)}.alpha"] = alpha
    return tensors


SPELLINGS = {
    "official": spelled(lambda m: f"diffusion_model.{m}"),
    "official, bare": spelled(lambda m: m),
    "ComfyUI, whole prefix": spelled(lambda m: f"model.diffusion_model.{m}"),
    "diffusers": spelled(lambda m: f"transformer.{to_diffusers(m)}"),
    "diffusers, old": spelled(lambda m: f"transformer.{to_diffusers(m)}", "lora.down", "lora.up"),
    "PEFT": spelled(lambda m: f"base_model.model.{to_diffusers(m)}"),
    "PEFT, adapter named": spelled(lambda m: f"base_model.model.{m}", "lora_A.default", "lora_B.default"),
    "ComfyUI": spelled(lambda m: f"diffusion_model.{m}", "lora_down", "lora_up"),
    "kohya": spelled(lambda m: f"lora_unet_{m.replace('.', '_')}", "lora_down", "lora_up"),
    "kohya, diffusers' names": spelled(
        lambda m: f"lora_transformer_{to_diffusers(m).replace('.', '_')}", "lora_down", "lora_up"
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read_as_the_official_modules(tmp_path, spelling):
    pairs = open_lora(write(tmp_path, SPELLINGS[spelling])).fit(LINEARS, "model")
    assert pairs.keys() == LINEARS.keys()
    for module, (n_out, n_in) in LINEARS.items():
        pair = pairs[module]
        assert (pair.a.shape, pair.b.shape, pair.scale) == ((RANK, n_in), (n_out, RANK), 1.0)


def test_renaming_to_diffusers_and_back_changes_no_name(toy):
    for name in open_checkpoint(toy["checkpoint_path"]).tensors:
        assert to_official(to_diffusers(name)) == name
        assert to_official(name) == name


def test_modules_of_other_models_are_left_out(tmp_path):
    other = "diffusion_model.video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q"
    more = {f"{other}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    assert open_lora(write(tmp_path, SPELLINGS["official"] | more)).fit(LINEARS, "model").keys() == LINEARS.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_alpha_of_each_module(tmp_path, dtype):
    alpha = torch.tensor(3, dtype=dtype)
    tensors = spelled(lambda m: f"diffusion_model.{m}", "lora_down", "lora_up", alpha)
    assert {p.scale for p in open_lora(write(tmp_path, tensors)).pairs.values()} == {3 / RANK}


def test_alpha_from_the_metadata_of_diffusers(tmp_path):
    config = {
        "transformer.r": RANK, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"proj_in": 1},
        "text_encoder.lora_alpha": 100,
    }  # fmt: skip
    path = write(tmp_path, SPELLINGS["diffusers"], {"lora_adapter_metadata": json.dumps(config)})
    pairs = open_lora(path).fit(LINEARS, "model")
    assert pairs.pop("patchify_proj").scale == 1 / RANK
    assert {pair.scale for pair in pairs.values()} == {8 / RANK}
    assert f"{len(LINEARS) - 1} scaled by 4 (alpha / rank)" in "\n".join(inspect_lines(path))


@pytest.mark.parametrize("of, divisor", [("transformer", RANK**0.5), ("connectors", RANK)])
def test_alpha_is_divided_as_the_configuration_of_the_transformer_says(tmp_path, of, divisor):
    """diffusers writes the configurations of all components that it trained into one table."""
    config = {"transformer.lora_alpha": 8, "connectors.lora_alpha": 8, f"{of}.use_rslora": True}
    path = write(tmp_path, SPELLINGS["diffusers"], {"lora_adapter_metadata": json.dumps(config)})
    assert {p.scale for p in open_lora(path).fit(LINEARS, "model").values()} == {8 / divisor}


def test_alpha_from_the_adapter_config_beside_the_file(tmp_path):
    path = write(tmp_path, SPELLINGS["PEFT"], name="adapter_model.safetensors")
    assert {p.scale for p in open_lora(path).pairs.values()} == {1.0}
    before = lora_digest(path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "use_rslora": True}))
    assert {p.scale for p in open_lora(path).pairs.values()} == {4 / RANK**0.5}
    assert lora_digest(path) != before
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json: .* not JSON"):
        open_lora(path)


def test_alpha_is_found_when_an_adapter_is_renamed_or_spelled_differently(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4}))
    renamed = write(tmp_path, SPELLINGS["PEFT"], name="mine.safetensors")
    assert {p.scale for p in open_lora(renamed).pairs.values()} == {4 / RANK}
    # An adapter_config.json beside a file of another tool does not belong to that file.
    assert {p.scale for p in open_lora(write(tmp_path, SPELLINGS["ComfyUI"])).pairs.values()} == {1.0}
    config = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8})}
    for spelling in ("official", "diffusers", "PEFT"):
        path = write(tmp_path, SPELLINGS[spelling], config, name="stated.safetensors")
        assert {p.scale for p in open_lora(path).pairs.values()} == {8 / RANK}, spelling


def test_an_adapter_is_named_after_its_folder(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    paths = [write(tmp_path / name, SPELLINGS["PEFT"], name="adapter_model.safetensors") for name in ("one", "two")]
    paths.append(write(tmp_path, SPELLINGS["official"]))
    assert [file.name for file in lora_specs([(path, 1.0) for path in paths])] == ["one", "two", "style"]


def test_modules_that_are_left_out_give_a_warning(toy, tmp_path):
    found = open_checkpoint(toy["checkpoint_path"])
    assert check_lora(found, toy["distilled_lora"]) is None
    odd = {name.replace("blocks.0.", "blocks.99."): tensor for name, tensor in load_file(toy["distilled_lora"]).items()}
    assert "are left out, as the reference leaves them, such as" in check_lora(found, write(tmp_path, odd))


def test_modules_of_other_parts_are_counted_in_the_warning(toy, tmp_path):
    names = ["diffusion_model.video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q",
             "diffusion_model.audio_embeddings_connector.transformer_1d_blocks.1.attn1.to_q",
             "text_embedding_projection.video_aggregate_embed", "lora_te_text_model_layers_0_q_proj",
             "vae.decoder.conv_in"]  # fmt: skip
    others = {f"{name}.lora_{side}.weight": torch.ones(2, 2) for name in names for side in "AB"}
    more = {"vae.encoder.conv_in.weight": torch.ones(2), "strange.weight": torch.ones(2), "strange.bias": torch.ones(2)}
    path = write(tmp_path, load_file(toy["distilled_lora"]) | others | more)
    warning = check_lora(open_checkpoint(toy["checkpoint_path"]), path)
    assert "; 7 of its modules are not in " in warning
    for part in ("2 of the text connectors", "2 of a VAE", "1 of the text projection", "1 of a text encoder",
                 "1 of other parts"):  # fmt: skip
        assert part in warning


REFERENCES = {"reference_downscale_factor": "1", "reference_spatial_scale_factor": "2", "hdr_transform": "logc3",
              "reference_temporal_scale_factor": "2", "ss_reference_downscale_factor": "2", "ss_v2v_training": "True",
              "ss_ic_lora_strategy": "av_ic"}  # fmt: skip


@pytest.mark.parametrize("key", REFERENCES)
def test_a_lora_that_wants_a_reference_is_refused(tmp_path, key):
    path = write(tmp_path, SPELLINGS["official"], {key: REFERENCES[key]})
    with pytest.raises(ValueError, match=rf"wants a reference video, .*\(its metadata has {key} ") as caught:
        open_lora(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "metadata, key",
    [
        ({"modelspec.Reference_Downscale_Factor": "2"}, "modelspec.Reference_Downscale_Factor"),
        ({"training_config": '{"strategy": [{"reference_downscale_factor": 2}]}'}, "reference_downscale_factor"),
        ({"ss_training_args": '{"v2v_training": true}'}, "v2v_training"),
    ],
)
def test_a_reference_is_found_where_tools_put_it(tmp_path, metadata, key):
    with pytest.raises(ValueError, match=rf"wants a reference video, .*\(its metadata has {key} "):
        open_lora(write(tmp_path, SPELLINGS["official"], metadata))


@pytest.mark.parametrize(
    "metadata",
    [
        {"reference_downscale_factor": "None", "ss_ic_lora_strategy": "none", "ss_v2v_training": "False"},
        {"reference_downscale_factor": " "},
        {"config": '{"reference_downscale_factor": 1, "v2v_training": false, "hdr_transform": null}'},
        {"config": "{broken", "other": "{" * 100_000},
    ],
)
def test_metadata_that_wants_no_reference_is_no_reason_to_refuse(tmp_path, metadata):
    assert open_lora(write(tmp_path, SPELLINGS["official"], metadata)).pairs


def test_a_key_without_a_dot_is_named_in_the_warning(toy, tmp_path):
    tensors = load_file(toy["distilled_lora"])
    path = str(tmp_path / "odd.safetensors")
    save_file({**tensors, "steps": torch.ones(1)}, path)
    assert "such as steps (1 of other parts)" in check_lora(open_checkpoint(toy["checkpoint_path"]), path)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_lora_that_is_not_finite_is_refused_by_file_and_tensor(toy, tmp_path, value, dtype, side):
    tensors = load_file(toy["distilled_lora"])
    name = next(name for name in reversed(tensors) if f"lora_{side}" in name)
    bad = tensors[name].to(torch.float32)
    bad[-1, -1] = NAN if dtype == torch.float8_e4m3fn else value  # that format has no infinity
    tensors[name] = bad.to(dtype)
    path, found = write(tmp_path, tensors), open_checkpoint(toy["checkpoint_path"])
    with pytest.raises(ValueError) as caught:
        check_lora(found, path)
    assert str(caught.value).startswith(f"{path}: {name} is not finite (it holds NaN or infinity)")


def test_finite_values_of_every_dtype_pass(toy, tmp_path):
    found = open_checkpoint(toy["checkpoint_path"])
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn):
        largest = torch.finfo(dtype).max
        tensors = {
            name: torch.where(tensor > 0, 1.0, -1.0).double().mul(largest).to(dtype)
            for name, tensor in load_file(toy["distilled_lora"]).items()
        }
        assert check_lora(found, write(tmp_path, tensors)) is None, dtype


def test_a_scale_that_is_not_finite_and_one_of_a_part_that_is_left_out(toy, tmp_path):
    tensors, found = load_file(toy["distilled_lora"]), open_checkpoint(toy["checkpoint_path"])
    name = next(iter(tensors))
    path = write(tmp_path, {**tensors, f"{name}_scale": torch.tensor(NAN)})
    with pytest.raises(ValueError, match=f"{name}_scale is not finite"):
        check_lora(found, path)
    elsewhere = {f"text_encoder.q_proj.lora_{side}.weight": torch.full((2, 2), NAN) for side in "AB"}
    assert "1 of a text encoder" in check_lora(found, write(tmp_path, tensors | elsewhere))


def test_values_of_a_large_lora_are_left_to_the_merge(toy, tmp_path, monkeypatch):
    tensors = {name: torch.full_like(tensor, NAN) for name, tensor in load_file(toy["distilled_lora"]).items()}
    path = write(tmp_path, tensors)
    monkeypatch.setattr(lora_files, "_CHECKED_BYTES", 1000)
    assert check_lora(open_checkpoint(toy["checkpoint_path"]), path) is None


@pytest.mark.parametrize(
    "config",
    [{"lora_alpha": "eight"}, {"lora_alpha": [8]}, {"lora_alpha": 8, "alpha_pattern": {"(": 1}},
     {"lora_alpha": 8, "alpha_pattern": ["to_q"]}, {"alpha_pattern": {".*": None}}],
)  # fmt: skip
def test_a_configuration_that_says_no_alpha_is_refused(tmp_path, config):
    path = write(tmp_path, SPELLINGS["PEFT"], name="adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"its configuration says no alpha of .*; legal: lora_alpha") as caught:
        open_lora(path)
    assert path in str(caught.value)


def test_a_configuration_that_is_no_text_is_refused(tmp_path):
    path = write(tmp_path, SPELLINGS["PEFT"], name="adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"adapter_config\.json: cannot be read"):
        open_lora(path)


A, B = f"{next(iter(LINEARS))}.lora_A.weight", f"{next(iter(LINEARS))}.lora_B.weight"
GOOD = {A: torch.ones(2, 6), B: torch.ones(8, 2)}


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"a.weight": torch.ones(2, 2)}, "holds no LoRA; legal: keys"),
        ({"vocoder.act.alpha": torch.ones(2)}, "holds no LoRA"),
        ({A: GOOD[A]}, "has no factor B"),
        ({B: GOOD[B]}, "has no factor A"),
        ({**GOOD, f"{next(iter(LINEARS))}.dora_scale": torch.ones(8)}, "DoRA"),
        ({"x.lokr_w1": torch.ones(2, 2)}, "LoKr"),
        ({**GOOD, "patchify_proj.diff": torch.ones(2)}, "changes a weight or bias as a whole"),
        ({**GOOD, A.replace("A.weight", "A.other.weight"): GOOD[A]}, "one adapter per file"),
        ({**GOOD, A: GOOD[A].to(torch.int8)}, "I8 without a scale"),
        ({**GOOD, A + "_scale": torch.ones(3)}, r"one for each of 2 rows"),
        ({**GOOD, A + "_scale": torch.ones(1, 2)}, r"one for each of 2 rows"),
        ({**GOOD, A + "_scale": torch.ones(2, dtype=torch.uint8)}, r"one for each of 2 rows, as BF16"),
        ({**GOOD, A + "_scale_inv": torch.ones(2)}, r"1 keys beside the factors are not understood \(.*_scale_inv\)"),
        ({**GOOD, B.replace("weight", "default.bias"): torch.ones(8)}, "are not understood"),
        ({**GOOD, A.replace("lora_A.weight", "alpha"): torch.ones(2)}, "legal: one number"),
        ({**GOOD, A.replace("lora_A.weight", "alpha"): torch.tensor(torch.inf)}, "a finite alpha"),
    ],
)
def test_what_cannot_be_merged_is_refused(tmp_path, tensors, words):
    path = write(tmp_path, tensors)
    with pytest.raises(ValueError, match=words) as caught:
        open_lora(path)
    assert path in str(caught.value)


def test_a_lora_that_fits_no_layer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"fits no layer of model; it has 6 modules such as 'diffusion_model\."):
        open_lora(write(tmp_path, SPELLINGS["official"])).fit({"other": (8, 6)}, "model")


@pytest.mark.parametrize(
    "a, b",
    [((2, 7), (8, 2)), ((2, 6), (9, 2)), ((2, 6), (8, 3)), ((6,), (8, 2)), ((2, 6), (8,)), ((2, 6, 1), (8, 2, 1))],
)
def test_a_lora_of_other_widths_is_refused(tmp_path, a, b):
    path = write(tmp_path, {A: torch.ones(a), B: torch.ones(b)})
    with pytest.raises(ValueError, match=r"model is 8 x 6; legal: A \(rank, 6\) and B \(8, rank\)") as caught:
        open_lora(path).fit(LINEARS, "model")
    assert path in str(caught.value) and A.removesuffix(".lora_A.weight") in str(caught.value)


def test_one_module_under_two_names_is_refused(tmp_path):
    twice = GOOD | {f"diffusion_model.{name}": tensor for name, tensor in GOOD.items()}
    with pytest.raises(ValueError, match="appears twice"):
        open_lora(write(tmp_path, twice)).fit(LINEARS, "model")


# --- merging -------------------------------------------------------------------------------------


def merged(toy, path: str, strength: float, dtype=torch.float32) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(toy["checkpoint_path"])
    model = load_ours(toy["checkpoint_path"], dtype)
    loras = [open_lora(path).fit(checkpoint.linear_layers, checkpoint.path)]
    LoraMerger(model, checkpoint.tensors, loras, RankGroup()).switch_to(LoraSetting(((0, strength),)))
    return dict(model.named_parameters())


def test_a_spelling_and_its_alpha_merge_like_the_official_file(toy, tmp_path):
    official = load_file(toy["distilled_lora"])
    rank = next(tensor.shape[0] for name, tensor in official.items() if "lora_A" in name)
    other = {}
    for name, tensor in official.items():
        module = to_diffusers(name.removeprefix("diffusion_model.").rpartition(".lora_")[0])
        other[f"transformer.{module}.lora_{'down' if 'lora_A' in name else 'up'}.weight"] = tensor
        other[f"transformer.{module}.alpha"] = torch.tensor(float(rank) / 2)
    path = write(tmp_path, other)
    expected, found = merged(toy, toy["distilled_lora"], 0.25), merged(toy, path, 0.5)
    clean = merged(toy, path, 0.0)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert sum(not torch.equal(clean[name], found[name]) for name in clean) > 100


@pytest.mark.parametrize("dtype, rows", [(torch.float8_e4m3fn, 1), (torch.int8, 0)])
def test_quantized_factors_are_multiplied_by_their_scales(toy, tmp_path, dtype, rows):
    """Scales are per tensor or per row. The merge equals that of a plain file with the scaled values."""
    plain, quantized = {}, {}
    for name, tensor in load_file(toy["distilled_lora"]).items():
        wide = tensor.float()
        peak = wide.abs().amax(1, keepdim=True) if rows else wide.abs().max()
        scale = (peak / (127 if dtype == torch.int8 else 448)).clamp_min(1e-12)
        small = (wide / scale).round().to(dtype) if dtype == torch.int8 else (wide / scale).to(dtype)
        quantized |= {name: small, f"{name}_scale": scale.float().squeeze()}
        plain[name] = small.float() * scale
    small, whole = write(tmp_path, quantized), write(tmp_path, plain, name="plain.safetensors")
    expected, found = merged(toy, whole, 0.5), merged(toy, small, 0.5)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
