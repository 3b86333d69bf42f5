"""Sizes of the miniature, and the configs in the metadata of its files.

The miniature has the parts of the release, with the same kinds of blocks in the same order. Only widths, depths and
the vocoder's kernels are smaller. All weights together must stay below 16 MB in bfloat16, which is 8 million numbers.

Two choices follow from that bound:

* The format ties the audio VAE's width to its statistics, which have 8 latent channels x 16 bins = 128 numbers. The
  audio VAE has as few residual blocks as possible and still takes a third of the bytes.
* A DiT must carry the noise of all latent channels through its hidden width. The miniature's DiT is narrower than the
  128 latent channels, so it cannot. The VAEs therefore use only the first `ACTIVE_VIDEO` channels and the first
  `ACTIVE_AUDIO` packed numbers. The others are zero after encoding, and the decoders ignore them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: The folder of the trained weights, a file for each part.
WEIGHTS = Path(__file__).parent / "weights"
MODEL_VERSION = "2.3.0"
LATENT_CHANNELS = 128
AUDIO_CHANNELS, AUDIO_BINS = 8, 16
#: Number of video latent channels, counted from the first, that carry the picture.
ACTIVE_VIDEO = 48
#: Number of audio latent channels, counted from the first, that carry the sound; each has 16 packed numbers.
ACTIVE_AUDIO_CHANNELS = 2
ACTIVE_AUDIO = ACTIVE_AUDIO_CHANNELS * AUDIO_BINS
MEL_BINS = 64
BWE_FFT, BWE_HOP = 160, 80

HEADS = 4
HEAD_DIM, AUDIO_HEAD_DIM = 24, 12
LAYERS, CONNECTOR_LAYERS = 5, 1
GEMMA_HIDDEN, GEMMA_LAYERS = 32, 3
LORA_RANK = 8
UPSAMPLER_CHANNELS = 32


def checkpoint_config() -> dict[str, Any]:
    """The JSON object under `config` in the single file's metadata."""
    return {
        "transformer": _transformer(),
        "vae": _vae(),
        "audio_vae": _audio_vae(),
        "vocoder": _vocoder(),
        "scheduler": {"_class_name": "RectifiedFlowScheduler", "sampler": "LinearQuadratic", "shifting": "SD3"},
    }


def _transformer() -> dict[str, Any]:
    dim, audio_dim = HEADS * HEAD_DIM, HEADS * AUDIO_HEAD_DIM
    return {
        "_class_name": "AVTransformer3DModel",
        "num_layers": LAYERS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "audio_num_attention_heads": HEADS,
        "audio_attention_head_dim": AUDIO_HEAD_DIM,
        "cross_attention_dim": dim,
        "audio_cross_attention_dim": audio_dim,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "audio_in_channels": AUDIO_CHANNELS * AUDIO_BINS,
        "audio_out_channels": AUDIO_CHANNELS * AUDIO_BINS,
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
        # Together these four put the text projection before the connectors, as in 2.3.
        "caption_proj_before_connector": True,
        "caption_projection_first_linear": False,
        "caption_proj_input_norm": False,
        "caption_projection_second_linear": False,
        "caption_channels": GEMMA_HIDDEN,
        "text_encoder_norm_type": "per_token_rms",
        "use_embeddings_connector": True,
        "connector_num_layers": CONNECTOR_LAYERS,
        "connector_num_attention_heads": HEADS,
        "connector_attention_head_dim": HEAD_DIM,
        "audio_connector_num_attention_heads": HEADS,
        "audio_connector_attention_head_dim": AUDIO_HEAD_DIM,
        "connector_num_learnable_registers": 128,
        "connector_positional_embedding_max_pos": [4096],
        "connector_apply_gated_attention": True,
        "connector_norm_output": True,
        # The rest has one legal value each; the reference refuses a file without them.
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


def _vae() -> dict[str, Any]:
    def res(layers: int) -> list[Any]:
        return ["res_x", {"num_layers": layers}]

    return {
        "_class_name": "CausalVideoAutoencoder",
        "dims": 3,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": LATENT_CHANNELS,
        # The encoder is 128 wide throughout, so one residual block would cost almost as much as the rest of it.
        "encoder_blocks": [
            res(0),
            ["compress_space_res", {"multiplier": 1}],
            res(0),
            ["compress_time_res", {"multiplier": 1}],
            res(0),
            ["compress_all_res", {"multiplier": 1}],
            res(0),
            ["compress_all_res", {"multiplier": 1}],
            res(0),
        ],
        # Listed from the pixel end: widths 16, 16, 16, 32, 64.
        "decoder_blocks": [
            res(2),
            ["compress_space", {"multiplier": 1}],
            res(2),
            ["compress_time", {"multiplier": 1}],
            res(3),
            ["compress_all", {"multiplier": 2}],
            res(4),
            ["compress_all", {"multiplier": 2}],
            res(1),
        ],
        "decoder_base_channels": 16,
        "norm_layer": "pixel_norm",
        "latent_log_var": "uniform",
        "patch_size": 4,
        "causal_decoder": False,
        "timestep_conditioning": False,
        "spatial_padding_mode": "zeros",
    }


def _audio_vae() -> dict[str, Any]:
    return {
        "model": {
            "params": {
                "sampling_rate": 16000,
                "ddconfig": {
                    "ch": AUDIO_CHANNELS * AUDIO_BINS,
                    "ch_mult": [1, 1, 1],
                    "num_res_blocks": 0,  # the decoder has one more at each level
                    "attn_resolutions": [],
                    "resolution": 256,
                    "in_channels": 2,
                    "out_ch": 2,
                    "z_channels": AUDIO_CHANNELS,
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


def _vocoder() -> dict[str, Any]:
    shared = {
        "resblock": "AMP1",
        "activation": "snakebeta",
        "stereo": True,
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3]],
        "use_tanh_at_final": False,
        "use_bias_at_final": False,
    }
    return {
        "vocoder": {
            **shared,
            "upsample_initial_channel": 128,
            "upsample_rates": [5, 2, 2, 2, 2, 2],
            "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
        },
        "bwe": {
            **shared,
            "upsample_initial_channel": 32,
            "upsample_rates": [6, 5, 2, 2, 2],
            "upsample_kernel_sizes": [12, 11, 4, 4, 4],
            "input_sampling_rate": 16000,
            "output_sampling_rate": 48000,
            "n_fft": BWE_FFT,
            "hop_length": BWE_HOP,
            "num_mels": MEL_BINS,
        },
    }


def upsampler_config() -> dict[str, Any]:
    """The JSON object under `config` in the metadata of the upsampler's file."""
    return {
        "_class_name": "LatentUpsampler",
        "in_channels": LATENT_CHANNELS,
        "mid_channels": UPSAMPLER_CHANNELS,
        "num_blocks_per_stage": 1,
        "dims": 3,
        "spatial_upsample": True,
        "temporal_upsample": False,
        "spatial_scale": 2.0,
        "rational_resampler": False,
    }
