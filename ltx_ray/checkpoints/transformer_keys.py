"""Every tensor that an LTX-2.3 transformer has, by name and shape, from its configuration alone. No torch.

So that a file which lacks some is refused before any actor starts. `model/transformer.py` builds the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
_TIMESTEP_CHANNELS = 256


def transformer_shapes(config: Mapping[str, Any]) -> Shapes:
    """Shapes by official name without prefix. `config` is `config.transformer` of the metadata.

    Raises KeyError for a field that is not there.
    """
    heads, audio_heads = config["num_attention_heads"], config["audio_num_attention_heads"]
    video, audio = heads * config["attention_head_dim"], audio_heads * config["audio_attention_head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"scale_shift_table": (2, video), "audio_scale_shift_table": (2, audio)}
    for name, n_in, n_out in (
        ("patchify_proj", config["in_channels"], video),
        ("audio_patchify_proj", config["audio_in_channels"], audio),
        ("proj_out", video, config["out_channels"]),
        ("audio_proj_out", audio, config["audio_out_channels"]),
    ):
        shapes.update(_linear(name, n_in, n_out))
    for name, dim, rows in (
        ("adaln_single", video, 9),
        ("audio_adaln_single", audio, 9),
        ("prompt_adaln_single", video, 2),
        ("audio_prompt_adaln_single", audio, 2),
        ("av_ca_video_scale_shift_adaln_single", video, 4),
        ("av_ca_audio_scale_shift_adaln_single", audio, 4),
        ("av_ca_a2v_gate_adaln_single", video, 1),
        ("av_ca_v2a_gate_adaln_single", audio, 1),
    ):
        shapes.update(_linear(f"{name}.emb.timestep_embedder.linear_1", _TIMESTEP_CHANNELS, dim))
        shapes.update(_linear(f"{name}.emb.timestep_embedder.linear_2", dim, dim))
        shapes.update(_linear(f"{name}.linear", dim, rows * dim))
    block = dict(_block(video, audio, heads, audio_heads, config))
    for number in range(config["num_layers"]):
        shapes.update({f"transformer_blocks.{number}.{name}": shape for name, shape in block.items()})
    return shapes


def _block(
    video: int, audio: int, heads: int, audio_heads: int, config: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    # name, width of the queries' stream, of what is attended to, of all heads, number of heads
    for name, query, context, inner, count in (
        ("attn1", video, video, video, heads),
        ("attn2", video, config["cross_attention_dim"], video, heads),
        ("audio_attn1", audio, audio, audio, audio_heads),
        ("audio_attn2", audio, config["audio_cross_attention_dim"], audio, audio_heads),
        ("audio_to_video_attn", video, audio, audio, audio_heads),
        ("video_to_audio_attn", audio, video, audio, audio_heads),
    ):
        yield from _linear(f"{name}.to_q", query, inner)
        yield from _linear(f"{name}.to_k", context, inner)
        yield from _linear(f"{name}.to_v", context, inner)
        yield from _linear(f"{name}.to_gate_logits", query, count)
        yield from _linear(f"{name}.to_out.0", inner, query)
        yield f"{name}.q_norm.weight", (inner,)
        yield f"{name}.k_norm.weight", (inner,)
    for prefix, dim in (("", video), ("audio_", audio)):
        yield from _linear(f"{prefix}ff.net.0.proj", dim, 4 * dim)
        yield from _linear(f"{prefix}ff.net.2", 4 * dim, dim)
        yield f"{prefix}scale_shift_table", (9, dim)
        yield f"{prefix}prompt_scale_shift_table", (2, dim)
    yield "scale_shift_table_a2v_ca_video", (5, video)
    yield "scale_shift_table_a2v_ca_audio", (5, audio)


def _linear(name: str, n_in: int, n_out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (n_out, n_in)
    yield f"{name}.bias", (n_out,)
