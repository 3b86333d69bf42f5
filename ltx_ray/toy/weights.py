"""The tensors of the toy model's files, drawn so that no picture saturates or stands still and sound is audible.

All weights come from the uniform draws of one torch.Generator. Those are integer arithmetic and thus the same on every
CPU, which its vectorised normal draws are not. The order of draws decides the bytes, which a test holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from ltx_ray.checkpoints import transformer_keys as keys
from ltx_ray.toy.config import AUDIO_LATENT, BWE_FFT, LATENT_CHANNELS, MEL_BINS, PATCH, REGISTERS, ToyShape


class Draw:
    """Tensors of one safetensors file, drawn from a generator in float32 and stored as bfloat16.

    `gain` scales a layer's output: with gain 1, an input of unit variance gives an output of unit variance.
    """

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.tensors: dict[str, torch.Tensor] = {}

    def uniform(self, shape: Sequence[int], std: float, mean: float = 0.0) -> torch.Tensor:
        """Uniform float32 numbers with this mean and standard deviation."""
        half = std * math.sqrt(3.0)
        return torch.rand(shape, generator=self.generator, dtype=torch.float32) * (2 * half) + (mean - half)

    def put(self, key: str, value: torch.Tensor) -> None:
        """Store a tensor."""
        assert key not in self.tensors, key
        self.tensors[key] = value.to(torch.bfloat16).contiguous()

    def vector(self, key: str, shape: Sequence[int], std: float, mean: float = 0.0) -> None:
        """Draw a tensor of any shape."""
        self.put(key, self.uniform(shape, std, mean))

    def linear(self, key: str, n_out: int, n_in: int, gain: float = 1.0, bias: float = 0.05) -> None:
        """Draw a linear layer, whose bias has the standard deviation `bias`."""
        self.vector(f"{key}.weight", (n_out, n_in), gain / math.sqrt(n_in))
        self.vector(f"{key}.bias", (n_out,), bias)

    def conv(
        self,
        key: str,
        n_out: int,
        n_in: int,
        kernel: Sequence[int],
        gain: float = 1.0,
        bias: float | None = 0.05,
    ) -> None:
        """Draw a convolution, without a bias where `bias` is None."""
        self.vector(f"{key}.weight", (n_out, n_in, *kernel), gain / math.sqrt(n_in * math.prod(kernel)))
        if bias is not None:
            self.vector(f"{key}.bias", (n_out,), bias)

    def smooth_conv(
        self, key: str, n_out: int, n_in: int, gain: float, factors: Sequence[int] = (), detail: float = 0.1
    ) -> None:
        """Draw a convolution of 3 taps for each axis that blurs and mixes channels, plus `detail` times random taps.

        With random taps alone, every picture would be grain. `factors` is by how much each axis grows in the
        depth-to-space after the convolution, whose sub-pixels are in the file's order. Each sub-pixel interpolates its
        neighbours linearly, so that upsampling shows no blocks. For `gain`, the input is taken as locally constant.
        """
        axes = [_taps(factor) for factor in factors]
        kernel = torch.ones(())
        for taps in axes:  # The axes of the kernel are (p1, p2, p3, k1, k2, k3) in the end.
            grown = kernel.dim() // 2
            kernel = torch.tensordot(kernel, taps, dims=0).movedim(kernel.dim(), grown)
        sub = kernel.shape[: len(axes)]
        pixels, size = math.prod(sub), kernel.shape[len(axes) :]
        kernel = kernel.reshape(1, pixels, 1, *size)
        mix = self.uniform((n_out // pixels, 1, n_in, *[1] * len(axes)), gain / math.sqrt(n_in))
        # Most inputs are activations, which are positive on average. Without their mean, pictures are grey on average.
        mix = mix - mix.mean(2, keepdim=True)
        grain = self.uniform((n_out // pixels, pixels, n_in, *size), detail * gain / math.sqrt(n_in * math.prod(size)))
        self.put(f"{key}.weight", (mix * kernel + grain).reshape(n_out, n_in, *size))
        self.put(f"{key}.bias", self.uniform((n_out // pixels, 1), 0.03).expand(-1, pixels).reshape(n_out))


def _taps(factor: int) -> torch.Tensor:
    """Weights (factor, 3) of the left neighbour, the pixel and the right neighbour for each of `factor` sub-pixels.

    Rows sum to 1. A factor of 1 is a plain blur.
    """
    if factor == 1:
        return torch.tensor([[0.25, 0.5, 0.25]])
    offset = (torch.arange(factor) + 0.5) / factor - 0.5
    return torch.stack([(-offset).clamp(min=0), 1 - offset.abs(), offset.clamp(min=0)], dim=1)


# --- the single file ---------------------------------------------------------------------------------------------


def _attention(draw: Draw, key: str, heads: int, inner: int, query: int, context: int, norm: float) -> None:
    """Gated attention. `norm` is the mean of the query and key norm weights.

    Above 1, the softmax picks out a few tokens. Otherwise the words of a prompt would average out among a thousand
    registers.
    """
    for name in (keys.Q_NORM, keys.K_NORM):
        draw.vector(f"{key}.{name}.weight", (inner,), 0.2, norm)
    draw.linear(f"{key}.{keys.TO_Q}", inner, query)
    draw.linear(f"{key}.{keys.TO_K}", inner, context)
    draw.linear(f"{key}.{keys.TO_V}", inner, context)
    draw.linear(f"{key}.{keys.TO_GATES}", heads, query, bias=0.5)
    draw.linear(f"{key}.{keys.TO_OUT}", query, inner)


def _feed_forward(draw: Draw, key: str, dim: int) -> None:
    hidden = keys.FEED_FORWARD_FACTOR * dim
    draw.linear(f"{key}.{keys.FEED_FORWARD_UP}", hidden, dim)
    draw.linear(f"{key}.{keys.FEED_FORWARD_DOWN}", dim, hidden, gain=1.5)


#: Means of norm weights: of attention in general, and of attention to the text and its registers.
_NORM, _TEXT_NORM = 1.1, 1.6


def draw_transformer(draw: Draw, s: ToyShape) -> None:
    """Draw the transformer, with the names of transformer_keys.py."""
    top = keys.TRANSFORMER_PREFIX
    streams = (keys.VIDEO, s.dim), (keys.AUDIO, s.audio_dim)

    def adaln(name: str, dim: int, rows: int, gain: float) -> None:
        draw.linear(f"{top}{name}.{keys.ADALN_LINEAR_1}", dim, keys.TIMESTEP_CHANNELS, gain=1.5)
        draw.linear(f"{top}{name}.{keys.ADALN_LINEAR_2}", dim, dim, gain=1.5)
        draw.linear(f"{top}{name}.{keys.ADALN_LINEAR}", rows * dim, dim, gain=gain)

    for (names, dim), channels in zip(streams, (LATENT_CHANNELS, math.prod(AUDIO_LATENT)), strict=True):
        draw.linear(f"{top}{names.patchify}", dim, channels)
        draw.linear(f"{top}{names.proj_out}", channels, dim, gain=0.7)
        draw.vector(f"{top}{names.output_table}", (keys.OUTPUT_ROWS, dim), 0.2)
        adaln(names.adaln, dim, keys.MODULATION_ROWS, 0.6)
        adaln(names.prompt_adaln, dim, keys.PROMPT_ROWS, 0.4)
    for names, dim in streams:
        adaln(names.cross_adaln, dim, keys.CROSS_ROWS, 0.4)
        adaln(names.cross_gate_adaln, dim, keys.CROSS_GATE_ROWS, 0.6)

    for layer in range(s.layers):
        block = f"{top}{keys.BLOCKS}.{layer}."
        for names, dim in streams:
            _attention(draw, f"{block}{names.self_attention}", s.heads, dim, dim, dim, _NORM)
            _attention(draw, f"{block}{names.text_attention}", s.heads, dim, dim, dim, _TEXT_NORM)
        # Attention between the streams is as wide as the audio stream.
        inner = s.audio_dim
        _attention(draw, f"{block}{keys.VIDEO.cross_attention}", s.heads, inner, s.dim, s.audio_dim, _NORM)
        _attention(draw, f"{block}{keys.AUDIO.cross_attention}", s.heads, inner, s.audio_dim, s.dim, _NORM)
        for names, dim in streams:
            _feed_forward(draw, f"{block}{names.feed_forward}", dim)
        for names, dim in streams:
            draw.vector(f"{block}{names.table}", (keys.MODULATION_ROWS, dim), 0.4)
            draw.vector(f"{block}{names.prompt_table}", (keys.PROMPT_ROWS, dim), 0.3)
            draw.vector(f"{block}{names.cross_table}", (keys.CROSS_ROWS + keys.CROSS_GATE_ROWS, dim), 0.4)


def draw_text(draw: Draw, s: ToyShape) -> None:
    """Draw the text projections and the connectors of both streams."""
    features = s.gemma_hidden * (s.gemma_layers + 1)
    for stream, top, dim in (
        ("video", keys.VIDEO_CONNECTOR_PREFIX, s.dim),
        ("audio", keys.AUDIO_CONNECTOR_PREFIX, s.audio_dim),
    ):
        # Features are multiplied by sqrt(dim / gemma_hidden) before this layer.
        gain = math.sqrt(s.gemma_hidden / dim)
        draw.linear(f"text_embedding_projection.{stream}_aggregate_embed", dim, features, gain=gain)
        draw.vector(f"{top}learnable_registers", (REGISTERS, dim), 1 / math.sqrt(3.0))
        for layer in range(s.connector_layers):
            block = f"{top}transformer_1d_blocks.{layer}."
            _attention(draw, f"{block}attn1", s.heads, dim, dim, dim, _TEXT_NORM)
            _feed_forward(draw, f"{block}ff", dim)


def _statistics(draw: Draw, key: str) -> None:
    """Mean and standard deviation of a VAE's latents."""
    draw.vector(f"{key}.per_channel_statistics.mean-of-means", (LATENT_CHANNELS,), 0.3)
    draw.vector(f"{key}.per_channel_statistics.std-of-means", (LATENT_CHANNELS,), 0.2, 1.0)


def _res_blocks(draw: Draw, key: str, layers: int, dim: int, smooth: bool) -> None:
    for i in range(layers):
        for n, gain in ((1, 1.7), (2, 0.7)):
            name = f"{key}.res_blocks.{i}.conv{n}.conv"
            if smooth:
                draw.smooth_conv(name, dim, dim, gain, (1, 1, 1))
            else:
                draw.conv(name, dim, dim, (3, 3, 3), gain)


#: By how much an up- or downsampling block changes time, height and width.
_GROWTH = {"space": (1, 2, 2), "time": (2, 1, 1), "all": (2, 2, 2)}


def draw_video_vae(draw: Draw, vae: dict[str, Any]) -> None:
    """Draw both halves of the video VAE. `vae` is config.checkpoint_config's."""
    _draw_video_encoder(draw, vae)
    _draw_video_decoder(draw, vae)
    _statistics(draw, "vae")


def _draw_video_encoder(draw: Draw, vae: dict[str, Any]) -> None:
    cube, dim = (3, 3, 3), LATENT_CHANNELS
    draw.conv("vae.encoder.conv_in.conv", dim, 3 * PATCH**2, cube, gain=2.0)
    for i, (name, block) in enumerate(vae["encoder_blocks"]):
        key = f"vae.encoder.down_blocks.{i}"
        if name == "res_x":
            _res_blocks(draw, key, block["num_layers"], dim, smooth=False)
        else:
            grown = dim * block["multiplier"]
            draw.conv(f"{key}.conv.conv", grown // math.prod(_GROWTH[name.split("_")[1]]), dim, cube)
            dim = grown
    draw.conv("vae.encoder.conv_out.conv", LATENT_CHANNELS + 1, dim, cube, gain=2.0)


def _draw_video_decoder(draw: Draw, vae: dict[str, Any]) -> None:
    cube = (3, 3, 3)
    blocks = list(reversed(vae["decoder_blocks"]))
    dim = vae["decoder_base_channels"] * math.prod(b.get("multiplier", 1) for _, b in blocks)
    draw.conv("vae.decoder.conv_in.conv", dim, LATENT_CHANNELS, cube, gain=3.0)
    for i, (name, block) in enumerate(blocks):
        key = f"vae.decoder.up_blocks.{i}"
        if name == "res_x":
            _res_blocks(draw, key, block["num_layers"], dim, smooth=True)
        else:
            factors = _GROWTH[name.split("_")[1]]
            n_out = math.prod(factors) * dim // block["multiplier"]
            draw.smooth_conv(f"{key}.conv.conv", n_out, dim, 1.0, factors)
            dim //= block["multiplier"]
    # The sub-pixels of the patch are stored width first, and the taps must be on the right axis.
    name = "vae.decoder.conv_out.conv"
    draw.smooth_conv(name, 3 * PATCH**2, dim, 0.75, (1, PATCH, PATCH))
    weight = draw.tensors.pop(f"{name}.weight").unflatten(0, (3, PATCH, PATCH))
    draw.put(f"{name}.weight", weight.transpose(1, 2).flatten(0, 2))


def draw_audio_vae(draw: Draw, config: dict[str, Any]) -> None:
    """Draw both halves of the audio VAE. `config` is config.checkpoint_config's."""
    dd = config["model"]["params"]["ddconfig"]
    square, ch, blocks = (3, 3), dd["ch"], dd["num_res_blocks"]
    widths = [ch * m for m in dd["ch_mult"]]
    levels = len(widths)

    def res(key: str, n_in: int, n_out: int) -> None:
        draw.conv(f"{key}.conv1.conv", n_out, n_in, square, gain=1.7)
        draw.conv(f"{key}.conv2.conv", n_out, n_out, square, gain=0.7)
        if n_in != n_out:
            draw.conv(f"{key}.nin_shortcut.conv", n_out, n_in, (1, 1))

    def mid(key: str, dim: int) -> None:
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


def _low_pass(size: int = 12, cutoff: float = 0.25, half_width: float = 0.3) -> torch.Tensor:
    """The Kaiser-windowed sinc of BigVGAN's anti-aliased activations (arXiv:2206.04658), ratio 2: (1, 1, size)."""
    # Kaiser's empirical formula for the window's beta, from the attenuation in dB.
    attenuation = 2.285 * (size // 2 - 1) * math.pi * 4 * half_width + 7.95
    beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21) if attenuation <= 50 else 0.1102 * (
        attenuation - 8.7
    )  # fmt: skip
    taps = numpy.arange(size) - (size - 1) / 2
    kernel = numpy.kaiser(size, beta) * numpy.sinc(2 * cutoff * taps)
    return torch.from_numpy((kernel / kernel.sum()).reshape(1, 1, size))


def _draw_generator(draw: Draw, key: str, config: dict[str, Any], gain: float) -> None:
    """Draw a generator in the style of BigVGAN. `gain` scales its waveform."""
    low_pass = _low_pass()

    def activation(name: str, dim: int) -> None:
        draw.vector(f"{name}.act.alpha", (dim,), 0.3)
        draw.vector(f"{name}.act.beta", (dim,), 0.3)
        draw.put(f"{name}.upsample.filter", low_pass)
        draw.put(f"{name}.downsample.lowpass.filter", low_pass)

    dim = config["upsample_initial_channel"]
    draw.conv(f"{key}.conv_pre", dim, 2 * MEL_BINS, (7,))
    index = 0
    for i, (rate, kernel) in enumerate(zip(config["upsample_rates"], config["upsample_kernel_sizes"])):
        # The weights of a transposed convolution are (in, out, k), and k / rate of them meet in one output.
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
    # There is no bias, and snake activations are mostly positive. Filters without a mean keep the sound free of a
    # constant offset.
    weight = draw.tensors.pop(f"{key}.conv_post.weight").float()
    draw.put(f"{key}.conv_post.weight", weight - weight.mean(-1, keepdim=True))


def draw_vocoder(draw: Draw, config: dict[str, Any]) -> None:
    """Draw the vocoder, its bandwidth extension and the mel transform between them."""
    _draw_generator(draw, "vocoder.vocoder", config["vocoder"], gain=0.06)
    _draw_generator(draw, "vocoder.bwe_generator", config["bwe"], gain=0.01)

    # The spectrogram between the two: a DFT under a periodic Hann window (cosines, then minus sines), and triangles on
    # the mel scale (2595 log10(1 + f/700)).
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


# --- the other files -------------------------------------------------------------------------------------------------


def draw_lora(draw: Draw, checkpoint: dict[str, torch.Tensor], s: ToyShape) -> None:
    """Draw factors for every linear layer of the transformer in `checkpoint`. LoRAs do not reach the connectors."""
    for key, weight in checkpoint.items():
        in_transformer = key.startswith(keys.TRANSFORMER_PREFIX) and not key.startswith(keys.CONNECTOR_PREFIXES)
        if not in_transformer or not key.endswith(".weight") or weight.dim() < 2:
            continue
        module = key.removeprefix(keys.TRANSFORMER_PREFIX).removesuffix(".weight")
        n_out, n_in = weight.shape
        draw.vector(f"diffusion_model.{module}.lora_A.weight", (s.lora_rank, n_in), 1 / math.sqrt(n_in))
        draw.vector(f"diffusion_model.{module}.lora_B.weight", (n_out, s.lora_rank), 0.03 / math.sqrt(s.lora_rank))


def draw_upsampler(draw: Draw, s: ToyShape) -> None:
    """Draw the spatial upsampler."""
    cube, dim = (3, 3, 3), s.upsampler_channels

    def norm(key: str) -> None:
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
