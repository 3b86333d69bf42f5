"""Joint training of the audio VAE and the vocoder with bandwidth extension.

The latents carry a tone's phase (`spectrum.analyse` says how), so the decoded sound is compared with the true one
sample by sample, without an adversarial loss.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ltx_ray.miniature import export, measure, sound, spectrum, world
from ltx_ray.miniature.config import ACTIVE_AUDIO, ACTIVE_AUDIO_CHANNELS, AUDIO_BINS, AUDIO_CHANNELS
from scripts.miniature_training.loop import Budget, Trainer

RATE, RATE_OUT = spectrum.SAMPLE_RATE, 48000
#: Standard deviation of the posterior. It is a constant, because nothing samples from the posterior.
_POSTERIOR = 0.1
#: Largest standard deviation of the noise on latents in training, and the fraction of clips that get any.
_NOISE, _NOISY = 0.3, 0.6
#: Steps over which that noise rises from 0.
_NOISE_STEPS = 1000
#: The bandwidth extension is trained in one step out of this many. The world has no sound above 8 kHz for it to add.
_EXTEND_EVERY = 8
#: Number of mel bins below 1,050 Hz. They hold all sounds of the world.
_TONE_BINS = 23


@dataclass(frozen=True)
class TrainingSize:
    """Clips of a batch, numbers of latents of training clips, and number and seconds of clips scored for each sound."""

    batch: int = 32
    latents: tuple[int, ...] = (10, 16, 24)
    scored: int = 8
    scored_seconds: tuple[float, float] = (0.7, 6.0)


FULL = TrainingSize()
SMOKE = TrainingSize(batch=2, latents=(3, 5), scored=1, scored_seconds=(0.4, 0.5))


# --- data --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sounds:
    """A batch of sounds of T latents, with N = 160 (4 T - 3) samples at 16 kHz.

    `source` (B, N + 864) at 16 kHz is the input of the spectrogram and starts 512 samples early. `low` (B, 1, N) at
    16 kHz and `high` (B, 1, 3 N) at 48 kHz are the targets.
    """

    source: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def samples_of(latents: int) -> int:
    """Number of samples at 16 kHz that `latents` latents decode to."""
    return (4 * latents - 3) * spectrum.HOP


def draw_sounds(rng: random.Random, size: TrainingSize, latents: int, device: str) -> Sounds:
    """A random batch. Five in six are sounds of the world; the others are tones and sweeps of other pitch and level."""
    rows = [_draw_sweep(rng, latents) for _ in range(size.batch)]
    return synthesise(np.array(rows), latents, device)


def _draw_sweep(rng: random.Random, latents: int) -> tuple[float, float, float, float]:
    """One random sound: Hz at the start, octaves a second, peak, first phase in turns."""
    seconds = samples_of(latents) / RATE
    phase = rng.random()
    if rng.random() < 5 / 6:
        name = rng.choice(world.SOUNDS)
        if name == "silent":
            return 220.0, 0.0, 0.0, phase
        if name == "rising":  # a part of a clip up to six times as long
            length = seconds * math.exp(rng.uniform(0, math.log(6)))
            octaves = math.log2(sound.RISING[1] / sound.RISING[0]) / length
            return sound.RISING[0] * 2 ** (octaves * rng.uniform(0, length - seconds)), octaves, sound.AMPLITUDE, phase
        return sound.TONES[name], 0.0, sound.AMPLITUDE, phase
    peak = sound.AMPLITUDE * 10 ** rng.uniform(-0.5, 0.3)
    ends = [math.exp(rng.uniform(math.log(200), math.log(950))) for _ in range(2)]
    octaves = math.log2(ends[1] / ends[0]) / seconds if rng.random() < 0.5 else 0.0
    return ends[0], octaves, peak, phase


def synthesise(rows: np.ndarray, latents: int, device: str) -> Sounds:
    """The sounds of `rows` (B, 4), each as _draw_sweep returns it."""
    hertz, octaves, peak, phase = (torch.from_numpy(c).to(device)[:, None] for c in rows.T.astype(np.float64))
    slope = octaves * math.log(2)
    even = slope == 0

    def wave(first: int, count: int, rate: int) -> torch.Tensor:
        time = (torch.arange(count, device=device, dtype=torch.float64) + first) / rate
        turns = torch.where(even, hertz * time, hertz * torch.expm1(slope * time) / torch.where(even, 1.0, slope))
        return (peak * torch.sin(2 * math.pi * (turns + phase))).float()

    samples = samples_of(latents)
    source = wave(-spectrum.FFT // 2, samples + spectrum.FFT - spectrum.HOP, RATE)
    low, high = wave(0, samples, RATE), wave(0, samples * RATE_OUT // RATE, RATE_OUT)
    return Sounds(source, low[:, None], high[:, None])


# --- the model ---------------------------------------------------------------------------------------------------


class AudioTraining(torch.nn.Module):
    """Audio VAE and vocoder, and the losses of a batch of sounds."""

    active: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.vae: Any = export.new_audio_vae()
        self.vocoder: Any = export.new_vocoder()
        with torch.no_grad():
            last = self.vae.encoder.conv_out.conv
            last.weight[ACTIVE_AUDIO_CHANNELS:] = 0
            last.bias[ACTIVE_AUDIO_CHANNELS:AUDIO_CHANNELS] = 0
            last.bias[AUDIO_CHANNELS:] = 2 * math.log(_POSTERIOR)
            self.vae.decoder.conv_in.conv.weight[:, ACTIVE_AUDIO_CHANNELS:] = 0
            self.vocoder.vocoder.conv_out.weight.mul_(0.1)
            self.vocoder.bwe_generator.conv_out.weight.mul_(0.01)
        active = torch.arange(AUDIO_CHANNELS) < ACTIVE_AUDIO_CHANNELS
        self.register_buffer("active", active.float().view(1, -1, 1, 1), persistent=False)

    @torch.no_grad()
    def prepare(self, mel: torch.Tensor) -> None:
        """Adapt the first and last layers to the mean and the standard deviation of spectrograms (B, 2, frames, 64).

        Inputs are then near mean 0 and standard deviation 1. Both channels share their statistics.
        """
        std, mean = torch.std_mean(mel, dim=(0, 1, 2))
        std = std.clamp(min=0.1)
        first = self.vocoder.vocoder.conv_in  # its inputs are ordered (channel, bin)
        first.weight /= std.repeat(2)[:, None]
        first.bias -= (first.weight * mean.repeat(2)[:, None]).sum((1, 2))
        first = self.vae.encoder.conv_in.conv
        first.weight /= 3.0
        first.bias -= first.weight.sum((1, 2, 3)) * mean.mean()
        self.vae.decoder.conv_out.conv.bias.fill_(mean.mean())

    def encode(self, mel: torch.Tensor) -> torch.Tensor:
        """Means of the posterior (B, 8, T, 16) float32 of spectrograms (B, 2, 4 T - 3, 64); unused channels are 0."""
        return self.vae.encoder(mel)[:, :AUDIO_CHANNELS].float() * self.active

    def losses(
        self, sounds: Sounds, generator: torch.Generator, noise: float = 1.0, extend: bool = True
    ) -> dict[str, torch.Tensor]:
        """Named losses. `noise` scales the noise on the latents; `extend` includes the bandwidth extension.

        The vocoder gets the true spectrogram in the first half of the batch and the decoded one in the second.
        """

        def draw(shape: Any, sample: Any = torch.randn) -> torch.Tensor:
            return sample(shape, generator=generator, device=sounds.low.device)

        true = spectrum.analyse(sounds.source)
        latents = self.encode(true)
        used = packed(latents)[..., :ACTIVE_AUDIO].flatten(0, 1)
        std, mean = torch.std_mean(used, dim=0)
        moments = (mean**2 + (std - 1) ** 2).mean()
        each = (latents.shape[0], 1, 1, 1)
        sigma = noise * _NOISE * draw(each, torch.rand) * (draw(each, torch.rand) < _NOISY)
        mel = self.vae.decoder((latents + sigma * draw(latents.shape)) * self.active).float()
        mel_error = (mel - true).abs()
        # The phase of a tone shows in the change from frame to frame.
        phase_error = (mel - true)[..., :_TONE_BINS].diff(dim=2).abs().mean()
        half = len(mel) // 2
        vocoder_input = torch.cat([true[:half], mel[half:]])
        low, want = self.vocoder.vocoder(vocoder_input), sounds.low / sound.AMPLITUDE
        error = low / sound.AMPLITUDE - want
        flat = torch.sqrt(error**2 + 1e-4).mean()
        loudness = (_magnitudes(low / sound.AMPLITUDE) - _magnitudes(want.expand(-1, 2, -1))).abs().mean()
        loss = flat + error.square().mean() + 0.5 * loudness + 0.05 * moments
        result = {
            "loss": loss + 0.2 * mel_error.mean() + 0.6 * mel_error[..., :_TONE_BINS].mean() + 2 * phase_error,
            "true": error[:half].square().mean(),
            "decoded": error[half:].square().mean(),
            "loudness": loudness,
            "phase": phase_error,
            "mel": mel_error[..., :_TONE_BINS].mean(),
            "moments": moments,
        }
        if extend:
            error = (self.vocoder(vocoder_input) - sounds.high) / sound.AMPLITUDE
            result["loss"] = result["loss"] + error.square().mean() + torch.sqrt(error**2 + 1e-4).mean()
        return result


def _magnitudes(wave: torch.Tensor) -> torch.Tensor:
    """Short-time DFT magnitudes of sound (B, 2, samples); a sine of peak 1 has magnitude 1."""
    window = torch.hann_window(512, device=wave.device)
    return torch.stft(wave.flatten(0, 1), 512, 128, window=window, center=False, return_complex=True).abs() / 128


def packed(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, 8, T, 16) as (B, T, 128) in the order of the statistics, channel * 16 + bin."""
    return latents.permute(0, 2, 1, 3).flatten(2)


# --- training ----------------------------------------------------------------------------------------------------


def train(
    folder: Path, budget: Budget, seed: int, device: str, size: TrainingSize, start: Path | None = None
) -> dict[str, float]:
    """Train both parts, export them to `folder/audio.safetensors` and return their score.

    Training resumes from the checkpoint in `folder`. Without one it starts from the exported file `start`, and
    without that from random weights.
    """
    torch.manual_seed(seed)
    training = AudioTraining()
    rng = random.Random(f"audio {seed}")
    training.prepare(spectrum.analyse(draw_sounds(rng, size, size.latents[-1], "cpu").source))
    if start is not None:
        from ltx_ray.engine import components

        training.vae.load_state_dict(load_audio_vae(start).state_dict())
        training.vocoder.load_state_dict(components.load_vocoder(start, torch.float32, "cpu").state_dict())
    trainer = Trainer(training.to(device), folder, budget, rate=2e-3, warmup=300)
    rng = random.Random(f"audio {seed} {trainer.step}")
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + trainer.step)

    def step(number: int) -> dict[str, torch.Tensor]:
        latents = rng.choice(size.latents)
        sounds = draw_sounds(rng, size, latents, device)
        return trainer.module.losses(sounds, generator, min(1.0, number / _NOISE_STEPS), number % _EXTEND_EVERY == 0)

    trainer.run(step, show_every=200 if device.startswith("cuda") else 5)
    path = folder / "audio.safetensors"
    write(trainer.average, path, device, size)
    return score(path, device, size)


@torch.no_grad()
def write(training: AudioTraining, path: Path, device: str, size: TrainingSize) -> None:
    """Measure the latents' statistics over the world's sounds and write the file of both parts."""
    rng = random.Random("statistics")
    values = []
    for name in world.SOUNDS:
        for _ in range(size.scored):
            source = spectrogram_source(name, rng.uniform(0.6, 5.0), rng.random()).to(device)
            values.append(packed(training.encode(spectrum.analyse(source))).flatten(0, 1))
    std, mean = torch.std_mean(torch.cat(values), dim=0)
    used = torch.arange(AUDIO_CHANNELS * AUDIO_BINS, device=device) < ACTIVE_AUDIO
    training.vae.latents_mean.copy_(torch.where(used, mean, 0.0))
    # Without the lower bound, numbers that hardly vary over the world's sounds would be amplified to noise.
    training.vae.latents_std.copy_(torch.where(used, std.clamp(min=0.1), 1.0))
    tensors = export.released_audio_vae(training.vae.state_dict())
    export.save_part(path, {**tensors, **export.released_vocoder(training.vocoder.state_dict())})


def spectrogram_source(name: str, seconds: float, phase: float) -> torch.Tensor:
    """A sound of the world as the spectrogram's input, (1, samples) at 16 kHz, for a clip of `seconds`.

    It covers whole latents. The sound goes on beyond both ends of the clip, so the ends are like the middle.
    """
    latents = max(1, round(seconds * 25))
    octaves = math.log2(sound.RISING[1] / sound.RISING[0]) / seconds if name == "rising" else 0.0
    hertz = sound.TONES.get(name, sound.RISING[0])
    peak = 0.0 if name == "silent" else sound.AMPLITUDE
    return synthesise(np.array([[hertz, octaves, peak, phase]]), latents, "cpu").source


# --- score -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score(path: Path, device: str, size: TrainingSize) -> dict[str, float]:
    """Scores over the world's sounds of the file as the engine loads it, at lengths that training does not use.

    For each sound: the fraction of clips recognised, without and with noise of standard deviation 0.3 on the normalised
    latents; the mean level in dBFS; and for steady tones the mean relative error of pitch. The audio decoder runs in
    bfloat16 on a GPU and in float32 elsewhere, the encoder in float32.
    """
    from ltx_ray.engine import codec, components

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    decoder = components.load_audio_decoder(path, dtype, device)
    vocoder = components.load_vocoder(path, dtype, device)
    encoder = load_audio_vae(path).to(device)
    rng = random.Random("score")
    generator = torch.Generator(device).manual_seed(0)
    result = {}
    for name in world.SOUNDS:
        rows = []
        for _ in range(size.scored):
            seconds = rng.uniform(*size.scored_seconds)
            z = normalised(encoder, spectrogram_source(name, seconds, rng.random()).to(device))
            noise = torch.randn(z.shape, generator=generator, device=device)
            clean, noisy = (
                codec.decode_audio(decoder, vocoder, x.to(dtype))[0].cpu().numpy() for x in (z, z + 0.3 * noise)
            )
            rows.append(_compare(name, clean, noisy))
        for key in rows[0]:
            result[f"{name} {key}"] = float(np.mean([row[key] for row in rows]))
    return result


def load_audio_vae(path: Path) -> Any:
    """The whole audio VAE of a part's file, in float32. The engine loads only its decoder."""
    from safetensors.torch import load_file

    state = load_file(str(path))
    module = export.new_audio_vae()
    keys = list(module.state_dict())
    names = export.released_audio_vae({key: torch.tensor(i) for i, key in enumerate(keys)})
    module.load_state_dict({keys[int(i)]: state[name].float() for name, i in names.items()})
    return module.requires_grad_(False).eval()


def normalised(vae: Any, source: torch.Tensor) -> torch.Tensor:
    """Normalised latents (B, 8, T, 16) of sound (B, samples) at 16 kHz."""
    means = vae.encoder(spectrum.analyse(source))[:, :AUDIO_CHANNELS]
    rows = (packed(means) - vae.latents_mean) / vae.latents_std
    return rows.unflatten(2, (AUDIO_CHANNELS, AUDIO_BINS)).permute(0, 2, 1, 3)


def _compare(name: str, clean: np.ndarray, noisy: np.ndarray) -> dict[str, float]:
    row = {
        "right": float(measure.classify_sound(clean, RATE_OUT) == name),
        "noisy right": float(measure.classify_sound(noisy, RATE_OUT) == name),
        "dBFS": measure.level_dbfs(clean),
    }
    if name in sound.TONES:
        row["pitch error"] = abs(measure.pitch(clean, RATE_OUT) / sound.TONES[name] - 1)
    return row
