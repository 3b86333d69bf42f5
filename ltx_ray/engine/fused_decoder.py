"""The video VAE's decoder with everything between its convolutions done in one pass over the data.

diffusers' modules norm, activate, pad and add one after the other, and cuDNN adds a bias and moves the channels last
and back around every convolution. That is some twenty reads and writes of a picture that the convolution needs once.
Here the activations stay channels last, and a convolution's bias, the residual, the spreading of channels over pixels,
norm, SiLU and the padding in time are one step: plain PyTorch in decode_steps.py, a Triton kernel in decode_kernels.py.
Both compute in float32 and round once, which is closer to exact than the modules' chain in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ltx_ray.engine.decode_steps import ConvSum, FinishSum, SumOutputs, finish_sum


@dataclass(frozen=True)
class _Step:
    """A convolution and what happens to its input.

    `eps`: the input is normed and activated. `opens`: the input, before that, is kept as the residual which is added
    to the output of the next step that `closes`. `factors`, `width_first`: how its channels are spread, as in ConvSum.
    """

    conv: torch.nn.Module  # diffusers' LTX2VideoCausalConv3d
    eps: float | None = None
    opens: bool = False
    closes: bool = False
    factors: tuple[int, int, int] = (1, 1, 1)
    width_first: bool = False

    def pads(self, causal: bool) -> tuple[int, int]:
        more = self.conv.kernel_size[0] - 1
        return (more, 0) if causal else (more // 2, more // 2)


def _steps(decoder: torch.nn.Module) -> Iterator[_Step]:
    yield _Step(decoder.conv_in)
    for block in (decoder.mid_block, *decoder.up_blocks):
        for upsampler in getattr(block, "upsamplers", None) or ():
            yield _Step(upsampler.conv, factors=upsampler.stride)
        for resnet in block.resnets:
            yield _Step(resnet.conv1, resnet.norm1.eps, opens=True)
            yield _Step(resnet.conv2, resnet.norm2.eps, closes=True)
    patch = (decoder.patch_size_t, decoder.patch_size, decoder.patch_size)
    yield _Step(decoder.conv_out, decoder.norm_out.eps, factors=patch, width_first=True)


class _Forward:
    """Takes the place of the decoder's forward."""

    def __init__(self, decoder: torch.nn.Module, finish: FinishSum, layout: torch.memory_format):
        self.causal, self.steps = decoder.is_causal, list(_steps(decoder))
        self.finish_sum, self.layout = finish, layout

    def __call__(
        self, latents: torch.Tensor, temb: torch.Tensor | None = None, causal: bool | None = None
    ) -> torch.Tensor:
        """Pixels (B, 3, F', H', W'), contiguous, of un-normalised latents (B, C, F, H, W)."""
        assert temb is None
        total, x = ConvSum(latents.contiguous(memory_format=self.layout)), None
        for step in self.steps:
            keep, pads = self.layout if step.opens else None, step.pads(causal or self.causal)
            kept, padded = self.finish_sum(total, SumOutputs(self.layout, keep, pads, step.eps))
            # a picture is let go as soon as it is read: with the convolution's result there are three of them
            del total
            if step.opens:
                x = kept
            conv = step.conv.conv
            y = conv._conv_forward(padded, conv.weight, None).contiguous(memory_format=self.layout)
            total = ConvSum(y, conv.bias, x if step.closes else None, step.factors, step.width_first)
            del kept, padded, y
            if step.closes:
                x = None
        # what comes next, the blending of tiles, goes over whole pictures
        return self.finish_sum(total, SumOutputs(self.layout, keep=torch.contiguous_format))[0]


def fuse_decoder(decoder: torch.nn.Module, channels_last: bool = True) -> bool:
    """Let diffusers' LTX2VideoDecoder3d decode as above, in place; False, and nothing is changed, when it has parts
    that the steps above do not know.

    On CUDA with the kernel, and what importing or building it raises. Weights keep their names and values; they are
    laid out as the activations are.
    """
    if not _known(decoder):
        return False
    step: FinishSum = finish_sum
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    weight = decoder.conv_in.conv.weight
    if weight.is_cuda:
        from ltx_ray.engine import decode_kernels  # needs Triton, which is not everywhere

        step = decode_kernels.finish_sum
        step(ConvSum(weight.new_zeros((1, 1, 1, 1, 1))), SumOutputs(layout, pads=(1, 1)))
    decoder.to(memory_format=layout)
    decoder.forward = _Forward(decoder, step, layout)
    return True


def _known(decoder: torch.nn.Module) -> bool:
    """Whether the decoder has no timestep, noise, change of width within a block, residual upsampler, other
    activation or strided convolution. LTX-2.3's has none of them."""
    silu = torch.nn.SiLU

    def plain(conv: torch.nn.Module) -> bool:
        return conv.stride == conv.dilation == (1, 1, 1) and conv.groups == 1 and conv.bias is not None

    def resnet(r: torch.nn.Module) -> bool:
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
        and all(b.time_embedder is None and all(map(resnet, b.resnets)) for b in blocks)
        and all(b.conv_in is None for b in decoder.up_blocks)
        and not any(u.residual for b in decoder.up_blocks for u in b.upsamplers or ())
        and all(map(plain, (m for m in decoder.modules() if isinstance(m, torch.nn.Conv3d))))
    )
