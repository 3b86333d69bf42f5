"""The components other than the DiT in the official single files, as arguments and names of diffusers' classes.

Sizes come from the file's metadata. A file that does not fit is a ValueError that names it. Prefixes of the keys:
docs/ltx-2.3.md. diffusers_layout.py has the same functions for diffusers' layout.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ltx_ray.checkpoints.diffusers_layout import Component
from ltx_ray.checkpoints.safetensors import SafetensorsHeader, TensorInfo, read_header
from ltx_ray.checkpoints.transformer_keys import K_NORM, Q_NORM, TRANSFORMER_PREFIX

#: The statistics that are read. LTX-2.0 files hold more.
_STATISTICS = {"mean-of-means": "latents_mean", "std-of-means": "latents_std"}


def _open(path: str) -> SafetensorsHeader:
    header = read_header(path)
    if "config" not in header.metadata:
        raise ValueError(f"{path}: no `config` in the safetensors metadata; an official LTX-2.3 file has one")
    return header


def _section(header: SafetensorsHeader, *names: str) -> dict[str, Any]:
    section: Any = header.config
    for name in names:
        if not isinstance(section, Mapping) or name not in section:
            raise ValueError(f"{header.path}: the metadata has no config.{'.'.join(names)}")
        section = section[name]
    return section


def _need(path: str, where: str, section: Mapping[str, Any], legal: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise ValueError for settings that are not supported. An absent key has the first of its legal values."""
    for key, values in legal.items():
        value = section.get(key, values[0])
        if value not in values:
            raise ValueError(
                f"{path}: config.{where}.{key} is {value!r}; supported is {' or '.join(map(repr, values))}"
            )


def _renamed(header: SafetensorsHeader, rename: Callable[[str], str | None]) -> dict[str, TensorInfo]:
    """The tensors under the names that `rename` gives them; those without one are left out."""
    named = ((rename(key), info) for key, info in header.tensors.items())
    return {name: info for name, info in named if name is not None}


def _fitting(read: Callable[[str], Component]) -> Callable[[str], Component]:
    """`read`, which also raises ValueError for metadata that lack a field or have one of another type."""

    @functools.wraps(read)
    def checked(path: str) -> Component:
        try:
            return read(path)
        except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(
                f"{path}: the metadata do not describe the part {read.__name__} as those of LTX-2.3 do ({error!r})"
            ) from error

    return checked


# --- text --------------------------------------------------------------------------------------------------------

_CONNECTOR = re.compile(rf"{re.escape(TRANSFORMER_PREFIX)}(video|audio)_embeddings_connector\.(.+)")
_PROJECTION = re.compile(r"text_embedding_projection\.(video|audio)_aggregate_embed\.(.+)")


def _connector_key(key: str) -> str | None:
    if match := _PROJECTION.fullmatch(key):
        return f"{match[1]}_text_proj_in.{match[2]}"
    if match := _CONNECTOR.fullmatch(key):
        rest = match[2].replace("transformer_1d_blocks.", "transformer_blocks.")
        return f"{match[1]}_connector." + rest.replace(Q_NORM, "norm_q").replace(K_NORM, "norm_k")
    return None


@_fitting
def connectors(path: str) -> Component:
    """Text projections and connectors, as LTX2TextConnectors."""
    header = _open(path)
    t = _section(header, "transformer")
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
            f"{path}: config.transformer.caption_proj_before_connector is not true; this is not an LTX-2.3 file"
        )
    tensors = _renamed(header, _connector_key)
    flat = tensors["video_text_proj_in.weight"].shape[1] if "video_text_proj_in.weight" in tensors else 0
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
    config = dict(
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
        rope_theta=10000.0,  # fixed in the reference's connectors
        rope_double_precision=t.get("frequencies_precision", False) == "float64",
        rope_type="split",
        per_modality_projections=True,
        video_hidden_dim=t["num_attention_heads"] * t["attention_head_dim"],
        audio_hidden_dim=t["audio_num_attention_heads"] * t["audio_attention_head_dim"],
        proj_bias=True,
    )
    return Component(path, config, tensors)


# --- video VAE ---------------------------------------------------------------------------------------------------

_DOWN = {"compress_space_res": "spatial", "compress_time_res": "temporal", "compress_all_res": "spatiotemporal"}
_UP = {"compress_space": "spatial", "compress_time": "temporal", "compress_all": "spatiotemporal"}


def _alternating(path: str, where: str, blocks: list, compress: Mapping[str, str]) -> tuple[list[dict], list[dict]]:
    """Split [res, compress, res, …, res] into res blocks and compress blocks (the latter with their `type`)."""
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


def _video_vae_config(header: SafetensorsHeader) -> dict[str, Any]:
    """The arguments of AutoencoderKLLTX2Video for the `config.vae` of a file."""
    path, vae = header.path, _section(header, "vae")
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

    up_res, up = _alternating(path, "decoder_blocks", vae["decoder_blocks"], _UP)  # pixel end first
    if any(block.get("inject_noise", False) for block in up_res):
        raise ValueError(f"{path}: config.vae.decoder_blocks has inject_noise; LTX-2.3 has none")
    factors = [block.get("multiplier", 1) for block in up]
    base = vae.get("decoder_base_channels", 128)
    # diffusers takes the input width of each upsampler, pixel end first
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
        # the only one of these that diffusers takes latent end first
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


def _video_vae_key(key: str, downs: int) -> str | None:
    """diffusers' name of a key `vae.*`, for an encoder of `downs` downsamplings; None for a key that is not read."""
    if key.startswith(prefix := "vae.per_channel_statistics."):
        return _STATISTICS.get(key.removeprefix(prefix))
    match = re.fullmatch(r"vae\.(encoder|decoder)\.(.+)", key)
    if match is None:
        return None
    half, rest = match[1], match[2].replace("res_blocks.", "resnets.")
    block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(.+)", rest)
    if block is None:
        return f"{half}.{rest}"
    kind, index, rest = block[1], int(block[2]), block[3]
    # The file numbers res and resampling blocks together: res 0, resample 1, res 2, … The encoder's last and the
    # decoder's first res block are diffusers' mid_block. Any other res block shares its number with the downsampler
    # after it or the upsampler before it.
    if index == (2 * downs if kind == "down" else 0):
        return f"{half}.mid_block.{rest}"
    shared = index // 2 if kind == "down" else (index - 1) // 2
    return f"{half}.{kind}_blocks.{shared}." + (f"{kind}samplers.0.{rest}" if index % 2 else rest)


@_fitting
def video_vae(path: str) -> Component:
    """The video VAE with its latent statistics, as AutoencoderKLLTX2Video."""
    header = _open(path)
    config = _video_vae_config(header)
    downs = len(config["downsample_type"])
    return Component(path, config, _renamed(header, lambda key: _video_vae_key(key, downs)))


# --- audio -------------------------------------------------------------------------------------------------------


def _audio_vae_key(key: str) -> str | None:
    if key.startswith(prefix := "audio_vae.per_channel_statistics."):
        return _STATISTICS.get(key.removeprefix(prefix))
    return key.removeprefix("audio_vae.") if key.startswith(("audio_vae.encoder.", "audio_vae.decoder.")) else None


@_fitting
def audio_vae(path: str) -> Component:
    """The audio VAE with its latent statistics, as AutoencoderKLLTX2Audio."""
    header = _open(path)
    audio = _section(header, "audio_vae")
    params = _section(header, "audio_vae", "model", "params")
    dd = _section(header, "audio_vae", "model", "params", "ddconfig")
    stft = audio.get("preprocessing", {}).get("stft", {})
    mel = audio.get("preprocessing", {}).get("mel", {})
    config = dict(
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
    return Component(path, config, _renamed(header, _audio_vae_key))


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
        for official, diffusers in _VOCODER_NAMES.items():
            if rest.startswith(official):
                rest = diffusers + rest.removeprefix(official)
                break
        rest = rest.replace(".downsample.lowpass.", ".downsample.")
    return f"{part}.{rest}"


def _generator_config(header: SafetensorsHeader, name: str) -> dict[str, Any]:
    path, g = header.path, _section(header, "vocoder", name)
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


@_fitting
def vocoder(path: str) -> Component:
    """The vocoder with bandwidth extension, as LTX2VocoderWithBWE."""
    header = _open(path)
    bwe = _section(header, "vocoder", "bwe")
    first, second = _generator_config(header, "vocoder"), _generator_config(header, "bwe")
    # The first generator ends in tanh or in a clamp, the second in neither of them.
    final = "tanh" if _section(header, "vocoder", "vocoder").get("use_tanh_at_final", True) else "clamp"
    config = dict(
        **first,
        final_act_fn=final,
        **{f"bwe_{key}": value for key, value in second.items()},
        bwe_final_act_fn=None,
        filter_length=bwe["n_fft"],
        hop_length=bwe["hop_length"],
        window_length=bwe["n_fft"],
        num_mel_channels=bwe["num_mels"],
        input_sampling_rate=bwe["input_sampling_rate"],
        output_sampling_rate=bwe["output_sampling_rate"],
    )
    return Component(path, config, _renamed(header, _vocoder_key))


# --- upsampler ---------------------------------------------------------------------------------------------------


@_fitting
def upsampler(path: str) -> Component:
    """A latent upsampler file (flat `config`, keys without prefix), as LTX2LatentUpsamplerModel."""
    header = _open(path)
    flat = header.config
    config = dict(
        in_channels=flat.get("in_channels", 128),
        mid_channels=flat.get("mid_channels", 512),
        num_blocks_per_stage=flat.get("num_blocks_per_stage", 4),
        dims=flat.get("dims", 3),
        spatial_upsample=flat.get("spatial_upsample", True),
        temporal_upsample=flat.get("temporal_upsample", False),
        rational_spatial_scale=float(flat.get("spatial_scale", 2.0)),
        use_rational_resampler=flat.get("rational_resampler", False),
    )
    return Component(path, config, header.tensors)
