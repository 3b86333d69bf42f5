"""The toy model: the five pieces of LTX-2.3 that a user downloads, at tiny widths and with random weights.

File formats, key names, metadata and features are those of the release (see shared/ltx-facts.md, "Checkpoint
key prefixes" and "Metadata of the single file"), so whatever loads the release loads the toy. The weights are
random, so its pictures mean nothing; they are scaled so that nothing saturates, freezes or falls silent.

All weights come from one torch.Generator, and only from its uniform draws: those are integer arithmetic and thus
the same on every CPU, which the vectorised normal draws are not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

FILES = {
    "checkpoint_path": "ltx-2.3-toy-dev.safetensors",
    "distilled_lora": "ltx-2.3-toy-distilled-lora-1.1.safetensors",
    "spatial_upsampler_path": "ltx-2.3-toy-spatial-upscaler-x2-1.1.safetensors",
    "gemma_root": "gemma-toy",
}

MODEL_VERSION = "2.3.0"
LATENT_CHANNELS = 128  # of the video VAE; the first width of its encoder too
AUDIO_LATENT = (8, 16)  # channels x bins; 8 * 16 is also the width of the audio VAE (its statistics are per ch)
REGISTERS = 128
PATCH = 4
MEL_BINS = 64
BWE_FFT = 512
BWE_HOP = 80


@dataclass(frozen=True)
class ToyShape:
    """Widths and depths of a toy model. Tuples run in the order of the checkpoint's own config lists.

    Raises ValueError naming the field, its value and what is legal.
    """

    layers: int = 4
    heads: int = 4  # of video and of audio: the model requires them to be equal
    head_dim: int = 32
    audio_head_dim: int = 16
    connector_layers: int = 2
    gemma_hidden: int = 64
    gemma_layers: int = 6
    gemma_heads: int = 4
    gemma_kv_heads: int = 2
    encoder_layers: tuple[int, ...] = (1, 1, 1, 1, 1)
    encoder_multipliers: tuple[int, ...] = (1, 1, 1, 1)  # the release has 2, 2, 2, 1
    decoder_layers: tuple[int, ...] = (1, 2, 2, 1, 1)
    decoder_base: int = 8
    audio_mult: tuple[int, ...] = (1, 1, 1)
    audio_blocks: int = 1
    vocoder_channels: int = 128
    bwe_channels: int = 64
    upsampler_channels: int = 32
    upsampler_blocks: int = 1
    lora_rank: int = 8

    def __post_init__(self):
        def check(field, legal, ok):
            value = getattr(self, field)
            whole = all(isinstance(v, int) and v > 0 for v in (value if isinstance(value, tuple) else (value,)))
            if not (whole and ok(value)):
                raise ValueError(f"ToyShape.{field} is {value!r}; legal is {legal}")

        for field in ("layers", "connector_layers", "gemma_layers", "audio_blocks", "upsampler_blocks", "lora_rank"):
            check(field, "an integer of at least 1", lambda v: True)
        for field in ("heads", "gemma_heads", "gemma_kv_heads"):
            check(field, "an integer of at least 1", lambda v: True)
        for field in ("head_dim", "audio_head_dim"):
            check(field, "an even integer (RoPE pairs)", lambda v: v % 2 == 0)
        check("gemma_heads", "a multiple of gemma_kv_heads", lambda v: v % self.gemma_kv_heads == 0)
        check("gemma_hidden", "a multiple of 2 * gemma_heads", lambda v: v % (2 * self.gemma_heads) == 0)
        check("encoder_layers", "five integers", lambda v: len(v) == 5)
        check("decoder_layers", "five integers", lambda v: len(v) == 5)
        check("encoder_multipliers", "four of 1 or 2", lambda v: len(v) == 4 and set(v) <= {1, 2})
        check("decoder_base", "an integer of at least 1", lambda v: True)
        check("audio_mult", "three integers (two halvings in time make the 25 latents/s)", lambda v: len(v) == 3)
        check("vocoder_channels", "a multiple of 64 (six halvings)", lambda v: v % 64 == 0)
        check("bwe_channels", "a multiple of 32 (five halvings)", lambda v: v % 32 == 0)
        check("upsampler_channels", "a multiple of 32 (its group norms)", lambda v: v % 32 == 0)

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def audio_dim(self) -> int:
        return self.heads * self.audio_head_dim


def checkpoint_config(shape: ToyShape) -> dict:
    """The JSON object that the single file carries under `config`."""
    s = shape
    transformer = {
        "_class_name": "AVTransformer3DModel",
        "num_layers": s.layers,
        "num_attention_heads": s.heads,
        "attention_head_dim": s.head_dim,
        "audio_num_attention_heads": s.heads,
        "audio_attention_head_dim": s.audio_head_dim,
        "cross_attention_dim": s.dim,
        "audio_cross_attention_dim": s.audio_dim,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "audio_in_channels": math.prod(AUDIO_LATENT),
        "audio_out_channels": math.prod(AUDIO_LATENT),
        "norm_eps": 1e-6,
        "positional_embedding_theta": 10000.0,
        "positional_embedding_max_pos": [20, 2048, 2048],
        "audio_positional_embedding_max_pos": [20],
        "timestep_scale_multiplier": 1000,
        "av_ca_timestep_scale_multiplier": 1000,
        "rope_type": "split",
        "frequencies_precision": "float64",
        "apply_gated_attention": True,
        "cross_attention_adaln": True,
        # the four below together mean "the text projection comes before the connectors" (2.3)
        "caption_proj_before_connector": True,
        "caption_projection_first_linear": False,
        "caption_proj_input_norm": False,
        "caption_projection_second_linear": False,
        "caption_channels": s.gemma_hidden,
        "text_encoder_norm_type": "per_token_rms",
        "use_embeddings_connector": True,
        "connector_num_layers": s.connector_layers,
        "connector_num_attention_heads": s.heads,
        "connector_attention_head_dim": s.head_dim,
        "audio_connector_num_attention_heads": s.heads,
        "audio_connector_attention_head_dim": s.audio_head_dim,
        "connector_num_learnable_registers": REGISTERS,
        "connector_positional_embedding_max_pos": [4096],
        "connector_apply_gated_attention": True,
        "connector_norm_output": True,
        # the rest has one legal value each; the reference refuses a file that lacks them
        "dropout": 0.0,
        "attention_bias": True,
        "num_vector_embeds": None,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "use_linear_projection": False,
        "only_cross_attention": False,
        "cross_attention_norm": True,
        "double_self_attention": False,
        "upcast_attention": False,
        "standardization_norm": "rms_norm",
        "norm_elementwise_affine": False,
        "qk_norm": "rms_norm",
        "positional_embedding_type": "rope",
        "use_audio_video_cross_attention": True,
        "share_ff": False,
        "av_cross_ada_norm": True,
        "use_middle_indices_grid": True,
    }
    e, m, d = s.encoder_layers, s.encoder_multipliers, s.decoder_layers
    res = lambda n: ["res_x", {"num_layers": n}]  # noqa: E731
    vae = {
        "_class_name": "CausalVideoAutoencoder",
        "dims": 3,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": LATENT_CHANNELS,
        "encoder_blocks": [
            res(e[0]),
            ["compress_space_res", {"multiplier": m[0]}],
            res(e[1]),
            ["compress_time_res", {"multiplier": m[1]}],
            res(e[2]),
            ["compress_all_res", {"multiplier": m[2]}],
            res(e[3]),
            ["compress_all_res", {"multiplier": m[3]}],
            res(e[4]),
        ],  # fmt: skip
        "decoder_blocks": [  # listed from the pixel end; built in reverse
            res(d[0]),
            ["compress_space", {"multiplier": 2}],
            res(d[1]),
            ["compress_time", {"multiplier": 2}],
            res(d[2]),
            ["compress_all", {"multiplier": 1}],
            res(d[3]),
            ["compress_all", {"multiplier": 2}],
            res(d[4]),
        ],  # fmt: skip
        "decoder_base_channels": s.decoder_base,
        "norm_layer": "pixel_norm",
        "latent_log_var": "uniform",
        "patch_size": PATCH,
        "causal_decoder": False,
        "timestep_conditioning": False,
        "spatial_padding_mode": "zeros",
    }
    audio_vae = {
        "model": {
            "params": {
                "sampling_rate": 16000,
                "ddconfig": {
                    "ch": math.prod(AUDIO_LATENT),
                    "ch_mult": list(s.audio_mult),
                    "num_res_blocks": s.audio_blocks,
                    "attn_resolutions": [],
                    "resolution": 256,
                    "in_channels": 2,
                    "out_ch": 2,
                    "z_channels": AUDIO_LATENT[0],
                    "double_z": True,
                    "mel_bins": MEL_BINS,
                    "dropout": 0.0,
                    "norm_type": "pixel",
                    "causality_axis": "height",
                    "mid_block_add_attention": False,
                },
            }
        },
        "preprocessing": {
            "audio": {"sampling_rate": 16000},
            "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True},
            "mel": {"n_mel_channels": MEL_BINS, "mel_fmin": 0, "mel_fmax": 8000},
        },
    }
    generator = {
        "resblock": "AMP1",
        "activation": "snakebeta",
        "stereo": True,
        "resblock_kernel_sizes": [3, 7, 11],
        "resblock_dilation_sizes": [[1, 3, 5]] * 3,
        "use_tanh_at_final": False,
        "use_bias_at_final": False,
    }
    vocoder = {
        "vocoder": {
            **generator,
            "upsample_initial_channel": s.vocoder_channels,
            "upsample_rates": [5, 2, 2, 2, 2, 2],
            "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
        },
        "bwe": {
            **generator,
            "upsample_initial_channel": s.bwe_channels,
            "upsample_rates": [6, 5, 2, 2, 2],
            "upsample_kernel_sizes": [12, 11, 4, 4, 4],
            "input_sampling_rate": 16000,
            "output_sampling_rate": 48000,
            "n_fft": BWE_FFT,
            "hop_length": BWE_HOP,
            "num_mels": MEL_BINS,
        },
    }
    scheduler = {"_class_name": "RectifiedFlowScheduler", "sampler": "LinearQuadratic", "shifting": "SD3"}
    return {"transformer": transformer, "vae": vae, "audio_vae": audio_vae, "vocoder": vocoder, "scheduler": scheduler}


class Draw:
    """Tensors of one safetensors file, drawn from a generator. Stored as bfloat16, drawn as float32.

    `gain` scales a layer's output: at gain 1 a unit-variance input gives a unit-variance output.
    """

    def __init__(self, generator):
        self.generator = generator
        self.tensors: dict = {}

    def uniform(self, shape, std: float, mean: float = 0.0):
        """Uniform numbers of that mean and standard deviation, float32."""
        import torch

        half = std * math.sqrt(3.0)
        return torch.rand(shape, generator=self.generator, dtype=torch.float32) * (2 * half) + (mean - half)

    def put(self, key: str, value):
        import torch

        assert key not in self.tensors, key
        self.tensors[key] = value.to(torch.bfloat16).contiguous()

    def vector(self, key: str, shape, std: float, mean: float = 0.0):
        self.put(key, self.uniform(shape, std, mean))

    def linear(self, key: str, n_out: int, n_in: int, gain: float = 1.0, bias: float = 0.05):
        self.vector(f"{key}.weight", (n_out, n_in), gain / math.sqrt(n_in))
        self.vector(f"{key}.bias", (n_out,), bias)

    def conv(self, key: str, n_out: int, n_in: int, kernel, gain: float = 1.0, bias: float | None = 0.05):
        self.vector(f"{key}.weight", (n_out, n_in, *kernel), gain / math.sqrt(n_in * math.prod(kernel)))
        if bias is not None:
            self.vector(f"{key}.bias", (n_out,), bias)

    def smooth_conv(self, key: str, n_out: int, n_in: int, gain: float, factors=(), detail: float = 0.1):
        """A 3x3x3 (or 3x3) convolution that blurs and mixes channels, plus `detail` of it at random: with plain random
        kernels every picture is grain. `factors` says by how much each axis grows in the depth-to-space after it, the
        sub-pixels in the file's order; each sub-pixel then takes its own share of its neighbours (linear
        interpolation), so that upsampling shows no blocks. For `gain`, the input counts as locally constant."""
        import torch

        axes = [_taps(factor) for factor in factors]
        kernel = torch.ones(())
        for taps in axes:  # (p1, p2, p3, k1, k2, k3) in the end
            grown = kernel.dim() // 2
            kernel = torch.tensordot(kernel, taps, dims=0).movedim(kernel.dim(), grown)
        sub = kernel.shape[: len(axes)]
        pixels, size = math.prod(sub), kernel.shape[len(axes) :]
        kernel = kernel.reshape(1, pixels, 1, *size)
        mix = self.uniform((n_out // pixels, 1, n_in, *[1] * len(axes)), gain / math.sqrt(n_in))
        # most inputs are activations and lean positive: without their mean, pictures are grey on average
        mix = mix - mix.mean(2, keepdim=True)
        grain = self.uniform((n_out // pixels, pixels, n_in, *size), detail * gain / math.sqrt(n_in * math.prod(size)))
        self.put(f"{key}.weight", (mix * kernel + grain).reshape(n_out, n_in, *size))
        self.put(f"{key}.bias", self.uniform((n_out // pixels, 1), 0.03).expand(-1, pixels).reshape(n_out))


def _taps(factor: int):
    """Weights of the left, own and right neighbour for each of `factor` sub-pixels: (factor, 3), rows sum to 1.
    A factor of 1 is a plain blur."""
    import torch

    if factor == 1:
        return torch.tensor([[0.25, 0.5, 0.25]])
    offset = (torch.arange(factor) + 0.5) / factor - 0.5
    return torch.stack([(-offset).clamp(min=0), 1 - offset.abs(), offset.clamp(min=0)], dim=1)


# --- the single file ---------------------------------------------------------------------------------------------


def _attention(draw: Draw, key: str, heads: int, inner: int, query: int, context: int, sharp: float):
    """Gated attention. `sharp` is the mean of the q/k norm weights: above 1 the softmax picks out a few tokens,
    without which a prompt's words would average away among a thousand registers."""
    for name in ("q_norm", "k_norm"):
        draw.vector(f"{key}.{name}.weight", (inner,), 0.2, sharp)
    draw.linear(f"{key}.to_q", inner, query)
    draw.linear(f"{key}.to_k", inner, context)
    draw.linear(f"{key}.to_v", inner, context)
    draw.linear(f"{key}.to_gate_logits", heads, query, bias=0.5)
    draw.linear(f"{key}.to_out.0", query, inner)


def _feed_forward(draw: Draw, key: str, dim: int):
    draw.linear(f"{key}.net.0.proj", 4 * dim, dim)
    draw.linear(f"{key}.net.2", dim, 4 * dim, gain=1.5)


def _draw_transformer(draw: Draw, s: ToyShape):
    top = "model.diffusion_model."

    def adaln(name, dim, rows, gain):
        draw.linear(f"{top}{name}.emb.timestep_embedder.linear_1", dim, 256, gain=1.5)
        draw.linear(f"{top}{name}.emb.timestep_embedder.linear_2", dim, dim, gain=1.5)
        draw.linear(f"{top}{name}.linear", rows * dim, dim, gain=gain)

    for stream, dim, channels in (("", s.dim, LATENT_CHANNELS), ("audio_", s.audio_dim, math.prod(AUDIO_LATENT))):
        draw.linear(f"{top}{stream}patchify_proj", dim, channels)
        draw.linear(f"{top}{stream}proj_out", channels, dim, gain=0.7)
        draw.vector(f"{top}{stream}scale_shift_table", (2, dim), 0.2)
        adaln(f"{stream}adaln_single", dim, 9, 0.6)
        adaln(f"{stream}prompt_adaln_single", dim, 2, 0.4)
    for stream, gate, dim in (("video", "a2v", s.dim), ("audio", "v2a", s.audio_dim)):
        adaln(f"av_ca_{stream}_scale_shift_adaln_single", dim, 4, 0.4)
        adaln(f"av_ca_{gate}_gate_adaln_single", dim, 1, 0.6)

    v, a = s.dim, s.audio_dim
    for layer in range(s.layers):
        block = f"{top}transformer_blocks.{layer}."
        _attention(draw, f"{block}attn1", s.heads, v, v, v, 1.1)
        _attention(draw, f"{block}attn2", s.heads, v, v, v, 1.6)
        _attention(draw, f"{block}audio_attn1", s.heads, a, a, a, 1.1)
        _attention(draw, f"{block}audio_attn2", s.heads, a, a, a, 1.6)
        _attention(draw, f"{block}audio_to_video_attn", s.heads, a, v, a, 1.1)
        _attention(draw, f"{block}video_to_audio_attn", s.heads, a, a, v, 1.1)
        _feed_forward(draw, f"{block}ff", v)
        _feed_forward(draw, f"{block}audio_ff", a)
        for stream, dim, name in (("", v, "video"), ("audio_", a, "audio")):
            draw.vector(f"{block}{stream}scale_shift_table", (9, dim), 0.4)
            draw.vector(f"{block}{stream}prompt_scale_shift_table", (2, dim), 0.3)
            draw.vector(f"{block}scale_shift_table_a2v_ca_{name}", (5, dim), 0.4)


def _draw_text(draw: Draw, s: ToyShape):
    flat = s.gemma_hidden * (s.gemma_layers + 1)
    for stream, head_dim in (("video", s.head_dim), ("audio", s.audio_head_dim)):
        dim = s.heads * head_dim
        # the features are multiplied by sqrt(dim / gemma_hidden) before this layer
        gain = math.sqrt(s.gemma_hidden / dim)
        draw.linear(f"text_embedding_projection.{stream}_aggregate_embed", dim, flat, gain=gain)
        top = f"model.diffusion_model.{stream}_embeddings_connector."
        draw.vector(f"{top}learnable_registers", (REGISTERS, dim), 1 / math.sqrt(3.0))
        for layer in range(s.connector_layers):
            block = f"{top}transformer_1d_blocks.{layer}."
            _attention(draw, f"{block}attn1", s.heads, dim, dim, dim, 1.6)
            _feed_forward(draw, f"{block}ff", dim)


def _statistics(draw: Draw, key: str):
    draw.vector(f"{key}.per_channel_statistics.mean-of-means", (LATENT_CHANNELS,), 0.3)
    draw.vector(f"{key}.per_channel_statistics.std-of-means", (LATENT_CHANNELS,), 0.2, 1.0)


def _res_blocks(draw: Draw, key: str, layers: int, dim: int, smooth: bool):
    for i in range(layers):
        for n, gain in ((1, 1.7), (2, 0.7)):
            name = f"{key}.res_blocks.{i}.conv{n}.conv"
            if smooth:
                draw.smooth_conv(name, dim, dim, gain, (1, 1, 1))
            else:
                draw.conv(name, dim, dim, (3, 3, 3), gain)


def _draw_video_vae(draw: Draw, vae: dict):
    cube = (3, 3, 3)
    growth = {"space": (1, 2, 2), "time": (2, 1, 1), "all": (2, 2, 2)}  # time, height, width
    dim = LATENT_CHANNELS
    draw.conv("vae.encoder.conv_in.conv", dim, 3 * PATCH**2, cube, gain=2.0)
    for i, (name, block) in enumerate(vae["encoder_blocks"]):
        key = f"vae.encoder.down_blocks.{i}"
        if name == "res_x":
            _res_blocks(draw, key, block["num_layers"], dim, smooth=False)
        else:
            wide = dim * block["multiplier"]
            draw.conv(f"{key}.conv.conv", wide // math.prod(growth[name.split("_")[1]]), dim, cube)
            dim = wide
    draw.conv("vae.encoder.conv_out.conv", LATENT_CHANNELS + 1, dim, cube, gain=2.0)

    blocks = list(reversed(vae["decoder_blocks"]))
    dim = vae["decoder_base_channels"] * math.prod(b.get("multiplier", 1) for _, b in blocks)
    draw.conv("vae.decoder.conv_in.conv", dim, LATENT_CHANNELS, cube, gain=3.0)
    for i, (name, block) in enumerate(blocks):
        key = f"vae.decoder.up_blocks.{i}"
        if name == "res_x":
            _res_blocks(draw, key, block["num_layers"], dim, smooth=True)
        else:
            factors = growth[name.split("_")[1]]
            wide = math.prod(factors) * dim // block["multiplier"]
            draw.smooth_conv(f"{key}.conv.conv", wide, dim, 1.0, factors)
            dim //= block["multiplier"]
    # the patch's sub-pixels are stored width first; both axes grow alike, but the taps must sit on the right axis
    name = "vae.decoder.conv_out.conv"
    draw.smooth_conv(name, 3 * PATCH**2, dim, 0.75, (1, PATCH, PATCH))
    weight = draw.tensors.pop(f"{name}.weight").unflatten(0, (3, PATCH, PATCH))
    draw.put(f"{name}.weight", weight.transpose(1, 2).flatten(0, 2))
    _statistics(draw, "vae")


def _draw_audio_vae(draw: Draw, config: dict):
    dd = config["model"]["params"]["ddconfig"]
    square, ch, blocks = (3, 3), dd["ch"], dd["num_res_blocks"]
    widths = [ch * m for m in dd["ch_mult"]]
    levels = len(widths)

    def res(key, n_in, n_out):
        draw.conv(f"{key}.conv1.conv", n_out, n_in, square, gain=1.7)
        draw.conv(f"{key}.conv2.conv", n_out, n_out, square, gain=0.7)
        if n_in != n_out:
            draw.conv(f"{key}.nin_shortcut.conv", n_out, n_in, (1, 1))

    def mid(key, dim):
        res(f"{key}.mid.block_1", dim, dim)
        res(f"{key}.mid.block_2", dim, dim)

    key, dim = "audio_vae.encoder", ch
    draw.conv(f"{key}.conv_in.conv", ch, dd["in_channels"], square)
    for level, width in enumerate(widths):
        for i in range(blocks):
            res(f"{key}.down.{level}.block.{i}", dim, width)
            dim = width
        if level < levels - 1:
            draw.conv(f"{key}.down.{level}.downsample.conv", dim, dim, square)
    mid(key, dim)
    draw.conv(f"{key}.conv_out.conv", 2 * dd["z_channels"], dim, square, gain=1.5)

    key, dim = "audio_vae.decoder", widths[-1]
    draw.conv(f"{key}.conv_in.conv", dim, dd["z_channels"], square)
    mid(key, dim)
    for level in reversed(range(levels)):
        for i in range(blocks + 1):
            res(f"{key}.up.{level}.block.{i}", dim, widths[level])
            dim = widths[level]
        if level > 0:
            draw.conv(f"{key}.up.{level}.upsample.conv.conv", dim, dim, square)
    draw.conv(f"{key}.conv_out.conv", dd["out_ch"], dim, square, gain=3.0)
    _statistics(draw, "audio_vae")


def _low_pass(size: int = 12, cutoff: float = 0.25, half_width: float = 0.3):
    """The Kaiser-windowed sinc of BigVGAN's anti-aliased activations, ratio 2: (1, 1, size), sums to 1."""
    import numpy
    import torch

    # Kaiser's empirical formula for the window's beta from the attenuation in dB
    attenuation = 2.285 * (size // 2 - 1) * math.pi * 4 * half_width + 7.95
    beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21) if attenuation <= 50 else 0.1102 * (
        attenuation - 8.7
    )  # fmt: skip
    taps = numpy.arange(size) - (size - 1) / 2
    kernel = numpy.kaiser(size, beta) * numpy.sinc(2 * cutoff * taps)
    return torch.from_numpy((kernel / kernel.sum()).reshape(1, 1, size))


def _draw_generator(draw: Draw, key: str, config: dict, gain: float):
    """One BigVGAN-style generator; `gain` scales its waveform."""
    low_pass = _low_pass()

    def activation(name, dim):
        draw.vector(f"{name}.act.alpha", (dim,), 0.3)
        draw.vector(f"{name}.act.beta", (dim,), 0.3)
        draw.put(f"{name}.upsample.filter", low_pass)
        draw.put(f"{name}.downsample.lowpass.filter", low_pass)

    dim = config["upsample_initial_channel"]
    draw.conv(f"{key}.conv_pre", dim, 2 * MEL_BINS, (7,))
    index = 0
    for i, (rate, kernel) in enumerate(zip(config["upsample_rates"], config["upsample_kernel_sizes"])):
        # a transposed convolution: weights are (in, out, k), and k / rate of them meet in one output
        draw.vector(f"{key}.ups.{i}.weight", (dim, dim // 2, kernel), 1 / math.sqrt(dim * kernel / rate))
        draw.vector(f"{key}.ups.{i}.bias", (dim // 2,), 0.05)
        dim //= 2
        for size in config["resblock_kernel_sizes"]:
            for j in range(3):
                for part in ("1", "2"):
                    activation(f"{key}.resblocks.{index}.acts{part}.{j}", dim)
                    draw.conv(f"{key}.resblocks.{index}.convs{part}.{j}", dim, dim, (size,), gain=0.5)
            index += 1
    activation(f"{key}.act_post", dim)
    draw.conv(f"{key}.conv_post", 2, dim, (7,), gain=gain, bias=None)
    # no bias there, and snake activations are mostly positive: taking the mean off each filter keeps the sound
    # from sitting on a constant
    weight = draw.tensors.pop(f"{key}.conv_post.weight").float()
    draw.put(f"{key}.conv_post.weight", weight - weight.mean(-1, keepdim=True))


def _draw_vocoder(draw: Draw, config: dict):
    import numpy
    import torch

    _draw_generator(draw, "vocoder.vocoder", config["vocoder"], gain=0.06)
    _draw_generator(draw, "vocoder.bwe_generator", config["bwe"], gain=0.01)

    # The spectrogram between the two: a DFT under a periodic Hann window (cosines, then minus sines), and triangles
    # on the mel scale (2595 log10(1 + f/700)).
    size, bins = BWE_FFT, BWE_FFT // 2 + 1
    phase = 2 * numpy.pi / size * (numpy.outer(numpy.arange(bins), numpy.arange(size)) % size)
    window = 0.5 - 0.5 * numpy.cos(2 * numpy.pi * numpy.arange(size) / size)
    basis = numpy.concatenate([numpy.cos(phase), -numpy.sin(phase)]) * window
    for name, scale in (("forward", 1.0), ("inverse", 2.0 / size)):
        draw.put(f"vocoder.mel_stft.stft_fn.{name}_basis", torch.from_numpy(basis[:, None, :] * scale))
    mels = numpy.linspace(0, 2595 * numpy.log10(1 + 8000 / 700), MEL_BINS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    freqs = numpy.linspace(0, 8000, bins)
    rising = (freqs - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - freqs) / (edges[2:] - edges[1:-1])[:, None]
    mel = numpy.maximum(0, numpy.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    draw.put("vocoder.mel_stft.mel_basis", torch.from_numpy(mel))


# --- the other files ---------------------------------------------------------------------------------------------


def _draw_lora(draw: Draw, checkpoint: dict, s: ToyShape):
    """Factors for every linear layer of the transformer, but the connectors, which LoRAs never reach."""
    top = "model.diffusion_model."
    for key, weight in checkpoint.items():
        if not key.startswith(top) or "embeddings_connector" in key or not key.endswith(".weight") or weight.dim() < 2:
            continue
        module = key.removeprefix(top).removesuffix(".weight")
        n_out, n_in = weight.shape
        draw.vector(f"diffusion_model.{module}.lora_A.weight", (s.lora_rank, n_in), 1 / math.sqrt(n_in))
        draw.vector(f"diffusion_model.{module}.lora_B.weight", (n_out, s.lora_rank), 0.03 / math.sqrt(s.lora_rank))


def _upsampler_config(s: ToyShape) -> dict:
    return {
        "_class_name": "LatentUpsampler",
        "in_channels": LATENT_CHANNELS,
        "mid_channels": s.upsampler_channels,
        "num_blocks_per_stage": s.upsampler_blocks,
        "dims": 3,
        "spatial_upsample": True,
        "temporal_upsample": False,
        "spatial_scale": 2.0,
        "rational_resampler": False,
    }


def _draw_upsampler(draw: Draw, s: ToyShape):
    cube, dim = (3, 3, 3), s.upsampler_channels

    def norm(key):
        draw.vector(f"{key}.weight", (dim,), 0.1, 1.0)
        draw.vector(f"{key}.bias", (dim,), 0.1)

    draw.conv("initial_conv", dim, LATENT_CHANNELS, cube)
    norm("initial_norm")
    for stage in ("res_blocks", "post_upsample_res_blocks"):
        for i in range(s.upsampler_blocks):
            for n in (1, 2):
                draw.conv(f"{stage}.{i}.conv{n}", dim, dim, cube)
                norm(f"{stage}.{i}.norm{n}")
    draw.smooth_conv("upsampler.0", 4 * dim, dim, 1.0, (2, 2))
    draw.conv("final_conv", LATENT_CHANNELS, dim, cube, gain=1.0)


# --- Gemma 3 -----------------------------------------------------------------------------------------------------

_SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>",
             "<end_of_image>", "<image_soft_token>")  # fmt: skip
_VOCAB = 1024
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
_CORPUS = """a woman walks slowly through the old market while the camera follows her from behind in soft morning
light the camera pans across a wide mountain valley with clouds moving over the snow a man in a red coat is speaking
to the crowd and the sound of rain is heard in the background close up of hands playing a piano in a dark room with
warm light two children are running along the beach at sunset with waves and seagulls a small dog is sleeping on the
wooden floor near the window a city street at night with neon signs and cars passing quickly an aerial view of the
river and the forest in autumn with birds singing a cook is cutting vegetables in a bright kitchen and talking the
train is leaving the station as people are waving blurry out of focus low quality distorted motion static noise music
voice whisper laughing singing dancing falling flying water fire smoke wind sky ground blue green yellow white black"""


def _train_bpe(words: list[str], size: int) -> list[tuple[str, str]]:
    """Plain byte-pair merging over words, most frequent pair first, ties in alphabetical order: at most `size`."""
    counts: dict[tuple[str, ...], int] = {}
    for word in words:
        key = tuple("▁" + word)
        counts[key] = counts.get(key, 0) + 1
    merges = []
    while len(merges) < size:
        pairs: dict[tuple[str, str], int] = {}
        for word, n in counts.items():
            for pair in zip(word, word[1:]):
                pairs[pair] = pairs.get(pair, 0) + n
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        merged: dict[tuple[str, ...], int] = {}
        for word, n in counts.items():
            out: list[str] = []
            for piece in word:
                if out and (out[-1], piece) == best:
                    out[-1] += piece
                else:
                    out.append(piece)
            merged[tuple(out)] = merged.get(tuple(out), 0) + n
        counts = merged
    return merges


def _tokenizer_json() -> dict:
    """A Gemma-like tokenizer.json: spaces become U+2581, BPE, unknown characters fall back to their bytes."""
    pieces = [*_SPECIALS, *(f"<0x{b:02X}>" for b in range(256)), "▁", "\n", *(chr(c) for c in range(33, 127))]
    known = set(pieces)
    merges = []
    for pair in _train_bpe(_CORPUS.split(), _VOCAB):
        joined = "".join(pair)
        if len(pieces) + (joined not in known) > _VOCAB:
            break
        merges.append(list(pair))
        if joined not in known:
            known.add(joined)
            pieces.append(joined)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    start = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}]
    text = {"single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "B", "type_id": 1}}]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(_SPECIALS)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": start + text["single"],
            "pair": start + text["single"] + [{"SpecialToken": {"id": "<bos>", "type_id": 1}}] + text["pair"],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges,
        },
    }  # fmt: skip


def _gemma_files(s: ToyShape) -> dict[str, dict]:
    """Every JSON file of the Gemma directory, by name."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": s.gemma_hidden,
        "head_dim": s.gemma_hidden // s.gemma_heads,
        "intermediate_size": 2 * s.gemma_hidden,
        "num_attention_heads": s.gemma_heads,
        "num_key_value_heads": s.gemma_kv_heads,
        "num_hidden_layers": s.gemma_layers,
        "query_pre_attn_scalar": s.gemma_hidden // s.gemma_heads,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 64,  # short, so that long prompts do pass it
        "layer_types": ["full_attention" if (i + 1) % 3 == 0 else "sliding_attention" for i in range(s.gemma_layers)],
        "vocab_size": _VOCAB,
    }
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": 7,
        "eoi_token_index": 8,
        "image_token_index": 9,
        "eos_token_id": [1, 6],
        "initializer_range": 0.02,
        "mm_tokens_per_image": 4,
        "torch_dtype": "bfloat16",
        "text_config": text,
        "vision_config": {
            **_VISION, "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model",
            "vision_use_head": False,
        },
    }  # fmt: skip
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    images = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    return {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 2, "eos_token_id": [1, 6], "pad_token_id": 0, "do_sample": True,
                                   "top_k": 64, "top_p": 0.95, "cache_implementation": "hybrid"},
        "tokenizer.json": _tokenizer_json(),
        "tokenizer_config.json": {
            "add_bos_token": True, "add_eos_token": False, **named, **images, "clean_up_tokenization_spaces": False,
            "model_max_length": 131072, "padding_side": "left", "processor_class": "Gemma3Processor",
            "tokenizer_class": "GemmaTokenizer", "spaces_between_special_tokens": False,
        },
        "special_tokens_map.json": {**named, **images},
        "processor_config.json": {"image_seq_length": 4, "processor_class": "Gemma3Processor"},
        "preprocessor_config.json": {
            "do_convert_rgb": None, "do_normalize": True, "do_pan_and_scan": None, "do_rescale": True,
            "do_resize": True, "image_mean": [0.5] * 3, "image_processor_type": "Gemma3ImageProcessor",
            "image_seq_length": 4, "image_std": [0.5] * 3, "processor_class": "Gemma3Processor", "resample": 2,
            "rescale_factor": 1 / 255, "size": {"height": 28, "width": 28},
        },
    }  # fmt: skip


def _draw_gemma(draw: Draw, s: ToyShape):
    dim, head_dim, wide = s.gemma_hidden, s.gemma_hidden // s.gemma_heads, 2 * s.gemma_hidden

    def matrix(key, n_out, n_in, gain=1.0):
        draw.vector(f"{key}.weight", (n_out, n_in), gain / math.sqrt(n_in))

    # embeddings are multiplied by sqrt(dim) as they are looked up; norm weights are stored as distances from 1
    matrix("language_model.model.embed_tokens", _VOCAB, dim)
    for layer in range(s.gemma_layers):
        block = f"language_model.model.layers.{layer}."
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            draw.vector(f"{block}{name}_layernorm.weight", (dim,), 0.2)
        for name, heads in (("q", s.gemma_heads), ("k", s.gemma_kv_heads), ("v", s.gemma_kv_heads)):
            matrix(f"{block}self_attn.{name}_proj", heads * head_dim, dim)
        matrix(f"{block}self_attn.o_proj", dim, s.gemma_heads * head_dim)
        for name in ("q", "k"):
            draw.vector(f"{block}self_attn.{name}_norm.weight", (head_dim,), 0.2)
        matrix(f"{block}mlp.gate_proj", wide, dim)
        matrix(f"{block}mlp.up_proj", wide, dim)
        matrix(f"{block}mlp.down_proj", dim, wide)
    draw.vector("language_model.model.norm.weight", (dim,), 0.2)

    eye, top = _VISION["hidden_size"], "vision_tower.vision_model."
    draw.conv(f"{top}embeddings.patch_embedding", eye, 3, (14, 14))
    draw.vector(f"{top}embeddings.position_embedding.weight", (4, eye), 0.5)
    for layer in range(_VISION["num_hidden_layers"]):
        block = f"{top}encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            draw.linear(f"{block}self_attn.{name}", eye, eye)
        draw.linear(f"{block}mlp.fc1", _VISION["intermediate_size"], eye)
        draw.linear(f"{block}mlp.fc2", eye, _VISION["intermediate_size"])
        for name in ("layer_norm1", "layer_norm2"):
            draw.vector(f"{block}{name}.weight", (eye,), 0.1, 1.0)
            draw.vector(f"{block}{name}.bias", (eye,), 0.1)
    draw.vector(f"{top}post_layernorm.weight", (eye,), 0.1, 1.0)
    draw.vector(f"{top}post_layernorm.bias", (eye,), 0.1)
    draw.vector("multi_modal_projector.mm_input_projection_weight", (eye, dim), 1 / math.sqrt(eye))
    draw.vector("multi_modal_projector.mm_soft_emb_norm.weight", (eye,), 0.2)


# --- writing and caching -----------------------------------------------------------------------------------------


def _save(path: Path, tensors: dict, metadata: dict[str, str]):
    """Write a safetensors file whose bytes depend on its contents alone.

    save_file writes the metadata in the order of a hash map, another one in each process; here the header is put
    back with its metadata sorted, which does not change its length.
    """
    from safetensors.torch import save_file

    save_file(tensors, str(path), metadata=metadata)
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        entry = dict(sorted(header.pop("__metadata__").items()))
        text = json.dumps({"__metadata__": entry, **header}, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, (len(text), length)
        file.seek(8)
        file.write(text.ljust(length))


def make_toy_model(out_dir: str | os.PathLike, *, seed: int = 0, shape: ToyShape = ToyShape()) -> dict[str, str]:
    """Write the five pieces into `out_dir` (made if need be) and return where they are.

    The result has the keys `checkpoint_path`, `distilled_lora`, `spatial_upsampler_path` and `gemma_root`, the
    names under which the command line takes them. The bytes depend on `seed` and `shape` alone.
    """
    import torch

    out = Path(out_dir)
    paths = {name: out / file for name, file in FILES.items()}
    paths["gemma_root"].mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    config = checkpoint_config(shape)
    draw = Draw(generator)
    _draw_transformer(draw, shape)
    _draw_text(draw, shape)
    _draw_video_vae(draw, config["vae"])
    _draw_audio_vae(draw, config["audio_vae"])
    _draw_vocoder(draw, config["vocoder"])
    checkpoint = draw.tensors
    _save(paths["checkpoint_path"], checkpoint, {"config": json.dumps(config), "model_version": MODEL_VERSION})

    draw = Draw(generator)
    _draw_lora(draw, checkpoint, shape)
    _save(paths["distilled_lora"], draw.tensors, {"format": "pt"})

    draw = Draw(generator)
    _draw_upsampler(draw, shape)
    upsampler = {"config": json.dumps(_upsampler_config(shape)), "model_version": MODEL_VERSION}
    _save(paths["spatial_upsampler_path"], draw.tensors, upsampler)

    draw = Draw(generator)
    _draw_gemma(draw, shape)
    _save(paths["gemma_root"] / "model.safetensors", draw.tensors, {"format": "pt"})
    for name, content in _gemma_files(shape).items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (paths["gemma_root"] / name).write_text(text, encoding="utf-8")
    return {name: str(path) for name, path in paths.items()}


def ensure_toy_model(cache_dir: str | os.PathLike | None = None) -> dict[str, str]:
    """The default toy model, made on first use; the same paths as make_toy_model returns.

    `cache_dir` defaults to $LTX_RAY_CACHE, otherwise `ltx-ray` in the user's cache directory. The folder's name
    holds a digest of this generator, so another version of it makes its own. It appears by rename when complete:
    any number of processes may call this at once.
    """
    if cache_dir is None:
        cache_dir = os.environ.get("LTX_RAY_CACHE") or (
            Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ltx-ray"
        )
    cache = Path(cache_dir)
    recipe = Path(__file__).read_bytes() + json.dumps(dataclasses.asdict(ToyShape())).encode()
    folder = cache / f"toy-{MODEL_VERSION}-{hashlib.sha256(recipe).hexdigest()[:12]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
        try:
            make_toy_model(making)
            making.chmod(0o755)  # mkdtemp's own mode would keep a shared cache to one user
            try:
                os.rename(making, folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was first, with the same bytes
                    raise
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return {name: str(folder / file) for name, file in FILES.items()}
