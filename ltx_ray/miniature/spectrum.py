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


#: Level of each of the pilot's sines, as a peak, and the highest of their frequencies in Hz.
_PILOT_PEAK, _PILOT_TOP = 0.03, 1000


def with_pilot(waveform: torch.Tensor) -> torch.Tensor:
    """Sound (..., samples) at 16 kHz with the pilot added: what the miniature's audio encoder analyses.

    A spectrogram of a lone tone is the same in every frame and says nothing of the tone's phase, so that no vocoder
    could make another frequency of it than a multiple of the 100 frames a second. The pilot, ten quiet sines at
    multiples of 100 Hz, is itself the same in every frame, and a tone near one of them beats with it.
    """
    time = torch.arange(waveform.shape[-1], device=waveform.device) / SAMPLE_RATE
    pilot = torch.zeros_like(time)
    for number in range(1, _PILOT_TOP * HOP // SAMPLE_RATE + 1):
        # every other one is shifted by a quarter: a tone shows its cosine on one side and its sine on the other
        pilot += torch.cos(2 * math.pi * (number * SAMPLE_RATE / HOP * time - 0.25 * (number % 2)))
    return waveform + _PILOT_PEAK * pilot


@cache
def _tables(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.hann_window(FFT, device=device), mel_filters(MELS, FFT, SAMPLE_RATE).to(device)


def log_mel(waveform: torch.Tensor) -> torch.Tensor:
    """Log-mel spectrogram (..., frames, 64) of sound (..., samples) at 16 kHz.

    Frame i stands for the 1,024 samples from 160 i on; the first is thus centred at sample 512. Nothing is padded.
    """
    window, filters = _tables(str(waveform.device))
    lead = waveform.shape[:-1]
    spectrum = torch.stft(
        waveform.reshape(-1, waveform.shape[-1]).float(), FFT, HOP, window=window, center=False, return_complex=True
    ).abs()
    mel = filters @ spectrum
    return mel.clamp(min=_FLOOR).log().transpose(-1, -2).reshape(*lead, -1, MELS)
