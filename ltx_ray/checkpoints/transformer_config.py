"""Architecture of the transformer, read from a checkpoint's `config` metadata; nothing is assumed 22B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Features that this DiT has built in, as the metadata spells them; absent means the value here.
_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "qk_norm": "rms_norm",
    "norm_elementwise_affine": False,
    "standardization_norm": "rms_norm",
    "positional_embedding_type": "rope",
    "use_middle_indices_grid": True,
    "rope_type": "split",
    "share_ff": False,
    "av_cross_ada_norm": True,
    "use_audio_video_cross_attention": True,
}
#: Features whose absence means an older model, which this DiT is not.
_REQUIRED = {
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
}


@dataclass(frozen=True)
class StreamConfig:
    """Widths of one stream (video or audio)."""

    in_channels: int
    out_channels: int
    heads: int
    head_dim: int
    context_dim: int
    max_pos: tuple[int, ...]

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class TransformerConfig:
    """All that decides the shapes and the arithmetic of the DiT."""

    num_layers: int
    video: StreamConfig
    audio: StreamConfig
    norm_eps: float
    rope_theta: float
    rope_float64: bool
    timestep_scale: float
    av_timestep_scale: float

    @property
    def cross_max_pos(self) -> int:
        """Time span (seconds) of the rotary grid in which video and audio meet."""
        return max(self.video.max_pos[0], self.audio.max_pos[0])

    @classmethod
    def from_metadata(cls, config: Mapping[str, Any], source: str = "checkpoint") -> TransformerConfig:
        """Build from the `transformer` object of a checkpoint's config.

        Raises ValueError naming the field when the file describes another architecture.
        """
        for field, expected in {**_FIXED, **_REQUIRED}.items():
            found = config.get(field, _FIXED.get(field, not expected if field in _REQUIRED else expected))
            if found != expected:
                raise ValueError(f"{source}: config.transformer.{field} is {found!r}; legal: {expected!r} (LTX-2.3)")
        heads = int(config.get("num_attention_heads", 32))
        audio_heads = int(config.get("audio_num_attention_heads", heads))
        if heads != audio_heads:
            raise ValueError(
                f"{source}: config.transformer.audio_num_attention_heads is {audio_heads}; legal: {heads}, "
                f"as many as the video stream has"
            )
        return cls(
            num_layers=int(config.get("num_layers", 48)),
            video=StreamConfig(
                in_channels=int(config.get("in_channels", 128)),
                out_channels=int(config.get("out_channels", 128)),
                heads=heads,
                head_dim=int(config.get("attention_head_dim", 128)),
                context_dim=int(config.get("cross_attention_dim", 4096)),
                max_pos=tuple(config.get("positional_embedding_max_pos", (20, 2048, 2048))),
            ),
            audio=StreamConfig(
                in_channels=int(config.get("audio_in_channels", 128)),
                out_channels=int(config.get("audio_out_channels", 128)),
                heads=audio_heads,
                head_dim=int(config.get("audio_attention_head_dim", 64)),
                context_dim=int(config.get("audio_cross_attention_dim", 2048)),
                max_pos=tuple(config.get("audio_positional_embedding_max_pos", (20,))),
            ),
            norm_eps=float(config.get("norm_eps", 1e-6)),
            rope_theta=float(config.get("positional_embedding_theta", 10000.0)),
            rope_float64=config.get("frequencies_precision") == "float64",
            timestep_scale=float(config.get("timestep_scale_multiplier", 1000)),
            av_timestep_scale=float(config.get("av_ca_timestep_scale_multiplier", 1)),
        )
