"""Spectrograms of the audio parts: Slaney's mel scale, Hann windows, magnitudes and their logarithm."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch

#: The audio VAE's spectrogram: frames a second are SAMPLE_RATE / HOP.
SAMPLE_RATE, FFT, HOP, MELS = 16000, 1024, 160, 64
_FLOOR = 1e-5
_LINEAR = 200 / 3  # Hz a mel below 1,000 Hz; above, 27 mels are a factor of 6.4


def _hertz(mels: np.ndarray) -> np.ndarray:
    above = 1000 * np.exp((mels - 15) * math.log(6.4) / 27)
    return np.where(mels < 15, mels * _LINEAR, above)


def mel_filters(mels: int, fft: int, sample_rate: int) -> torch.Tensor:
    """Triangles of equal area, evenly spaced in mels from 0 Hz to half the rate: (mels, fft // 2 + 1) float32."""
    top = 15 + 27 * math.log(sample_rate / 2 / 1000) / math.log(6.4)
    edges = _hertz(np.linspace(0, top, mels + 2))[:, None]
    at = np.linspace(0, sample_rate / 2, fft // 2 + 1)
    low, mid, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.minimum((at - low) / (mid - low), (high - at) / (high - mid)).clip(min=0)
    return torch.from_numpy(triangles * 2 / (high - low)).float()


def stft_basis(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A DFT under a periodic Hann window as (forward, inverse) filters, (size + 2, 1, size) float32 each.

    The first half of the rows are cosines, the second half negative sines.
    """
    bins = np.arange(size // 2 + 1)
    turns = np.outer(bins, np.arange(size)) % size / size
    window = np.hanning(size + 1)[:-1]
    basis = np.concatenate([np.cos(2 * np.pi * turns), -np.sin(2 * np.pi * turns)]) * window
    forward = torch.from_numpy(basis[:, None]).float()
    return forward, forward * (2 / size)


#: Peak of the reference's sines, and where they lie, in bins of the DFT. Every bin from 156 to 1,000 Hz sees one.
_REFERENCE_PEAK, _REFERENCE_BINS = 0.08, range(10, 65, 2)


@cache
def _tables(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Window (1024,), mel filters (64, 513) and the references (2, 1024): cosines, then sines."""
    time = torch.arange(FFT) / FFT
    bins = torch.tensor(_REFERENCE_BINS)[:, None]
    references = torch.stack([torch.cos(2 * math.pi * (bins * time - shift)).sum(0) for shift in (0.0, 0.25)])
    tables = (torch.hann_window(FFT), mel_filters(MELS, FFT, SAMPLE_RATE), _REFERENCE_PEAK * references)
    return tuple(table.to(device) for table in tables)  # type: ignore[return-value]


def analyse(waveform: torch.Tensor) -> torch.Tensor:
    """What the miniature's audio VAE encodes: two log-mel spectrograms (B, 2, frames, 64) of sound (B, samples) at
    16 kHz.

    Frame i stands for the 1,024 samples from 160 i on; nothing is padded. A spectrogram of a lone tone is the same in
    every frame and says nothing of the tone's phase, so that no vocoder could make another frequency of it than a
    multiple of the 100 frames a second. Therefore a reference is added to every frame, always the same: quiet cosines
    in the first channel, sines in the second. Where a tone meets them, the first channel shows the cosine of its
    phase and the second the sine.
    """
    window, filters, references = _tables(str(waveform.device))
    frames = waveform.float().unfold(-1, FFT, HOP)[:, None] + references[:, None]
    magnitudes = torch.fft.rfft(frames * window).abs()
    return (magnitudes @ filters.T).clamp(min=_FLOOR).log()
