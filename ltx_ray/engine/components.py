"""The parts around the DiT, loaded from the official files into diffusers' modules.

Every loader reads the sizes from the file's own metadata, builds the module on the meta device, renames the file's
keys by the maps below, and takes exactly those tensors, cast to the run's dtype. A file that does not fit is a
ValueError that names it. Key names: shared/ltx-facts.md, "Checkpoint key prefixes". apply.py runs what is loaded here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any

import torch

from ltx_ray.engine.apply import ConnectorAttention, RoundedRope

Path = str | PathLike[str]
Device = str | torch.device

_STATISTICS = ("mean-of-means", "std-of-means")  # LTX-2.0 files hold more of them, which nothing reads
_STATISTICS_PREFIX = {"video": "vae.per_channel_statistics.", "audio": "audio_vae.per_channel_statistics."}


# --- reading -----------------------------------------------------------------------------------------------------


def _open(path: Path):
    from safetensors import safe_open

    return safe_open(str(path), framework="pt", device="cpu")


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object under `config` in a safetensors file's metadata. ValueError if the file has none."""
    with _open(path) as file:
        text = (file.metadata() or {}).get("config")
    if text is None:
        raise ValueError(f"{path}: no `config` in the safetensors metadata; an official LTX-2.3 file has one")
    return json.loads(text)


def _section(path: Path, *names: str) -> dict[str, Any]:
    section = read_config(path)
    for name in names:
        if not isinstance(section, Mapping) or name not in section:
            raise ValueError(f"{path}: the metadata has no config.{'.'.join(names)}")
        section = section[name]
    return section


def _need(path: Path, where: str, section: Mapping[str, Any], legal: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse settings that the module has no way to follow. The first legal value is the one an absent key has."""
    for key, values in legal.items():
        value = section.get(key, values[0])
        if value not in values:
            raise ValueError(
                f"{path}: config.{where}.{key} is {value!r}; supported is {' or '.join(map(repr, values))}"
            )


def _read(
    path: Path, rename: Callable[[str], str | None], dtype: torch.dtype, device: Device
) -> dict[str, torch.Tensor]:
    """The tensors that `rename` gives a name, under that name, cast and moved. No other tensor is read."""
    state = {}
    with _open(path) as file:
        for key in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
            name = rename(key)
            if name is not None:
                state[name] = file.get_tensor(key).to(device=device, dtype=dtype)
    return state


def _fill(module: torch.nn.Module, state: dict[str, torch.Tensor], path: Path, what: str) -> torch.nn.Module:
    """Put `state` into a module built on meta: strictly, without copying, ready for inference."""

    def refuse(problem: str, keys: Iterable[str]) -> None:
        keys = sorted(keys)
        if keys:
            shown = ", ".join(keys[:10]) + (", …" if len(keys) > 10 else "")
            raise ValueError(f"{path}: {what}: {len(keys)} {problem}: {shown}")

    want = module.state_dict()
    refuse("missing keys", want.keys() - state.keys())
    refuse("unexpected keys", state.keys() - want.keys())
    refuse(
        "keys of another shape than the metadata says",
        (
            f"{k} {tuple(v.shape)} instead of {tuple(want[k].shape)}"
            for k, v in state.items()
            if v.shape != want[k].shape
        ),
    )
    module.load_state_dict(state, strict=True, assign=True)
    return module.requires_grad_(False).eval()


def _assert_real(module: torch.nn.Module) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        assert not tensor.is_meta, name


# --- text --------------------------------------------------------------------------------------------------------

_CONNECTOR = re.compile(r"model\.diffusion_model\.(video|audio)_embeddings_connector\.(.+)")
_PROJECTION = re.compile(r"text_embedding_projection\.(video|audio)_aggregate_embed\.(.+)")


def _connector_key(key: str) -> str | None:
    if match := _PROJECTION.fullmatch(key):
        return f"{match[1]}_text_proj_in.{match[2]}"
    if match := _CONNECTOR.fullmatch(key):
        rest = match[2].replace("transformer_1d_blocks.", "transformer_blocks.")
        return f"{match[1]}_connector." + rest.replace("q_norm", "norm_q").replace("k_norm", "norm_k")
    return None


def load_connectors(path: Path, dtype: torch.dtype, device: Device) -> torch.nn.Module:
    """Text projections and connectors of an LTX-2.3 single file, as diffusers' LTX2TextConnectors."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    t = _section(path, "transformer")
    _need(
        path,
        "transformer",
        t,
        {
            "caption_proj_before_connector": (False, True),
            "caption_projection_first_linear": (False,),
            "caption_proj_input_norm": (False,),
            "caption_projection_second_linear": (False,),
            "rope_type": ("split",),
        },
    )
    if not t.get("caption_proj_before_connector", False):
        raise ValueError(
            f"{path}: config.transformer.caption_proj_before_connector is not true; this is no LTX-2.3 file"
        )
    state = _read(path, _connector_key, dtype, device)
    flat = state["video_text_proj_in.weight"].shape[1] if "video_text_proj_in.weight" in state else 0
    channels = t["caption_channels"]
    if flat % channels:
        raise ValueError(
            f"{path}: the text projection takes {flat} features, not a multiple of config.transformer.caption_channels"
            f" = {channels}"
        )
    heads, audio_heads = t["connector_num_attention_heads"], t["audio_connector_num_attention_heads"]
    head_dim, audio_head_dim = t["connector_attention_head_dim"], t["audio_connector_attention_head_dim"]
    layers = t["connector_num_layers"]
    registers = t.get("connector_num_learnable_registers", 128)
    gated = t.get("connector_apply_gated_attention", False)
    with torch.device("meta"):
        module = LTX2TextConnectors(
            caption_channels=channels,
            text_proj_in_factor=flat // channels,
            video_connector_num_attention_heads=heads,
            video_connector_attention_head_dim=head_dim,
            video_connector_num_layers=layers,
            video_connector_num_learnable_registers=registers,
            video_gated_attn=gated,
            audio_connector_num_attention_heads=audio_heads,
            audio_connector_attention_head_dim=audio_head_dim,
            audio_connector_num_layers=t.get("audio_connector_num_layers", layers),
            audio_connector_num_learnable_registers=registers,
            audio_gated_attn=gated,
            connector_rope_base_seq_len=t.get("connector_positional_embedding_max_pos", [1])[0],
            rope_theta=10000.0,  # the reference's connectors have their own, fixed one
            rope_double_precision=t.get("frequencies_precision", False) == "float64",
            rope_type="split",
            per_modality_projections=True,
            video_hidden_dim=t["num_attention_heads"] * t["attention_head_dim"],
            audio_hidden_dim=t["audio_num_attention_heads"] * t["audio_attention_head_dim"],
            proj_bias=True,
        )
    module = _fill(module, state, path, "text connectors")
    for connector in (module.video_connector, module.audio_connector):
        connector.rope = RoundedRope(connector.rope, dtype)
        for block in connector.transformer_blocks:
            block.attn1.set_processor(ConnectorAttention())
    _assert_real(module)
    return module


# --- video VAE ---------------------------------------------------------------------------------------------------

_DOWN = {"compress_space_res": "spatial", "compress_time_res": "temporal", "compress_all_res": "spatiotemporal"}
_UP = {"compress_space": "spatial", "compress_time": "temporal", "compress_all": "spatiotemporal"}


def _alternating(path: Path, where: str, blocks: list, compress: Mapping[str, str]) -> tuple[list[dict], list[dict]]:
    """Split [res, compress, res, …, res] into its res blocks and its compress blocks (with their `type`)."""
    plain = [(name, {"num_layers": rest} if isinstance(rest, int) else rest) for name, rest in blocks]
    fits = len(plain) % 2 == 1 and all(
        (name in compress) if i % 2 else name == "res_x" for i, (name, _) in enumerate(plain)
    )
    if not fits:
        raise ValueError(
            f"{path}: config.vae.{where} is {[name for name, _ in plain]}; supported is res_x alternating with"
            f" {' or '.join(compress)}, res_x first and last"
        )
    return [b for _, b in plain[::2]], [{**b, "type": compress[name]} for name, b in plain[1::2]]


def _video_vae_config(path: Path) -> dict[str, Any]:
    """The arguments of AutoencoderKLLTX2Video for the `config.vae` of a file."""
    vae = _section(path, "vae")
    _need(
        path,
        "vae",
        vae,
        {
            "_class_name": ("CausalVideoAutoencoder",),
            "dims": (3,),
            "norm_layer": ("pixel_norm",),
            "latent_log_var": ("uniform",),
            "timestep_conditioning": (True, False),  # absent means True to the reference
        },
    )
    if vae.get("timestep_conditioning", True):
        raise ValueError(f"{path}: config.vae.timestep_conditioning is not false; LTX-2.3 decodes without a timestep")

    latent = vae.get("latent_channels", 128)
    down_res, down = _alternating(path, "encoder_blocks", vae["encoder_blocks"], _DOWN)
    widths = [latent]  # the encoder starts as wide as the latents
    for block in down:
        widths.append(widths[-1] * block.get("multiplier", 2))

    up_res, up = _alternating(path, "decoder_blocks", vae["decoder_blocks"], _UP)  # listed from the pixel end
    if any(block.get("inject_noise", False) for block in up_res):
        raise ValueError(f"{path}: config.vae.decoder_blocks has inject_noise; LTX-2.3 has none")
    factors = [block.get("multiplier", 1) for block in up]
    base = vae.get("decoder_base_channels", 128)
    # diffusers wants the width going into each upsampler, from the pixel end
    up_widths = [base * math.prod(factors[: i + 1]) for i in range(len(factors))]

    space, time = ("spatial", "spatiotemporal"), ("temporal", "spatiotemporal")
    patch = vae.get("patch_size", 4)
    return dict(
        in_channels=vae.get("in_channels", 3),
        out_channels=vae.get("out_channels", 3),
        latent_channels=latent,
        block_out_channels=tuple(widths[1:]),
        down_block_types=("LTX2VideoDownBlock3D",) * len(down),
        layers_per_block=tuple(b["num_layers"] for b in down_res),
        spatio_temporal_scaling=(True,) * len(down),
        downsample_type=tuple(b["type"] for b in down),
        decoder_block_out_channels=tuple(up_widths),
        decoder_layers_per_block=tuple(b["num_layers"] for b in up_res),
        decoder_spatio_temporal_scaling=(True,) * len(up),
        decoder_inject_noise=(False,) * len(up_res),
        # alone among these, diffusers takes this one from the latent end
        upsample_type=tuple(b["type"] for b in reversed(up)),
        upsample_residual=tuple(b["type"] == "spatiotemporal" and b.get("residual", False) for b in up),
        upsample_factor=tuple(factors),
        timestep_conditioning=False,
        patch_size=patch,
        patch_size_t=1,
        resnet_norm_eps=1e-6,
        encoder_causal=True,
        decoder_causal=vae.get("causal_decoder", False),
        encoder_spatial_padding_mode=vae.get("spatial_padding_mode", vae.get("encoder_spatial_padding_mode", "zeros")),
        decoder_spatial_padding_mode=vae.get("spatial_padding_mode", "reflect"),
        spatial_compression_ratio=patch * 2 ** sum(b["type"] in space for b in down),
        temporal_compression_ratio=2 ** sum(b["type"] in time for b in down),
    )


def _statistics_key(key: str, which: str) -> str | None:
    name = key.removeprefix(_STATISTICS_PREFIX[which])
    return {"mean-of-means": "latents_mean", "std-of-means": "latents_std"}.get(name) if name != key else None


def _video_vae_key(key: str, downs: int, parts: tuple[str, ...]) -> str | None:
    """`vae.*` to diffusers' name, for an encoder of `downs` downsamplings; None for what is not wanted."""
    if name := _statistics_key(key, "video"):
        return name
    match = re.fullmatch(r"vae\.(encoder|decoder)\.(.+)", key)
    if match is None or match[1] not in parts:
        return None
    half, rest = match[1], match[2].replace("res_blocks.", "resnets.")
    block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(.+)", rest)
    if block is None:
        return f"{half}.{rest}"
    kind, index, rest = block[1], int(block[2]), block[3]
    # The file numbers res and resampling blocks in one row: res 0, resample 1, res 2, … The encoder's last and the
    # decoder's first res block is diffusers' mid_block; elsewhere a res block shares its number with the downsampler
    # after it, or with the upsampler before it.
    if index == (2 * downs if kind == "down" else 0):
        return f"{half}.mid_block.{rest}"
    shared = index // 2 if kind == "down" else (index - 1) // 2
    return f"{half}.{kind}_blocks.{shared}." + (f"{kind}samplers.0.{rest}" if index % 2 else rest)


def load_video_vae(path: Path, dtype: torch.dtype, device: Device, part: str = "decoder") -> torch.nn.Module:
    """The video VAE as diffusers' AutoencoderKLLTX2Video; `part` is "decoder", "encoder" or "both".

    Only the wanted half is read; the other is None in the module. Either has latents_mean and latents_std.
    """
    from diffusers import AutoencoderKLLTX2Video

    halves = {"decoder": ("decoder",), "encoder": ("encoder",), "both": ("encoder", "decoder")}
    if part not in halves:
        raise ValueError(f"part is {part!r}; legal is 'decoder', 'encoder' or 'both'")
    config = _video_vae_config(path)
    with torch.device("meta"):
        module = AutoencoderKLLTX2Video(**config)
    for half in ("encoder", "decoder"):
        if half not in halves[part]:
            setattr(module, half, None)
    downs = len(config["downsample_type"])
    state = _read(path, lambda key: _video_vae_key(key, downs, halves[part]), dtype, device)
    module = _fill(module, state, path, f"video VAE ({part})")
    _assert_real(module)
    return module


def latent_stats(path: Path, which: str = "video") -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std) of the VAE's latents, (128,) each, in the file's dtype on the CPU.

    `which` is "video" (per channel) or "audio" (per packed index, channel * 16 + bin).
    """
    if which not in _STATISTICS_PREFIX:
        raise ValueError(f"which is {which!r}; legal is 'video' or 'audio'")
    keys = [_STATISTICS_PREFIX[which] + name for name in _STATISTICS]
    with _open(path) as file:
        if missing := set(keys) - set(file.keys()):
            raise ValueError(f"{path}: {which} statistics: {len(missing)} missing keys: {', '.join(sorted(missing))}")
        mean, std = (file.get_tensor(key) for key in keys)
    return mean, std


# --- audio -------------------------------------------------------------------------------------------------------


def _audio_vae_key(key: str) -> str | None:
    if name := _statistics_key(key, "audio"):
        return name
    return key.removeprefix("audio_vae.") if key.startswith("audio_vae.decoder.") else None


def load_audio_decoder(path: Path, dtype: torch.dtype, device: Device) -> torch.nn.Module:
    """The decoding half of the audio VAE as diffusers' AutoencoderKLLTX2Audio (its encoder is None)."""
    from diffusers import AutoencoderKLLTX2Audio

    audio = _section(path, "audio_vae")
    params = _section(path, "audio_vae", "model", "params")
    dd = _section(path, "audio_vae", "model", "params", "ddconfig")
    stft = audio.get("preprocessing", {}).get("stft", {})
    mel = audio.get("preprocessing", {}).get("mel", {})
    with torch.device("meta"):
        module = AutoencoderKLLTX2Audio(
            base_channels=dd.get("ch", 128),
            output_channels=dd.get("out_ch", 2),
            ch_mult=tuple(dd.get("ch_mult", (1, 2, 4))),
            num_res_blocks=dd.get("num_res_blocks", 2),
            attn_resolutions=tuple(dd.get("attn_resolutions", (8, 16, 32))) or None,
            in_channels=dd.get("in_channels", 2),
            resolution=dd.get("resolution", 256),
            latent_channels=dd.get("z_channels", 8),
            norm_type=dd.get("norm_type", "pixel"),
            causality_axis=dd.get("causality_axis", "height"),
            dropout=0.0,
            mid_block_add_attention=dd.get("mid_block_add_attention", True),
            sample_rate=params.get("sampling_rate", 16000),
            mel_hop_length=stft.get("hop_length", 160),
            is_causal=stft.get("causal", True),
            mel_bins=dd.get("mel_bins") or mel.get("n_mel_channels"),
            double_z=dd.get("double_z", True),
        )
    module.encoder = None
    module = _fill(module, _read(path, _audio_vae_key, dtype, device), path, "audio VAE (decoder)")
    _assert_real(module)
    return module


_VOCODER_NAMES = {
    "conv_pre.": "conv_in.",
    "conv_post.": "conv_out.",
    "act_post.": "act_out.",
    "ups.": "upsamplers.",
    "resblocks.": "resnets.",
}


def _vocoder_key(key: str) -> str | None:
    if not key.startswith("vocoder."):
        return None
    part, _, rest = key.removeprefix("vocoder.").partition(".")
    if part in ("vocoder", "bwe_generator"):
        for theirs, ours in _VOCODER_NAMES.items():
            if rest.startswith(theirs):
                rest = ours + rest.removeprefix(theirs)
                break
        rest = rest.replace(".downsample.lowpass.", ".downsample.")
    return f"{part}.{rest}"


def _generator_config(path: Path, name: str) -> dict[str, Any]:
    g = _section(path, "vocoder", name)
    _need(
        path, f"vocoder.{name}", g, {"resblock": ("1", "AMP1"), "activation": ("snake", "snakebeta"), "stereo": (True,)}
    )
    if g.get("resblock") != "AMP1" or g.get("activation") != "snakebeta":
        raise ValueError(f"{path}: config.vocoder.{name} is not AMP1 with snakebeta, as in LTX-2.3")
    return dict(
        hidden_channels=g.get("upsample_initial_channel", 1024),
        upsample_kernel_sizes=list(g["upsample_kernel_sizes"]),
        upsample_factors=list(g["upsample_rates"]),
        resnet_kernel_sizes=list(g.get("resblock_kernel_sizes", [3, 7, 11])),
        resnet_dilations=[list(d) for d in g.get("resblock_dilation_sizes", [[1, 3, 5]] * 3)],
        act_fn="snakebeta",
        antialias=True,
        final_bias=g.get("use_bias_at_final", True),
    )


def load_vocoder(path: Path, dtype: torch.dtype, device: Device) -> torch.nn.Module:
    """The vocoder with bandwidth extension as diffusers' LTX2VocoderWithBWE.

    Its weights are rounded to `dtype` but held in float32: v1.2.0 stores them in the run's dtype and computes in
    float32 (its comment: bfloat16 spoils the spectrum by 40-90 %).
    """
    from diffusers.pipelines.ltx2 import LTX2VocoderWithBWE
    from diffusers.pipelines.ltx2.vocoder import UpSample1d

    bwe = _section(path, "vocoder", "bwe")
    first, second = _generator_config(path, "vocoder"), _generator_config(path, "bwe")
    low, high = bwe["input_sampling_rate"], bwe["output_sampling_rate"]
    # The first generator ends in tanh or in a clamp (which diffusers' own conversion forgets), the second in neither.
    final = "tanh" if _section(path, "vocoder", "vocoder").get("use_tanh_at_final", True) else "clamp"
    with torch.device("meta"):
        module = LTX2VocoderWithBWE(
            **first,
            final_act_fn=final,
            **{f"bwe_{key}": value for key, value in second.items()},
            bwe_final_act_fn=None,
            filter_length=bwe["n_fft"],
            hop_length=bwe["hop_length"],
            window_length=bwe["n_fft"],
            num_mel_channels=bwe["num_mels"],
            input_sampling_rate=low,
            output_sampling_rate=high,
        )
    state = {key: value.float() for key, value in _read(path, _vocoder_key, dtype, device).items()}
    module = _fill(module, state, path, "vocoder")
    # The resampler's filter is computed, not stored, so the one built on meta holds no numbers.
    resampler = UpSample1d(ratio=high // low, window_type="hann", persistent=False)
    resampler.filter = resampler.filter.to(device=device, dtype=torch.float32)
    module.resampler = resampler
    _assert_real(module)
    return module


# --- upsampler ---------------------------------------------------------------------------------------------------


def load_upsampler(path: Path, dtype: torch.dtype, device: Device) -> torch.nn.Module:
    """A latent upsampler file (flat `config`, keys without prefix) as diffusers' LTX2LatentUpsamplerModel."""
    from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel

    config = read_config(path)
    with torch.device("meta"):
        module = LTX2LatentUpsamplerModel(
            in_channels=config.get("in_channels", 128),
            mid_channels=config.get("mid_channels", 512),
            num_blocks_per_stage=config.get("num_blocks_per_stage", 4),
            dims=config.get("dims", 3),
            spatial_upsample=config.get("spatial_upsample", True),
            temporal_upsample=config.get("temporal_upsample", False),
            rational_spatial_scale=float(config.get("spatial_scale", 2.0)),
            use_rational_resampler=config.get("rational_resampler", False),
        )
    module = _fill(module, _read(path, lambda key: key, dtype, device), path, "latent upsampler")
    _assert_real(module)
    return module
