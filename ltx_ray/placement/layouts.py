"""The layout of a gang where the user has named none. No Ray, no torch.

For throughput a card has a whole replica, and the fewest cards that hold one where a card does not. For latency one
gang takes the cards of a node: stage 2 divides its tokens, and stage 1 its tokens or its guidance passes, whichever is
estimated to take less time. The estimate is that of an HQ clip: FLOPs over a card's rate, and the bytes that a rank
sends over the rate of its links. It counts exchanges as if nothing hid them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ltx_ray.checkpoints.transformer_config import StreamConfig, TransformerConfig
from ltx_ray.placement.sizing import ParallelConfig
from ltx_ray.presets import PIPELINES
from ltx_ray.records import AV
from ltx_ray.sampling.passes import Pass, divide_passes
from ltx_ray.shapes import ClipShape

#: FLOP/s of a pass by Ray's name of a GPU. Those of the H100 and the H200 are measured (docs/benchmarks.md). The others
#: are estimates: as large a part of the data sheets' rates in bfloat16. A GPU that is not here counts as an A100.
_FLOPS = {
    "H200": 614e12, "H100": 613e12, "H800": 613e12, "GH200": 614e12, "H20": 100e12, "B200": 1400e12, "B300": 1400e12,
    "GB200": 1550e12, "GB300": 1550e12, "A100": 195e12, "A100-80G": 195e12, "A100-40G": 195e12, "L40S": 225e12,
    "L40": 112e12, "RTX-PRO-6000": 310e12, "A40": 93e12, "A30": 102e12, "A10": 78e12, "A10G": 43e12, "L4": 75e12,
}  # fmt: skip
_OTHER_FLOPS = 195e12
#: GPUs whose cards are usually linked by NVLink. Others exchange over PCIe.
_NVLINK = ("H200", "H100", "H800", "H20", "GH200", "B200", "B300", "GB200", "GB300", "A100", "A100-80G", "A100-40G")
#: Bytes a second that a rank sends, measured between two H200s, and estimated for PCIe; seconds to begin an exchange.
_NVLINK_RATE, _PCIE_RATE, _BEGIN = 308e9, 20e9, 18e-6
#: Exchanges of a block whose tokens are divided, groups of heads counted.
_EXCHANGES = 11
_TEXT_TOKENS = 1024
#: Passes of a call with HQ's guidance. The isolated one leaves out attention between the streams.
_GUIDED = {Pass.COND: 1.0, Pass.UNCOND: 1.0, Pass.ISOLATED: 0.88}


@dataclass(frozen=True)
class Cards:
    """The cards of a node that a gang may have: Ray's name of their model ("" for an unknown one), and their number."""

    model: str
    count: int


def choose_layout(
    parallel: ParallelConfig,
    cards: Cards,
    transformer: TransformerConfig,
    distilled: bool,
    fits: Callable[[int], bool],
) -> ParallelConfig:
    """`parallel` with a layout, or as it is where it names one or no number of cards holds the model.

    `fits`: whether a card holds a rank of a gang of so many tensor-parallel ranks.
    """
    if parallel.names_a_layout:
        return parallel
    heads = transformer.video.heads
    tp = next((n for n in _divisors(heads) if n <= cards.count and fits(n)), None)
    if tp is None:
        return parallel
    if parallel.optimize == "throughput":
        return replace(parallel, tp=tp)
    # Every rank of Ulysses attends with as many heads.
    peers = max(n for n in _divisors(heads // tp) if n * tp <= cards.count)
    guidance = min(_ways_to_share(peers, distilled), key=lambda g: _seconds(cards.model, transformer, g, peers // g))
    return replace(
        parallel,
        tp=tp,
        guidance_parallel=guidance,
        stage1_sequence_parallel=peers // guidance,
        sequence_parallel=peers if parallel.with_stage2 else 1,
        stage1=1,
        stage2=0,
    )


def _ways_to_share(peers: int, distilled: bool) -> Iterator[int]:
    """The groups that may share the guidance passes, each of which divides its tokens."""
    return (n for n in _divisors(peers) if n == 1 or (n <= len(_GUIDED) and not distilled))


def _seconds(model: str, transformer: TransformerConfig, guidance: int, tokens: int) -> float:
    """Of the passes of an HQ call of stage 1, on `guidance` groups of ranks that each divide the tokens by `tokens`."""
    defaults = PIPELINES["hq"].defaults
    shape = ClipShape(defaults["num_frames"], defaults["height"], defaults["width"], defaults["frame_rate"]).half()
    passes = max(sum(_GUIDED[name] for name in names) for names in divide_passes(tuple(_GUIDED), guidance))
    work = _flops(transformer, shape) / tokens / _FLOPS.get(model, _OTHER_FLOPS)
    if tokens == 1:
        return passes * work
    link = _NVLINK_RATE if model in _NVLINK else _PCIE_RATE
    exchanges = transformer.num_layers * _EXCHANGES * _BEGIN + _sent_bytes(transformer, shape, tokens) / link
    return passes * (work + exchanges)


def _flops(transformer: TransformerConfig, shape: ClipShape) -> float:
    """Of a pass: products of the rows with their weights, and attention."""

    def of_stream(stream: StreamConfig, tokens: int, other: int) -> float:
        dim, cross = stream.dim, transformer.audio.dim
        # Self-attention has four square layers, attention to the text two over its own rows, the feed-forward is four
        # times as wide as the stream, and attention between the streams is as wide as the audio's.
        products = 2 * tokens * (4 * dim * dim + 2 * dim * dim + 8 * dim * dim + 4 * dim * cross)
        text = 2 * _TEXT_TOKENS * 2 * dim * dim
        return products + text + 4 * tokens * (tokens * dim + _TEXT_TOKENS * dim + other * cross)

    tokens = AV(shape.video_tokens, shape.audio_latents)
    streams = AV(transformer.video, transformer.audio)
    return transformer.num_layers * sum(streams.map(of_stream, tokens, tokens.swapped()))


def _sent_bytes(transformer: TransformerConfig, shape: ClipShape, ranks: int) -> float:
    """What one of `ranks` that divide the video's tokens sends in a pass, in bfloat16."""
    # Queries, keys, values and results of self-attention, keys and values for the audio.
    widths = 4 * transformer.video.dim + 2 * transformer.audio.dim
    return 2 * transformer.num_layers * widths * shape.video_tokens / ranks * (ranks - 1) / ranks


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
