"""Initial weights of the vocoder by least squares.

The vocoder is linear along the sum of its residual branches: a convolution over seven frames, six upsampling layers and
a last convolution, with one activation before it. A linear map from seven frames of the spectrogram to the waveform of
the middle frame makes the world's sounds with a relative error of a few per cent. These weights compute that map, and
training adds the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from ltx_ray.miniature import sound, spectrum

#: Number of directions of a frame's waveform that are kept. The world's sounds need about 30.
_DIRECTIONS = 40
#: Ridge penalty per frame. Less makes the map exacter, but amplifies the errors of decoded spectrograms.
_RIDGE = 1e-3


@torch.no_grad()
def start_vocoder(vocoder: Any, mel: torch.Tensor, wave: torch.Tensor) -> None:
    """Set the weights of `vocoder` (LTX2Vocoder) so that it maps spectrograms to waveforms linearly.

    `mel` (B, 2, frames, 64) and `wave` (B, 1, 160 frames) are examples. Channels that the map does not use keep their
    weights, and no layer lets them into the map.
    """
    weight, bias, basis = _fit(vocoder.conv_in.kernel_size[0], mel, wave[:, 0] / sound.AMPLITUDE)
    first = vocoder.conv_in
    first.weight[:_DIRECTIONS] = weight
    first.bias[:_DIRECTIONS] = bias
    # The waveform of a frame is cut into shorter and shorter pieces, whose samples are the channels of a layer.
    pieces, held = basis, _DIRECTIONS
    for layer in vocoder.upsamplers:
        stride, middle = layer.stride[0], layer.padding[0]
        samples = pieces.shape[1] // stride
        layer.weight[:, :samples] = 0
        layer.bias[:samples] = 0
        for piece in range(stride):
            layer.weight[:held, :samples, middle + piece] = pieces[:, piece * samples : (piece + 1) * samples]
        pieces, held = torch.eye(samples), samples
    # The activation adds an even function of its input, which cancels in the difference of a signal and its negative.
    layer.weight[:, 1] = -layer.weight[:, 0]
    layer.bias[1] = 0
    vocoder.conv_out.weight.zero_()
    vocoder.conv_out.weight[:, 0, 3] = sound.AMPLITUDE / 2
    vocoder.conv_out.weight[:, 1, 3] = -sound.AMPLITUDE / 2
    for block in vocoder.resnets:
        for conv in block.convs2:
            conv.weight.zero_()
            conv.bias.zero_()


def _fit(frames: int, mel: torch.Tensor, wave: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A map from `frames` frames to a frame's waveform, as two factors.

    Returns weight (directions, 128, frames) and bias (directions,) of a convolution, and basis (directions, 160) from
    its outputs to samples. Frames beyond both ends are zeros, as a convolution pads them.
    """
    channels = mel.permute(0, 2, 1, 3).flatten(2)
    middle = frames // 2
    x = functional.pad(channels, (0, 0, middle, middle)).unfold(1, frames, 1).flatten(2).flatten(0, 1).double()
    y = wave.unfold(-1, spectrum.HOP, spectrum.HOP).flatten(0, 1).double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    centred = x - x_mean
    square = centred.T @ centred + _RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    solution = torch.linalg.solve(square, centred.T @ (y - y_mean))
    offset = y_mean - x_mean @ solution
    values, vectors = torch.linalg.eigh((x @ solution + offset).T @ (x @ solution + offset) / len(x))
    basis = vectors[:, -_DIRECTIONS:] * values[-1].sqrt()  # The outputs of the convolution stay below 1 or so.
    into = vectors[:, -_DIRECTIONS:] / values[-1].sqrt()
    weight = (solution @ into).T.unflatten(1, (channels.shape[2], frames))
    return weight.float(), (offset @ into).float(), basis.T.float()
