"""The toy model's weights: what each piece holds, drawn so that nothing saturates, freezes or falls silent.

All weights come from one torch.Generator, and only from its uniform draws: those are integer arithmetic and thus
the same on every CPU, which the vectorised normal draws are not.
"""

from __future__ import annotations

import math

import numpy
import torch

from ltx_ray.toy.config import AUDIO_LATENT, BWE_FFT, LATENT_CHANNELS, MEL_BINS, PATCH, REGISTERS, ToyShape


class Draw:
    """Tensors of one safetensors file, drawn from a generator. Stored as bfloat16, drawn as float32.

    `gain` scales a layer's output: at gain 1 a unit-variance input gives a unit-variance output.
    """

    def __init__(self, generator):
        self.generator = generator
        self.tensors: dict = {}

    def uniform(self, shape, std: float, mean: float = 0.0):
        """Uniform numbers of that mean and standard deviation, float32."""

        half = std * math.sqrt(3.0)
        return torch.rand(shape, generator=self.generator, dtype=torch.float32) * (2 * half) + (mean - half)

    def put(self, key: str, value):

        assert key not in self.tensors, key
        self.tensors[key] = value.to(torch.bfloat16).contiguous()

    def vector(self, key: str, shape, std: float, mean: float = 0.0):
        self.put(key, self.uniform(shape, std, mean))

    def linear(self, key: str, n_out: int, n_in: int, gain: float = 1.0, bias: float = 0.05):
        self.vector(f"{key}.weight", (n_out, n_in), gain / math.sqrt(n_in))
        self.vector(f"{key}.bias", (n_out,), bias)

    def conv(self, key: str, n_out: int, n_in: int, kernel, gain: float = 1.0, bias: float | None = 0.05):
        self.vector(f"{key}.weight", (n_out, n_in, *kernel), gain / math.sqrt(n_in * math.prod(kernel)))
        if bias is not None:
            self.vector(f"{key}.bias", (n_out,), bias)

    def smooth_conv(self, key: str, n_out: int, n_in: int, gain: float, factors=(), detail: float = 0.1):
        """A 3x3x3 (or 3x3) convolution that blurs and mixes channels, plus `detail` of it at random: with plain random
        kernels every picture is grain. `factors` says by how much each axis grows in the depth-to-space after it, the
        sub-pixels in the file's order; each sub-pixel then takes its own share of its neighbours (linear
        interpolation), so that upsampling shows no blocks. For `gain`, the input counts as locally constant."""

        axes = [_taps(factor) for factor in factors]
        kernel = torch.ones(())
        for taps in axes:  # (p1, p2, p3, k1, k2, k3) in the end
            grown = kernel.dim() // 2
            kernel = torch.tensordot(kernel, taps, dims=0).movedim(kernel.dim(), grown)
        sub = kernel.shape[: len(axes)]
        pixels, size = math.prod(sub), kernel.shape[len(axes) :]
        kernel = kernel.reshape(1, pixels, 1, *size)
        mix = self.uniform((n_out // pixels, 1, n_in, *[1] * len(axes)), gain / math.sqrt(n_in))
        # most inputs are activations and lean positive: without their mean, pictures are grey on average
        mix = mix - mix.mean(2, keepdim=True)
        grain = self.uniform((n_out // pixels, pixels, n_in, *size), detail * gain / math.sqrt(n_in * math.prod(size)))
        self.put(f"{key}.weight", (mix * kernel + grain).reshape(n_out, n_in, *size))
        self.put(f"{key}.bias", self.uniform((n_out // pixels, 1), 0.03).expand(-1, pixels).reshape(n_out))


def _taps(factor: int):
    """Weights of the left, own and right neighbour for each of `factor` sub-pixels: (factor, 3), rows sum to 1.
    A factor of 1 is a plain blur."""

    if factor == 1:
        return torch.tensor([[0.25, 0.5, 0.25]])
    offset = (torch.arange(factor) + 0.5) / factor - 0.5
    return torch.stack([(-offset).clamp(min=0), 1 - offset.abs(), offset.clamp(min=0)], dim=1)


# --- the single file ---------------------------------------------------------------------------------------------


def _attention(draw: Draw, key: str, heads: int, inner: int, query: int, context: int, sharp: float):
    """Gated attention. `sharp` is the mean of the q/k norm weights: above 1 the softmax picks out a few tokens,
    without which a prompt's words would average away among a thousand registers."""
    for name in ("q_norm", "k_norm"):
        draw.vector(f"{key}.{name}.weight", (inner,), 0.2, sharp)
    draw.linear(f"{key}.to_q", inner, query)
    draw.linear(f"{key}.to_k", inner, context)
    draw.linear(f"{key}.to_v", inner, context)
    draw.linear(f"{key}.to_gate_logits", heads, query, bias=0.5)
    draw.linear(f"{key}.to_out.0", query, inner)


def _feed_forward(draw: Draw, key: str, dim: int):
    draw.linear(f"{key}.net.0.proj", 4 * dim, dim)
    draw.linear(f"{key}.net.2", dim, 4 * dim, gain=1.5)


def draw_transformer(draw: Draw, s: ToyShape):
    top = "model.diffusion_model."

    def adaln(name, dim, rows, gain):
        draw.linear(f"{top}{name}.emb.timestep_embedder.linear_1", dim, 256, gain=1.5)
        draw.linear(f"{top}{name}.emb.timestep_embedder.linear_2", dim, dim, gain=1.5)
        draw.linear(f"{top}{name}.linear", rows * dim, dim, gain=gain)

    for stream, dim, channels in (("", s.dim, LATENT_CHANNELS), ("audio_", s.audio_dim, math.prod(AUDIO_LATENT))):
        draw.linear(f"{top}{stream}patchify_proj", dim, channels)
        draw.linear(f"{top}{stream}proj_out", channels, dim, gain=0.7)
        draw.vector(f"{top}{stream}scale_shift_table", (2, dim), 0.2)
        adaln(f"{stream}adaln_single", dim, 9, 0.6)
        adaln(f"{stream}prompt_adaln_single", dim, 2, 0.4)
    for stream, gate, dim in (("video", "a2v", s.dim), ("audio", "v2a", s.audio_dim)):
        adaln(f"av_ca_{stream}_scale_shift_adaln_single", dim, 4, 0.4)
        adaln(f"av_ca_{gate}_gate_adaln_single", dim, 1, 0.6)

    v, a = s.dim, s.audio_dim
    for layer in range(s.layers):
        block = f"{top}transformer_blocks.{layer}."
        _attention(draw, f"{block}attn1", s.heads, v, v, v, 1.1)
        _attention(draw, f"{block}attn2", s.heads, v, v, v, 1.6)
        _attention(draw, f"{block}audio_attn1", s.heads, a, a, a, 1.1)
        _attention(draw, f"{block}audio_attn2", s.heads, a, a, a, 1.6)
        _attention(draw, f"{block}audio_to_video_attn", s.heads, a, v, a, 1.1)
        _attention(draw, f"{block}video_to_audio_attn", s.heads, a, a, v, 1.1)
        _feed_forward(draw, f"{block}ff", v)
        _feed_forward(draw, f"{block}audio_ff", a)
        for stream, dim, name in (("", v, "video"), ("audio_", a, "audio")):
            draw.vector(f"{block}{stream}scale_shift_table", (9, dim), 0.4)
            draw.vector(f"{block}{stream}prompt_scale_shift_table", (2, dim), 0.3)
            draw.vector(f"{block}scale_shift_table_a2v_ca_{name}", (5, dim), 0.4)


def draw_text(draw: Draw, s: ToyShape):
    flat = s.gemma_hidden * (s.gemma_layers + 1)
    for stream, head_dim in (("video", s.head_dim), ("audio", s.audio_head_dim)):
        dim = s.heads * head_dim
        # the features are multiplied by sqrt(dim / gemma_hidden) before this layer
        gain = math.sqrt(s.gemma_hidden / dim)
        draw.linear(f"text_embedding_projection.{stream}_aggregate_embed", dim, flat, gain=gain)
        top = f"model.diffusion_model.{stream}_embeddings_connector."
        draw.vector(f"{top}learnable_registers", (REGISTERS, dim), 1 / math.sqrt(3.0))
        for layer in range(s.connector_layers):
            block = f"{top}transformer_1d_blocks.{layer}."
            _attention(draw, f"{block}attn1", s.heads, dim, dim, dim, 1.6)
            _feed_forward(draw, f"{block}ff", dim)


def _statistics(draw: Draw, key: str):
    draw.vector(f"{key}.per_channel_statistics.mean-of-means", (LATENT_CHANNELS,), 0.3)
    draw.vector(f"{key}.per_channel_statistics.std-of-means", (LATENT_CHANNELS,), 0.2, 1.0)


def _res_blocks(draw: Draw, key: str, layers: int, dim: int, smooth: bool):
    for i in range(layers):
        for n, gain in ((1, 1.7), (2, 0.7)):
            name = f"{key}.res_blocks.{i}.conv{n}.conv"
            if smooth:
                draw.smooth_conv(name, dim, dim, gain, (1, 1, 1))
            else:
                draw.conv(name, dim, dim, (3, 3, 3), gain)


def draw_video_vae(draw: Draw, vae: dict):
    cube = (3, 3, 3)
    growth = {"space": (1, 2, 2), "time": (2, 1, 1), "all": (2, 2, 2)}  # time, height, width
    dim = LATENT_CHANNELS
    draw.conv("vae.encoder.conv_in.conv", dim, 3 * PATCH**2, cube, gain=2.0)
    for i, (name, block) in enumerate(vae["encoder_blocks"]):
        key = f"vae.encoder.down_blocks.{i}"
        if name == "res_x":
            _res_blocks(draw, key, block["num_layers"], dim, smooth=False)
        else:
            wide = dim * block["multiplier"]
            draw.conv(f"{key}.conv.conv", wide // math.prod(growth[name.split("_")[1]]), dim, cube)
            dim = wide
    draw.conv("vae.encoder.conv_out.conv", LATENT_CHANNELS + 1, dim, cube, gain=2.0)

    blocks = list(reversed(vae["decoder_blocks"]))
    dim = vae["decoder_base_channels"] * math.prod(b.get("multiplier", 1) for _, b in blocks)
    draw.conv("vae.decoder.conv_in.conv", dim, LATENT_CHANNELS, cube, gain=3.0)
    for i, (name, block) in enumerate(blocks):
        key = f"vae.decoder.up_blocks.{i}"
        if name == "res_x":
            _res_blocks(draw, key, block["num_layers"], dim, smooth=True)
        else:
            factors = growth[name.split("_")[1]]
            wide = math.prod(factors) * dim // block["multiplier"]
            draw.smooth_conv(f"{key}.conv.conv", wide, dim, 1.0, factors)
            dim //= block["multiplier"]
    # the patch's sub-pixels are stored width first; both axes grow alike, but the taps must sit on the right axis
    name = "vae.decoder.conv_out.conv"
    draw.smooth_conv(name, 3 * PATCH**2, dim, 0.75, (1, PATCH, PATCH))
    weight = draw.tensors.pop(f"{name}.weight").unflatten(0, (3, PATCH, PATCH))
    draw.put(f"{name}.weight", weight.transpose(1, 2).flatten(0, 2))
    _statistics(draw, "vae")


def draw_audio_vae(draw: Draw, config: dict):
    dd = config["model"]["params"]["ddconfig"]
    square, ch, blocks = (3, 3), dd["ch"], dd["num_res_blocks"]
    widths = [ch * m for m in dd["ch_mult"]]
    levels = len(widths)

    def res(key, n_in, n_out):
        draw.conv(f"{key}.conv1.conv", n_out, n_in, square, gain=1.7)
        draw.conv(f"{key}.conv2.conv", n_out, n_out, square, gain=0.7)
        if n_in != n_out:
            draw.conv(f"{key}.nin_shortcut.conv", n_out, n_in, (1, 1))

    def mid(key, dim):
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


def _low_pass(size: int = 12, cutoff: float = 0.25, half_width: float = 0.3):
    """The Kaiser-windowed sinc of BigVGAN's anti-aliased activations, ratio 2: (1, 1, size), sums to 1."""

    # Kaiser's empirical formula for the window's beta from the attenuation in dB
    attenuation = 2.285 * (size // 2 - 1) * math.pi * 4 * half_width + 7.95
    beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21) if attenuation <= 50 else 0.1102 * (
        attenuation - 8.7
    )  # fmt: skip
    taps = numpy.arange(size) - (size - 1) / 2
    kernel = numpy.kaiser(size, beta) * numpy.sinc(2 * cutoff * taps)
    return torch.from_numpy((kernel / kernel.sum()).reshape(1, 1, size))


def _draw_generator(draw: Draw, key: str, config: dict, gain: float):
    """One BigVGAN-style generator; `gain` scales its waveform."""
    low_pass = _low_pass()

    def activation(name, dim):
        draw.vector(f"{name}.act.alpha", (dim,), 0.3)
        draw.vector(f"{name}.act.beta", (dim,), 0.3)
        draw.put(f"{name}.upsample.filter", low_pass)
        draw.put(f"{name}.downsample.lowpass.filter", low_pass)

    dim = config["upsample_initial_channel"]
    draw.conv(f"{key}.conv_pre", dim, 2 * MEL_BINS, (7,))
    index = 0
    for i, (rate, kernel) in enumerate(zip(config["upsample_rates"], config["upsample_kernel_sizes"])):
        # a transposed convolution: weights are (in, out, k), and k / rate of them meet in one output
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
    # no bias there, and snake activations are mostly positive: taking the mean off each filter keeps the sound
    # from sitting on a constant
    weight = draw.tensors.pop(f"{key}.conv_post.weight").float()
    draw.put(f"{key}.conv_post.weight", weight - weight.mean(-1, keepdim=True))


def draw_vocoder(draw: Draw, config: dict):

    _draw_generator(draw, "vocoder.vocoder", config["vocoder"], gain=0.06)
    _draw_generator(draw, "vocoder.bwe_generator", config["bwe"], gain=0.01)

    # The spectrogram between the two: a DFT under a periodic Hann window (cosines, then minus sines), and triangles
    # on the mel scale (2595 log10(1 + f/700)).
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


def draw_lora(draw: Draw, checkpoint: dict, s: ToyShape):
    """Factors for every linear layer of the transformer, but the connectors, which LoRAs never reach."""
    top = "model.diffusion_model."
    for key, weight in checkpoint.items():
        if not key.startswith(top) or "embeddings_connector" in key or not key.endswith(".weight") or weight.dim() < 2:
            continue
        module = key.removeprefix(top).removesuffix(".weight")
        n_out, n_in = weight.shape
        draw.vector(f"diffusion_model.{module}.lora_A.weight", (s.lora_rank, n_in), 1 / math.sqrt(n_in))
        draw.vector(f"diffusion_model.{module}.lora_B.weight", (n_out, s.lora_rank), 0.03 / math.sqrt(s.lora_rank))


def draw_upsampler(draw: Draw, s: ToyShape):
    cube, dim = (3, 3, 3), s.upsampler_channels

    def norm(key):
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
