"""Sizes of the toy model, and the configurations in the metadata of its files (docs/ltx-2.3.md#metadata)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MODEL_VERSION = "2.3.0"
#: Channels of the video VAE's latents, and the first width of its encoder.
LATENT_CHANNELS = 128
#: Channels and bins of audio latents. Their product is also the width of the audio VAE.
AUDIO_LATENT = (8, 16)
#: Learnable registers of a text connector.
REGISTERS = 128
#: Side of the patches of pixels that the video VAE begins with.
PATCH = 4
MEL_BINS = 64
#: Window and hop, in samples, of the mel transform before the bandwidth extension.
BWE_FFT = 512
BWE_HOP = 80


@dataclass(frozen=True)
class ToyShape:
    """Widths and depths of a toy model. Tuples are in the order of the lists in the checkpoint's config.

    Raises ValueError naming the field, its value and what is legal.
    """

    layers: int = 4
    #: Attention heads of the video stream and of the audio stream, which must be equal.
    heads: int = 4
    head_dim: int = 32
    audio_head_dim: int = 16
    connector_layers: int = 2
    gemma_hidden: int = 64
    gemma_layers: int = 6
    gemma_heads: int = 4
    gemma_kv_heads: int = 2
    encoder_layers: tuple[int, ...] = (1, 1, 1, 1, 1)
    #: The release has 2, 2, 2, 1.
    encoder_multipliers: tuple[int, ...] = (1, 1, 1, 1)
    decoder_layers: tuple[int, ...] = (1, 2, 2, 1, 1)
    decoder_base: int = 8
    audio_mult: tuple[int, ...] = (1, 1, 1)
    audio_blocks: int = 1
    vocoder_channels: int = 128
    bwe_channels: int = 64
    upsampler_channels: int = 32
    upsampler_blocks: int = 1
    lora_rank: int = 8

    def __post_init__(self) -> None:
        def check(field: str, legal: str, ok: Callable[[Any], bool]) -> None:
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


def checkpoint_config(shape: ToyShape) -> dict[str, Any]:
    """The JSON object `config` in the metadata of the single file."""
    return {
        "transformer": _transformer(shape),
        "vae": _video_vae(shape),
        "audio_vae": _audio_vae(shape),
        "vocoder": _vocoder(shape),
        "scheduler": {"_class_name": "RectifiedFlowScheduler", "sampler": "LinearQuadratic", "shifting": "SD3"},
    }


def _transformer(s: ToyShape) -> dict[str, Any]:
    return {
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
        # The next four together mean that the text is projected before the connectors, as in 2.3.
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
        # Each of the others has one legal value. The reference refuses a file without them.
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


def _video_vae(s: ToyShape) -> dict[str, Any]:
    def res(layers: int) -> list[Any]:
        return ["res_x", {"num_layers": layers}]

    e, m, d = s.encoder_layers, s.encoder_multipliers, s.decoder_layers
    return {
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
        ],
        # From the pixels inwards; the decoder applies them in reverse.
        "decoder_blocks": [
            res(d[0]),
            ["compress_space", {"multiplier": 2}],
            res(d[1]),
            ["compress_time", {"multiplier": 2}],
            res(d[2]),
            ["compress_all", {"multiplier": 1}],
            res(d[3]),
            ["compress_all", {"multiplier": 2}],
            res(d[4]),
        ],
        "decoder_base_channels": s.decoder_base,
        "norm_layer": "pixel_norm",
        "latent_log_var": "uniform",
        "patch_size": PATCH,
        "causal_decoder": False,
        "timestep_conditioning": False,
        "spatial_padding_mode": "zeros",
    }


def _audio_vae(s: ToyShape) -> dict[str, Any]:
    return {
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


def _vocoder(s: ToyShape) -> dict[str, Any]:
    generator = {
        "resblock": "AMP1",
        "activation": "snakebeta",
        "stereo": True,
        "resblock_kernel_sizes": [3, 7, 11],
        "resblock_dilation_sizes": [[1, 3, 5]] * 3,
        "use_tanh_at_final": False,
        "use_bias_at_final": False,
    }
    return {
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


def upsampler_config(s: ToyShape) -> dict[str, Any]:
    """The JSON object `config` in the metadata of the upsampler's file."""
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
