"""An estimate of what a clip costs in TFLOP, from its size and the model's widths."""

from __future__ import annotations

from ltx_ray.checkpoints.transformer_config import TransformerConfig
from ltx_ray.presets import PIPELINES, SAMPLER_TRAITS, STAGE2_SIGMAS
from ltx_ray.records import RenderRequest
from ltx_ray.sampling.passes import passes_for
from ltx_ray.shapes import ClipShape

#: Length of the text contexts.
TEXT_TOKENS = 1024
#: Throughput sustained over a clip on an H100 80GB in bf16 (36,800 TFLOP in 59 to 60 s, docs/benchmarks.md).
H100_TFLOPS = 618.0


def pass_tflop(config: TransformerConfig, shape: ClipShape, isolated: bool = False) -> float:
    """Multiply-adds (two operations each) of one pass of the model over a clip of `shape`, in TFLOP.

    `isolated` leaves out the attention between the streams.
    """
    d_v, d_a = config.video.dim, config.audio.dim
    t_v, t_a = shape.video_tokens, shape.audio_latents

    def attention(queries: int, keys: int, inner: int, query_dim: int, key_dim: int) -> float:
        projections = 2 * queries * query_dim * inner + 2 * keys * key_dim * inner
        return 2 * projections + 4 * queries * keys * inner

    def stream(tokens: int, dim: int) -> float:
        feed_forward = 2 * tokens * 8 * dim * dim
        return attention(tokens, tokens, dim, dim, dim) + attention(tokens, TEXT_TOKENS, dim, dim, dim) + feed_forward

    total = stream(t_v, d_v) + stream(t_a, d_a)
    if not isolated:
        total += attention(t_v, t_a, d_a, d_v, d_a) + attention(t_a, t_v, d_a, d_a, d_v)
    return config.num_layers * total / 1e12


def clip_tflop(config: TransformerConfig, request: RenderRequest) -> float:
    """TFLOP of both stages of a clip."""
    pipeline = PIPELINES[request.pipeline]

    calls = SAMPLER_TRAITS[pipeline.sampler].model_calls
    steps = request.num_inference_steps if pipeline.sigmas is None else len(pipeline.sigmas) - 1
    half = request.shape.half()
    stage1 = sum(pass_tflop(config, half, name == "isolated") for name in passes_for(request.guidance))
    stage2 = pass_tflop(config, request.shape)
    return calls(steps) * stage1 + calls(len(STAGE2_SIGMAS) - 1) * stage2
