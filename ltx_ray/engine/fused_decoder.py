"""The video VAE's decoder with everything between two convolutions done in one pass over the data.

The modules of diffusers norm, activate, pad and add one after the other, and cuDNN adds a bias and moves channels last
and back around every convolution. That makes some twenty reads and writes of data that the convolution needs once. Here
activations stay channels-last. A convolution's bias, the residual, the move of channels to pixels, norm, SiLU and the
padding in time are one step, in plain PyTorch (decode_steps.py) or as a Triton kernel (decode_kernels.py). Both compute
in float32 and round once, which is closer to the exact result than a chain of modules in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ltx_ray.engine.decode_steps import ConvSum, FinishSum, SumOutputs, finish_sum


@dataclass(frozen=True)
class _Step:
    """A convolution (LTX2VideoCausalConv3d of diffusers) and what happens to its input and output.

    `eps`: the input is normed and activated. `starts_residual`: the input, before that, is the residual, which is added
    to the output of the next step that `ends_residual`. `factors`, `width_first`: how channels move, as in ConvSum.
    """

    conv: Any
    eps: float | None = None
    starts_residual: bool = False
    ends_residual: bool = False
    factors: tuple[int, int, int] = (1, 1, 1)
    width_first: bool = False

    def pads(self, causal: bool) -> tuple[int, int]:
        """Frames that are repeated before and after the input."""
        padding = self.conv.kernel_size[0] - 1
        return (padding, 0) if causal else (padding // 2, padding // 2)


def _steps(decoder: Any) -> Iterator[_Step]:
    yield _Step(decoder.conv_in)
    for block in (decoder.mid_block, *decoder.up_blocks):
        for upsampler in getattr(block, "upsamplers", None) or ():
            yield _Step(upsampler.conv, factors=upsampler.stride)
        for resnet in block.resnets:
            yield _Step(resnet.conv1, resnet.norm1.eps, starts_residual=True)
            yield _Step(resnet.conv2, resnet.norm2.eps, ends_residual=True)
    patch = (decoder.patch_size_t, decoder.patch_size, decoder.patch_size)
    yield _Step(decoder.conv_out, decoder.norm_out.eps, factors=patch, width_first=True)


class _FusedForward:
    """Replaces the decoder's `forward`."""

    def __init__(self, decoder: Any, finish: FinishSum, layout: torch.memory_format):
        self.causal, self.steps = decoder.is_causal, list(_steps(decoder))
        self.finish_sum, self.layout = finish, layout

    def __call__(
        self, latents: torch.Tensor, temb: torch.Tensor | None = None, causal: bool | None = None
    ) -> torch.Tensor:
        """Pixels (B, 3, F', H', W'), contiguous, of un-normalised latents (B, C, F, H, W)."""
        assert temb is None
        total, residual = ConvSum(latents.contiguous(memory_format=self.layout)), None
        for step in self.steps:
            sum_layout, pads = self.layout if step.starts_residual else None, step.pads(causal or self.causal)
            sum_out, padded = self.finish_sum(total, SumOutputs(self.layout, sum_layout, pads, step.eps))
            # Tensors are freed once they are read. Of their size, three exist at once, with the convolution's result.
            del total
            if step.starts_residual:
                residual = sum_out
            conv = step.conv.conv
            y = conv._conv_forward(padded, conv.weight, None).contiguous(memory_format=self.layout)
            x = residual if step.ends_residual else None
            total = ConvSum(y, conv.bias, x, step.factors, step.width_first)
            del sum_out, padded, y, x
            if step.ends_residual:
                residual = None
        # The blending of tiles, which follows, reads whole frames.
        pixels, _ = self.finish_sum(total, SumOutputs(self.layout, sum_layout=torch.contiguous_format))
        assert pixels is not None
        return pixels


def fuse_decoder(decoder: Any, channels_last: bool = True) -> bool:
    """Make diffusers' LTX2VideoDecoder3d decode in fused steps, in place.

    Returns False, and changes nothing, when it has parts that the steps do not cover. On CUDA it uses the kernel, and
    raises what importing or compiling that raises. Weights keep their names and values and get the memory format of the
    activations.
    """
    if not _is_supported(decoder):
        return False
    step: FinishSum = finish_sum
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    weight = decoder.conv_in.conv.weight
    if weight.is_cuda:
        from ltx_ray.engine import decode_kernels  # Triton is not installed everywhere.

        step = decode_kernels.finish_sum
        step(ConvSum(weight.new_zeros((1, 1, 1, 1, 1))), SumOutputs(layout, pads=(1, 1)))
    decoder.to(memory_format=layout)
    decoder.forward = _FusedForward(decoder, step, layout)
    return True


def _is_supported(decoder: Any) -> bool:
    """Whether the decoder has no timestep, noise, change of width within a block, residual upsampler, other activation
    or strided convolution. That of LTX-2.3 has none of them."""
    silu = torch.nn.SiLU

    def plain(conv: torch.nn.Conv3d) -> bool:
        return conv.stride == conv.dilation == (1, 1, 1) and conv.groups == 1 and conv.bias is not None

    def plain_resnet(r: Any) -> bool:
        extras = (r.norm3, r.conv_shortcut, r.per_channel_scale1, r.per_channel_scale2, r.scale_shift_table)
        dropped = r.dropout.p and r.training
        norms = r.norm1.channel_dim == r.norm2.channel_dim == 1
        return all(e is None for e in extras) and isinstance(r.nonlinearity, silu) and norms and not dropped

    blocks = [decoder.mid_block, *decoder.up_blocks]
    return (
        decoder.time_embedder is None
        and decoder.scale_shift_table is None
        and isinstance(decoder.conv_act, silu)
        and decoder.norm_out.channel_dim == 1
        and all(b.time_embedder is None and all(map(plain_resnet, b.resnets)) for b in blocks)
        and all(b.conv_in is None for b in decoder.up_blocks)
        and not any(u.residual for b in decoder.up_blocks for u in b.upsamplers or ())
        and all(map(plain, (m for m in decoder.modules() if isinstance(m, torch.nn.Conv3d))))
    )
