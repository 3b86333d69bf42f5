"""Checkpoint files with a few tensors."""

from __future__ import annotations

import json
from pathlib import Path

from ltx_ray.checkpoints.checkpoint import PIECES
from ltx_ray.checkpoints.transformer_config import TransformerConfig
from tests.support.samples import write_safetensors

BLOCK = "transformer_blocks.0.attn1.to_q"
#: Fields of `config.transformer` that an LTX-2.3 file has to state.
REQUIRED = {"apply_gated_attention": True, "cross_attention_adaln": True, "caption_proj_before_connector": True}
#: The released 22B model's, whose widths are the defaults.
RELEASED = TransformerConfig.from_metadata(REQUIRED)
CONFIG = json.dumps({"transformer": {"num_layers": 1, "num_attention_heads": 4, **REQUIRED}})
CHECKPOINT = {
    **{f"{prefix}x": (2,) for prefix in PIECES},
    f"model.diffusion_model.{BLOCK}.weight": (8, 6),
    f"model.diffusion_model.{BLOCK}.bias": (8,),
    "model.diffusion_model.video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q.weight": (8, 6),
    "vae.decoder.conv_in.conv.weight": (2, 2, 3, 3, 3),
}


def checkpoint(folder: Path, version: str | None = "2.3.0", config: str | None = CONFIG, tensors=CHECKPOINT) -> str:
    metadata = {k: v for k, v in {"model_version": version, "config": config}.items() if v is not None}
    return write_safetensors(folder / "model.safetensors", tensors, metadata)
