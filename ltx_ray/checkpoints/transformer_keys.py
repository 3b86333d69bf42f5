"""Names and shapes of the tensors of an LTX-2.3 transformer, in the spelling of the official checkpoints. No torch.

`model/transformer.py` and `model/block.py` build modules of the same names, and a test holds both together. The shapes
follow from the configuration alone, so that a file which lacks a tensor is refused before any actor starts.
Source: `ltx_core/model/transformer/model.py` and `transformer.py` of the reference v1.2.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ltx_ray.checkpoints.transformer_config import StreamConfig, TransformerConfig

#: Prefix of the transformer's keys in an official single file, and of the keys below it that are not the transformer's.
TRANSFORMER_PREFIX = "model.diffusion_model."
VIDEO_CONNECTOR_PREFIX = f"{TRANSFORMER_PREFIX}video_embeddings_connector."
AUDIO_CONNECTOR_PREFIX = f"{TRANSFORMER_PREFIX}audio_embeddings_connector."
CONNECTOR_PREFIXES = (VIDEO_CONNECTOR_PREFIX, AUDIO_CONNECTOR_PREFIX)

#: The list of blocks; names in a block are relative to `transformer_blocks.<number>.`.
BLOCKS = "transformer_blocks"

#: Linear layers of an attention, relative to it.
TO_Q, TO_K, TO_V, TO_GATES, TO_OUT = "to_q", "to_k", "to_v", "to_gate_logits", "to_out.0"
#: RMS norms of an attention, relative to it.
Q_NORM, K_NORM = "q_norm", "k_norm"
#: Linear layers of a feed-forward, relative to it.
FEED_FORWARD_UP, FEED_FORWARD_DOWN = "net.0.proj", "net.2"
#: Linear layers of an adaptive layer norm, relative to it, in the order in which a timestep passes them.
ADALN_LINEAR_1, ADALN_LINEAR_2 = "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2"
ADALN_LINEAR = "linear"


@dataclass(frozen=True)
class StreamNames:
    """Names of the modules and tables of one stream."""

    #: In the transformer: projections in and out, and the table of the last modulation.
    patchify: str
    proj_out: str
    output_table: str
    #: In the transformer: adaptive layer norms of the stream, of its text, of the attention to the other stream, and of
    #: that attention's gate.
    adaln: str
    prompt_adaln: str
    cross_adaln: str
    cross_gate_adaln: str
    #: In a block: attention of the stream to itself, to the text and to the other stream, and its feed-forward.
    self_attention: str
    text_attention: str
    cross_attention: str
    feed_forward: str
    #: In a block: modulation tables of the stream, of its text and of the attention to the other stream.
    table: str
    prompt_table: str
    cross_table: str


VIDEO = StreamNames(
    patchify="patchify_proj",
    proj_out="proj_out",
    output_table="scale_shift_table",
    adaln="adaln_single",
    prompt_adaln="prompt_adaln_single",
    cross_adaln="av_ca_video_scale_shift_adaln_single",
    cross_gate_adaln="av_ca_a2v_gate_adaln_single",
    self_attention="attn1",
    text_attention="attn2",
    cross_attention="audio_to_video_attn",
    feed_forward="ff",
    table="scale_shift_table",
    prompt_table="prompt_scale_shift_table",
    cross_table="scale_shift_table_a2v_ca_video",
)
AUDIO = StreamNames(
    patchify="audio_patchify_proj",
    proj_out="audio_proj_out",
    output_table="audio_scale_shift_table",
    adaln="audio_adaln_single",
    prompt_adaln="audio_prompt_adaln_single",
    cross_adaln="av_ca_audio_scale_shift_adaln_single",
    cross_gate_adaln="av_ca_v2a_gate_adaln_single",
    self_attention="audio_attn1",
    text_attention="audio_attn2",
    cross_attention="video_to_audio_attn",
    feed_forward="audio_ff",
    table="audio_scale_shift_table",
    prompt_table="audio_prompt_scale_shift_table",
    cross_table="scale_shift_table_a2v_ca_audio",
)

#: Attentions of a block in which queries, keys and values come from one input, and those with a second one.
SELF_ATTENTIONS = (VIDEO.self_attention, AUDIO.self_attention)
CROSS_ATTENTIONS = (
    VIDEO.text_attention, AUDIO.text_attention, VIDEO.cross_attention, AUDIO.cross_attention,
)  # fmt: skip
FEED_FORWARDS = (VIDEO.feed_forward, AUDIO.feed_forward)

#: Channels of a timestep's sinusoids.
TIMESTEP_CHANNELS = 256
#: Rows of the modulations and their tables: three (shift, scale, gate) each for self-attention, feed-forward and
#: attention to the text; shift and scale of the text; two of each for the attention across the streams, and its gate,
#: which has an adaptive layer norm of its own but shares the table; shift and scale before the last projection.
MODULATION_ROWS = 9
PROMPT_ROWS = 2
CROSS_ROWS = 4
CROSS_GATE_ROWS = 1
OUTPUT_ROWS = 2
#: Width of a feed-forward's hidden part over that of its stream.
FEED_FORWARD_FACTOR = 4

Shapes = Mapping[str, tuple[int, ...]]
_Shape = tuple[str, tuple[int, ...]]


def transformer_shapes(config: TransformerConfig) -> Shapes:
    """Shape of each tensor of the transformer, by official name without `TRANSFORMER_PREFIX`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for names, stream in ((VIDEO, config.video), (AUDIO, config.audio)):
        shapes.update(_stream(names, stream))
    block = dict(_block(config.video, config.audio))
    for number in range(config.num_layers):
        shapes.update({f"{BLOCKS}.{number}.{name}": shape for name, shape in block.items()})
    return shapes


def _stream(names: StreamNames, stream: StreamConfig) -> Iterator[_Shape]:
    """What a stream has outside of the blocks."""
    yield names.output_table, (OUTPUT_ROWS, stream.dim)
    yield from _linear(names.patchify, stream.in_channels, stream.dim)
    yield from _linear(names.proj_out, stream.dim, stream.out_channels)
    for adaln, rows in (
        (names.adaln, MODULATION_ROWS),
        (names.prompt_adaln, PROMPT_ROWS),
        (names.cross_adaln, CROSS_ROWS),
        (names.cross_gate_adaln, CROSS_GATE_ROWS),
    ):
        yield from _linear(f"{adaln}.{ADALN_LINEAR_1}", TIMESTEP_CHANNELS, stream.dim)
        yield from _linear(f"{adaln}.{ADALN_LINEAR_2}", stream.dim, stream.dim)
        yield from _linear(f"{adaln}.{ADALN_LINEAR}", stream.dim, rows * stream.dim)


def _block(video: StreamConfig, audio: StreamConfig) -> Iterator[_Shape]:
    for names, stream, other in ((VIDEO, video, audio), (AUDIO, audio, video)):
        yield from _attention(names.self_attention, stream, stream.dim, stream)
        yield from _attention(names.text_attention, stream, stream.context_dim, stream)
        # across the streams, heads are as wide as the audio's in both directions
        yield from _attention(names.cross_attention, stream, other.dim, audio)
        yield from _linear(f"{names.feed_forward}.{FEED_FORWARD_UP}", stream.dim, FEED_FORWARD_FACTOR * stream.dim)
        yield from _linear(f"{names.feed_forward}.{FEED_FORWARD_DOWN}", FEED_FORWARD_FACTOR * stream.dim, stream.dim)
        yield names.table, (MODULATION_ROWS, stream.dim)
        yield names.prompt_table, (PROMPT_ROWS, stream.dim)
        yield names.cross_table, (CROSS_ROWS + CROSS_GATE_ROWS, stream.dim)


def _attention(name: str, stream: StreamConfig, context_dim: int, heads_of: StreamConfig) -> Iterator[_Shape]:
    """Attention of a stream to a context of `context_dim` channels, with the heads of the stream `heads_of`."""
    inner = heads_of.dim
    yield from _linear(f"{name}.{TO_Q}", stream.dim, inner)
    yield from _linear(f"{name}.{TO_K}", context_dim, inner)
    yield from _linear(f"{name}.{TO_V}", context_dim, inner)
    yield from _linear(f"{name}.{TO_GATES}", stream.dim, heads_of.heads)
    yield from _linear(f"{name}.{TO_OUT}", inner, stream.dim)
    yield f"{name}.{Q_NORM}.weight", (inner,)
    yield f"{name}.{K_NORM}.weight", (inner,)


def _linear(name: str, n_in: int, n_out: int) -> Iterator[_Shape]:
    yield f"{name}.weight", (n_out, n_in)
    yield f"{name}.bias", (n_out,)
