"""Architecture of the transformer as a checkpoint's `config` metadata states it. No torch.

Widths and numbers of layers are free; features must be those of LTX-2.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ltx_ray.config import Numerics
from ltx_ray.shapes import AUDIO_BINS, AUDIO_CHANNELS, VIDEO_CHANNELS

_T = TypeVar("_T")
#: Features with one legal value, in the metadata's spelling. An absent field means that value.
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
#: Features whose absence means an older generation.
_REQUIRED = {
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
}
_REGISTERS = "connector_num_learnable_registers"


@dataclass(frozen=True)
class StreamConfig:
    """Widths of one stream (video or audio), and the upper ends of its rotary grid's axes."""

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
    """What decides the shapes and the arithmetic of the transformer."""

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
        """Time span in seconds of the rotary grid that video and audio share."""
        return max(self.video.max_pos[0], self.audio.max_pos[0])

    @classmethod
    def from_metadata(cls, config: Mapping[str, Any], source: str = "checkpoint") -> TransformerConfig:
        """Build from the `transformer` object of a checkpoint's config; absent fields have the reference's defaults.

        Raises ValueError naming `source` and the field when the file describes another architecture.
        """
        fields = _Fields(config, source)
        fields.check_architecture()
        heads = fields.integer("num_attention_heads", 32)
        audio_heads = fields.integer("audio_num_attention_heads", heads)
        if heads != audio_heads:
            raise fields.error("audio_num_attention_heads", audio_heads, f"{heads}, as many as the video stream has")
        return cls(
            num_layers=fields.integer("num_layers", 48),
            video=StreamConfig(
                in_channels=fields.channels("in_channels", VIDEO_CHANNELS),
                out_channels=fields.channels("out_channels", VIDEO_CHANNELS),
                heads=heads,
                head_dim=fields.head_dim("attention_head_dim", 128),
                context_dim=fields.integer("cross_attention_dim", 4096),
                max_pos=fields.limits("positional_embedding_max_pos", (20, 2048, 2048)),
            ),
            audio=StreamConfig(
                in_channels=fields.channels("audio_in_channels", AUDIO_CHANNELS * AUDIO_BINS),
                out_channels=fields.channels("audio_out_channels", AUDIO_CHANNELS * AUDIO_BINS),
                heads=audio_heads,
                head_dim=fields.head_dim("audio_attention_head_dim", 64),
                context_dim=fields.integer("audio_cross_attention_dim", 2048),
                max_pos=fields.limits("audio_positional_embedding_max_pos", (20,)),
            ),
            norm_eps=fields.number("norm_eps", 1e-6),
            rope_theta=fields.number("positional_embedding_theta", 10000.0),
            rope_float64=config.get("frequencies_precision") == "float64",
            timestep_scale=fields.number("timestep_scale_multiplier", 1000),
            av_timestep_scale=fields.number("av_ca_timestep_scale_multiplier", 1),
        )


class _Fields:
    """Fields of `config.transformer`, read with the errors that name them."""

    def __init__(self, config: Mapping[str, Any], source: str):
        if not isinstance(config, Mapping):
            raise ValueError(f"{source}: config.transformer is {config!r}; legal: a JSON object")
        self._config, self._source = config, source

    def check_architecture(self) -> None:
        for field, expected in {**_FIXED, **_REQUIRED}.items():
            found = self._config.get(field, not expected if field in _REQUIRED else expected)
            if found != expected:
                raise self.error(field, found, f"{expected!r} (LTX-2.3)")
        # The registers of the text connectors are repeated until they are as many as the tokens of a padded prompt.
        registers, tokens = self.integer(_REGISTERS, 128), Numerics.text_tokens
        if tokens % registers:
            raise self.error(_REGISTERS, registers, f"a divisor of {tokens}, the tokens of a padded prompt")

    def integer(self, field: str, default: int) -> int:
        value = self._parsed(field, default, int, "an integer")
        if value < 1:
            raise self.error(field, value, "a positive integer")
        return value

    def head_dim(self, field: str, default: int) -> int:
        value = self.integer(field, default)
        if value % 2:
            raise self.error(field, value, "an even number, because channels rotate in pairs")
        return value

    def channels(self, field: str, latents: int) -> int:
        """The channels of a token, which are those of the clip's packed `latents`."""
        value = self.integer(field, latents)
        if value != latents:
            raise self.error(field, value, f"{latents}, the channels of a token of the latents")
        return value

    def number(self, field: str, default: float) -> float:
        value = self._parsed(field, default, float, "a number")
        if not _is_positive(value):
            raise self.error(field, value, "a positive number")
        return value

    def limits(self, field: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """One positive number for each axis. With fewer, tokens would not know where they are on the others."""
        values = self._parsed(field, default, tuple, "a list of numbers")
        if len(values) != len(default) or not all(map(_is_positive, values)):
            raise self.error(field, list(values), f"{len(default)} positive numbers, one for each axis")
        return values

    def _parsed(self, field: str, default: _T, parse: Callable[[Any], _T], legal: str) -> _T:
        value = self._config.get(field, default)
        try:
            return parse(value)
        except (TypeError, ValueError, OverflowError):
            raise self.error(field, value, legal) from None

    def error(self, field: str, value: Any, legal: str) -> ValueError:
        return ValueError(f"{self._source}: config.transformer.{field} is {value!r}; legal: {legal}")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf
