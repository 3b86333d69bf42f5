"""Models as directories in diffusers' layout, read by their configurations and headers. No torch.

LTX2Pipeline.save_pretrained and diffusers' convert_ltx2_to_diffusers.py write them: a folder for each component, with
a config.json and the weights in one safetensors file, or in several under an index. Source: diffusers 0.42.1,
`transformer_ltx2.py`, `connectors.py` and that script. Version 0.37, which wrote the released 2.3 directories, has
fewer fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ltx_ray.checkpoints.diffusers_names import to_official
from ltx_ray.checkpoints.model_paths import is_file, is_folder, names, open_binary
from ltx_ray.checkpoints.safetensors import TensorInfo, read_header
from ltx_ray.storage.locations import join

WEIGHTS = "diffusion_pytorch_model.safetensors"
#: The folders of an LTX-2.3 model and the classes that their config.json names.
COMPONENTS = {
    "transformer": "LTX2VideoTransformer3DModel",
    "connectors": "LTX2TextConnectors",
    "vae": "AutoencoderKLLTX2Video",
    "audio_vae": "AutoencoderKLLTX2Audio",
    "vocoder": "LTX2VocoderWithBWE",
}
UPSAMPLER, UPSAMPLER_CLASS = "latent_upsampler", "LTX2LatentUpsamplerModel"
TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"

#: Fields of transformer/config.json that distinguish the generations: (generation, field, its value there, diffusers'
#: default).
_GENERATION_FIELDS = (
    ("2.0", "gated_attn", False, False),
    ("2.0", "cross_attn_mod", False, False),
    ("2.0", "use_prompt_embeddings", True, True),
    ("2.5", "ff_bias", False, True),
    ("2.5", "use_prompt_adaln_single", False, True),
    ("2.5", "use_keyframes_abs_pos_embedding", True, False),
)
#: Fields with one legal value, by class: (legal value, diffusers' default for an absent field).
_REQUIRED: dict[str, dict[str, tuple[Any, Any]]] = {
    COMPONENTS["transformer"]: {
        "rope_type": ("split", "interleaved"),
        "audio_gated_attn": (True, False),
        "audio_cross_attn_mod": (True, False),
        "audio_ff_bias": (True, True),
        "attention_out_bias": (True, True),
        "patch_size": (1, 1),
        "patch_size_t": (1, 1),
        "audio_patch_size": (1, 1),
        "audio_patch_size_t": (1, 1),
        "vae_scale_factors": ([8, 32, 32], [8, 32, 32]),
        "audio_scale_factor": (4, 4),
        "audio_sampling_rate": (16000, 16000),
        "audio_hop_length": (160, 160),
        "causal_offset": (1, 1),
        "qk_norm": ("rms_norm_across_heads", "rms_norm_across_heads"),
    },
    COMPONENTS["connectors"]: {
        "per_modality_projections": (True, False),
        "causal_temporal_positioning": (False, False),
        "rope_type": ("split", "interleaved"),
    },
    COMPONENTS["vae"]: {"timestep_conditioning": (False, False), "scaling_factor": (1.0, 1.0)},
}
#: Fields of transformer/config.json that have the same name, and mostly the same default, in the official config.
_SAME = (
    "num_layers", "num_attention_heads", "attention_head_dim", "cross_attention_dim", "in_channels", "out_channels",
    "audio_num_attention_heads", "audio_attention_head_dim", "audio_cross_attention_dim", "audio_in_channels",
    "audio_out_channels", "norm_eps", "timestep_scale_multiplier", "activation_fn", "attention_bias",
    "norm_elementwise_affine",
)  # fmt: skip
#: Fields that are read one by one, or have no effect here (perturbed_attn: whether diffusers can skip attention for
#: STG).
_OTHER = (
    "rope_theta", "rope_double_precision", "pos_embed_max_pos", "base_height", "base_width",
    "audio_pos_embed_max_pos", "cross_attn_timestep_scale_multiplier", "caption_channels", "perturbed_attn",
)  # fmt: skip
#: Fields of connectors/config.json by their official names.
_CONNECTORS = {
    "caption_channels": "caption_channels",
    "video_connector_num_layers": "connector_num_layers",
    "video_connector_num_attention_heads": "connector_num_attention_heads",
    "video_connector_attention_head_dim": "connector_attention_head_dim",
    "video_connector_num_learnable_registers": "connector_num_learnable_registers",
    "video_gated_attn": "connector_apply_gated_attention",
    "audio_connector_num_layers": "audio_connector_num_layers",
    "audio_connector_num_attention_heads": "audio_connector_num_attention_heads",
    "audio_connector_attention_head_dim": "audio_connector_attention_head_dim",
}
#: Fields of the official config whose values for LTX-2.3 are built into diffusers' classes.
_BUILT_IN = {
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_proj_input_norm": False,
    "caption_projection_second_linear": False,
    "text_encoder_norm_type": "per_token_rms",
    "use_embeddings_connector": True,
    "connector_norm_output": True,
    "rope_type": "split",
    "qk_norm": "rms_norm",
    "standardization_norm": "rms_norm",
    "positional_embedding_type": "rope",
    "use_middle_indices_grid": True,
    "share_ff": False,
    "av_cross_ada_norm": True,
    "use_audio_video_cross_attention": True,
}


@dataclass(frozen=True)
class Component:
    """A component of the model: the arguments of its class in diffusers, and its tensors by that class's names.

    `path` is the file or the folder, for messages.
    """

    path: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def generation(config: Mapping[str, Any]) -> tuple[str, str]:
    """(model_version, the field that says so) of a transformer/config.json. It is 2.3 unless a field says otherwise."""
    for version, field, value, default in _GENERATION_FIELDS:
        if config.get(field, default) is value:
            return version, f"{field} is {value}"
    return "2.3", ""


def read_config(folder: str) -> dict[str, Any]:
    """The config.json of `folder`. Raises ValueError when there is none or it is not a JSON object."""
    path = join(folder, "config.json")
    if not is_file(path):
        raise ValueError(f"{folder}: has no config.json; legal: a folder as diffusers writes it")
    return read_json(path)


def check_class(folder: str, config: Mapping[str, Any], class_name: str) -> None:
    """Raise ValueError unless `config` is one of the class `class_name`."""
    if (found := config.get("_class_name")) != class_name:
        raise ValueError(f"{folder}: config.json is of a {found}; legal: {class_name} (LTX-2.3)")


def check_plain(folder: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError when `config`, that of the weights in `folder`, says that they are quantized."""
    if config.get("quantization_config") is not None:
        raise ValueError(f"{folder}: is quantized (quantization_config in its config.json); legal: plain weights")


def read_component(folder: str, class_name: str) -> Component:
    """The component in `folder`, from its config and the headers of its files.

    Raises ValueError naming folder, file and field when it is of another class, quantized or incomplete.
    """
    config = read_config(folder)
    check_class(folder, config, class_name)
    check_plain(folder, config)
    for field, (legal, default) in _REQUIRED.get(class_name, {}).items():
        if (value := config.get(field, default)) != legal:
            raise ValueError(f"{folder}: config.json: {field} is {value!r}; legal: {legal!r} (LTX-2.3)")
    return Component(folder, {k: v for k, v in config.items() if not k.startswith("_")}, read_weights(folder))


def read_model(path: str) -> dict[str, Component]:
    """The components of the LTX-2.3 model in the directory `path`, by the names of their folders.

    The caller has checked the generation. Raises ValueError naming what is missing or does not fit.
    """
    for name in COMPONENTS:
        if not is_folder(join(path, name)):
            raise ValueError(f"{path}: has no {name}/; legal: a whole model, with {', '.join(COMPONENTS)}")
    parts = {name: read_component(join(path, name), known) for name, known in COMPONENTS.items()}
    known = {*_REQUIRED[COMPONENTS["transformer"]], *_SAME, *_OTHER, *(field for _, field, _, _ in _GENERATION_FIELDS)}
    refuse_unknown(parts["transformer"], known)
    noise = parts["vae"].config.get("decoder_inject_noise", False)
    if any(noise if isinstance(noise, list) else [noise]):
        raise ValueError(f"{parts['vae'].path}: config.json: decoder_inject_noise is {noise}; LTX-2.3 has none")
    return parts


def refuse_unknown(part: Component, known: Mapping[str, Any] | set[str]) -> None:
    """Raise ValueError for fields of a component's config that are not in `known`, unless they are null or false.

    Newer versions of diffusers add fields. One that is off can be ignored without changing the model.
    """
    for field, value in part.config.items():
        if field not in known and value is not None and value is not False:
            raise ValueError(
                f"{part.path}: config.json: {field} is {value!r}, a field that is not known here; "
                f"legal: an LTX-2.3 model as diffusers 0.37 to 0.42 writes it"
            )


def official_config(transformer: Component, connectors: Component) -> dict[str, Any]:
    """`config.transformer` of the official single file of the same model."""
    diffusers = transformer.config
    official = dict(_BUILT_IN)
    official |= {field: diffusers[field] for field in _SAME if diffusers.get(field) is not None}
    official |= {
        "positional_embedding_theta": diffusers.get("rope_theta", 10000.0),
        "positional_embedding_max_pos": [
            diffusers.get("pos_embed_max_pos", 20),
            diffusers.get("base_height", 2048),
            diffusers.get("base_width", 2048),
        ],
        "audio_positional_embedding_max_pos": [diffusers.get("audio_pos_embed_max_pos", 20)],
        "frequencies_precision": "float64" if diffusers.get("rope_double_precision", True) else "float32",
        "av_ca_timestep_scale_multiplier": diffusers.get("cross_attn_timestep_scale_multiplier", 1000),
    }
    texts = connectors.config
    official |= {name: texts[field] for field, name in _CONNECTORS.items() if field in texts}
    official["connector_positional_embedding_max_pos"] = [texts.get("connector_rope_base_seq_len", 4096)]
    return official


def official_tensors(transformer: Component) -> dict[str, TensorInfo]:
    """The transformer's tensors by their official names, without prefix."""
    return {to_official(name): info for name, info in transformer.tensors.items()}


def upsampler_folder(path: str) -> str:
    """The upsampler's folder: `path` itself, or its latent_upsampler/ (as LTX2LatentUpsamplePipeline writes it)."""
    inside = join(path, UPSAMPLER)
    return inside if is_folder(inside) and not is_file(join(path, "config.json")) else path


def read_upsampler(path: str) -> Component:
    """The latent upsampler in the directory `path`. Raises ValueError like read_component."""
    return read_component(upsampler_folder(path), UPSAMPLER_CLASS)


def read_weights(folder: str, name: str = WEIGHTS) -> dict[str, TensorInfo]:
    """The tensors in `folder`, of one file or of several under an index. Raises ValueError when any are missing."""
    single = join(folder, name)
    index = single + ".index.json"
    if not is_file(index):  # with both, the index is used, as in diffusers
        if is_file(single):
            return dict(read_header(single).tensors)
        there = [other for other in names(folder) if not other.endswith(".json")]
        raise ValueError(
            f"{folder}: has neither {name} nor its .index.json; legal: safetensors without a variant in the name; "
            f"there are {', '.join(there[:10]) or 'no weights'}"
        )
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{index}: has no weight_map of names to files; fetch it again")
    headers = {file: read_header(join(folder, file)) for file in sorted(set(files.values()))}
    missing = sorted(key for key, file in files.items() if key not in headers[file].tensors)
    if missing:
        shown = ", ".join(missing[:10]) + (", …" if len(missing) > 10 else "")
        raise ValueError(f"{index}: {len(missing)} keys are not in the files it names: {shown}; fetch them again")
    return {key: headers[file].tensors[key] for key, file in files.items()}


def read_json(path: str) -> dict[str, Any]:
    """The JSON object in the file at `path`. Raises ValueError naming the file."""
    try:
        with open_binary(path) as file:
            content = json.loads(file.read().decode("utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is not a JSON object; fetch it again")
    return content


# --- the components other than the DiT ---------------------------------------------------------------------------


def _part(path: str, name: str) -> Component:
    return read_component(join(path, name), COMPONENTS[name])


def connectors(path: str) -> Component:
    """Text projections and connectors, as LTX2TextConnectors."""
    return _part(path, "connectors")


def video_vae(path: str) -> Component:
    """The video VAE with its latent statistics, as AutoencoderKLLTX2Video."""
    return _part(path, "vae")


def audio_vae(path: str) -> Component:
    """The audio VAE with its latent statistics, as AutoencoderKLLTX2Audio."""
    return _part(path, "audio_vae")


def vocoder(path: str) -> Component:
    """The vocoder with bandwidth extension, as LTX2VocoderWithBWE."""
    part = _part(path, "vocoder")
    # The reference's first generator ends in tanh or in a clamp, never in neither. diffusers' conversion of 2.3 loses
    # the clamp: it writes null, which is also the class's default.
    return replace(part, config={**part.config, "final_act_fn": part.config.get("final_act_fn") or "clamp"})


def upsampler(path: str) -> Component:
    """The latent upsampler, as LTX2LatentUpsamplerModel; `path` is its folder, or one with a latent_upsampler/."""
    return read_upsampler(path)
