"""Log-mel spectrograms for the audio VAE, and the fixed bases of the vocoder's second spectrogram.

The mel scale is Slaney's (Auditory Toolbox, 1998), and windows are periodic Hann windows.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch

#: The audio VAE's spectrogram. It has SAMPLE_RATE / HOP = 100 frames a second.
SAMPLE_RATE, FFT, HOP, MELS = 16000, 1024, 160, 64
#: Least magnitude before the logarithm.
_FLOOR = 1e-5
#: Hz of one mel below 1,000 Hz. Above, 27 mels are a factor of 6.4.
_LINEAR = 200 / 3


def _hertz(mels: np.ndarray) -> np.ndarray:
    above = 1000 * np.exp((mels - 15) * math.log(6.4) / 27)
    return np.where(mels < 15, mels * _LINEAR, above)


def mel_filters(mels: int, fft: int, sample_rate: int) -> torch.Tensor:
    """Triangular filters (mels, fft // 2 + 1) float32 of equal area, evenly spaced in mels from 0 Hz to Nyquist."""
    top = 15 + 27 * math.log(sample_rate / 2 / 1000) / math.log(6.4)
    edges = _hertz(np.linspace(0, top, mels + 2))[:, None]
    at = np.linspace(0, sample_rate / 2, fft // 2 + 1)
    low, mid, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.minimum((at - low) / (mid - low), (high - at) / (high - mid)).clip(min=0)
    return torch.from_numpy(triangles * 2 / (high - low)).float()


def stft_basis(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and inverse filters, (size + 2, 1, size) float32 each, of a DFT under a periodic Hann window.

    The first half of the rows holds cosines and the second half negative sines.
    """
    bins = np.arange(size // 2 + 1)
    turns = np.outer(bins, np.arange(size)) % size / size
    window = np.hanning(size + 1)[:-1]
    basis = np.concatenate([np.cos(2 * np.pi * turns), -np.sin(2 * np.pi * turns)]) * window
    forward = torch.from_numpy(basis[:, None]).float()
    return forward, forward * (2 / size)


#: Peak of each sinusoid of the reference, and their DFT bins. They cover 156 to 1,000 Hz.
_REFERENCE_PEAK, _REFERENCE_BINS = 0.08, range(10, 65, 2)


@cache
def _tables(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Window (1024,), mel filters (64, 513) and references (2, 1024): a sum of cosines and a sum of sines."""
    time = torch.arange(FFT) / FFT
    bins = torch.tensor(_REFERENCE_BINS)[:, None]
    references = torch.stack([torch.cos(2 * math.pi * (bins * time - shift)).sum(0) for shift in (0.0, 0.25)])
    tables = (torch.hann_window(FFT), mel_filters(MELS, FFT, SAMPLE_RATE), _REFERENCE_PEAK * references)
    window, filters, reference = (table.to(device) for table in tables)
    return window, filters, reference


def analyse(waveform: torch.Tensor) -> torch.Tensor:
    """Log-mel spectrograms (B, 2, frames, 64), the audio VAE's input, of sound (B, samples) at 16 kHz.

    Frame i covers the 1,024 samples from 160 i on; nothing is padded. The spectrogram of a steady tone alone would be
    the same in every frame and lack the tone's phase, and from it a vocoder could make only multiples of the frame
    rate, 100 Hz. A fixed reference is therefore added to every frame: quiet cosines in the first channel, sines in
    the second. The first channel then depends on the cosine of a tone's phase and the second on the sine.
    """
    window, filters, references = _tables(str(waveform.device))
    frames = waveform.float().unfold(-1, FFT, HOP)[:, None] + references[:, None]
    magnitudes = torch.fft.rfft(frames * window).abs()
    return (magnitudes @ filters.T).clamp(min=_FLOOR).log()
