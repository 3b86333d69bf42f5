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
from scripts.miniature_training.graphs import RecordedLosses
from scripts.miniature_training.least_squares import start_vocoder
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
#: Latents that the linear reading takes, and samples of the waveform that it gives for the middle one. A latent covers
#: 640 samples; no sound of the world needs more than every eighth.
_READ_LATENTS, _READ_SAMPLES = 3, 80
#: Steps over which errors of decoded sound gain their full weight.
_RAMP_STEPS = 500


@dataclass(frozen=True)
class TrainingSize:
    """Clips of a batch, numbers of latents of training clips, and number and seconds of clips scored for each sound.

    `fitted` clips of eight latents give the vocoder's initial weights.
    """

    batch: int = 32
    fitted: int = 600
    latents: tuple[int, ...] = (10, 16, 24)
    scored: int = 8
    scored_seconds: tuple[float, float] = (0.7, 6.0)


FULL = TrainingSize()
SMOKE = TrainingSize(batch=2, fitted=100, latents=(3, 5), scored=1, scored_seconds=(0.4, 0.5))


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


def draw_rows(rng: random.Random, count: int, latents: int) -> torch.Tensor:
    """Random sounds (count, 4) float64 as `synthesise` takes them.

    Five in six are sounds of the world; the others are tones and sweeps of other pitch and level.
    """
    return torch.tensor([_draw_sweep(rng, latents) for _ in range(count)], dtype=torch.float64)


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


def synthesise(rows: torch.Tensor, latents: int) -> Sounds:
    """The sounds of `rows` (B, 4) float64: Hz at the start, octaves a second, peak, first phase in turns."""
    hertz, octaves, peak, phase = rows[:, :, None].unbind(1)
    slope = octaves * math.log(2)
    even = slope == 0

    def wave(first: int, count: int, rate: int) -> torch.Tensor:
        time = (torch.arange(count, device=rows.device, dtype=torch.float64) + first) / rate
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
            self.vocoder.bwe_generator.conv_out.weight.mul_(0.01)
        # Reads the waveform off the latents, for a loss alone.
        self.reading = torch.nn.Linear(_READ_LATENTS * ACTIVE_AUDIO, _READ_SAMPLES)
        torch.nn.init.zeros_(self.reading.weight)
        active = torch.arange(AUDIO_CHANNELS) < ACTIVE_AUDIO_CHANNELS
        self.register_buffer("active", active.float().view(1, -1, 1, 1), persistent=False)

    @torch.no_grad()
    def prepare(self, sounds: Sounds) -> None:
        """Adapt the first and last layers to sounds. The vocoder's first layers are solved for by least squares.

        The VAE's inputs are then near mean 0 and standard deviation 1.
        """
        mel = spectrum.analyse(sounds.source)
        std, mean = torch.std_mean(mel, dim=(0, 1, 2))
        first = self.vocoder.vocoder.conv_in  # its inputs are ordered (channel, bin)
        first.weight /= std.clamp(min=0.1).repeat(2)[:, None]
        first.bias -= (first.weight * mean.repeat(2)[:, None]).sum((1, 2))
        start_vocoder(self.vocoder.vocoder, mel, sounds.low)
        first = self.vae.encoder.conv_in.conv
        first.weight /= 3.0
        first.bias -= first.weight.sum((1, 2, 3)) * mean.mean()
        # cuDNN rounds the sums of a bfloat16 convolution before it adds the bias, so a bias far from the values where
        # tones are would cost their last digits.
        self.vae.decoder.conv_out.conv.bias.fill_(mean[:_TONE_BINS].median())

    def encode(self, mel: torch.Tensor) -> torch.Tensor:
        """Means of the posterior (B, 8, T, 16) float32 of spectrograms (B, 2, 4 T - 3, 64); unused channels are 0."""
        return self.vae.encoder(mel)[:, :AUDIO_CHANNELS].float() * self.active

    def losses(
        self, sounds: Sounds, noise: torch.Tensor, ramp: torch.Tensor, extend: bool = True
    ) -> dict[str, torch.Tensor]:
        """Named losses. `noise` (B, 8, T, 16) is added to the latents, and `ramp` is the weight of decoded sound.

        The vocoder gets the true spectrogram in the first half of the batch and the decoded one in the second.
        `extend` includes the bandwidth extension.
        """
        true = spectrum.analyse(sounds.source)
        latents = self.encode(true)
        used = packed(latents)[..., :ACTIVE_AUDIO].flatten(0, 1)
        std, mean = torch.std_mean(used, dim=0)
        moments = (mean**2 + (std - 1) ** 2).mean()
        noisy = (latents + noise) * self.active
        with torch.autocast(noise.device.type, torch.bfloat16, enabled=noise.is_cuda):
            mel = self.vae.decoder(noisy).float()
        mel_error = (mel - true).abs()
        # The phase of a tone shows in the change from frame to frame.
        phase_error = (mel - true)[..., :_TONE_BINS].diff(dim=2).abs().mean()
        half = len(mel) // 2
        # The vocoder hums in silence unless it learns to ignore the rounding of bfloat16 spectrograms.
        vocoder_input = torch.cat([true[:half], mel[half:]]).bfloat16().float()
        weight = torch.cat([torch.ones_like(ramp).expand(half, 1, 1), ramp.expand(len(mel) - half, 1, 1)])
        low, want = self.vocoder.vocoder(vocoder_input), sounds.low / sound.AMPLITUDE
        error = low / sound.AMPLITUDE - want
        loudness = weight[..., None] * (_magnitudes(low / sound.AMPLITUDE) - _magnitudes(want.expand(-1, 2, -1))).abs()
        read = self._reading_error(noisy, want[:, 0])
        loss = (weight * (torch.sqrt(error**2 + 1e-4) + _rounded_square(error))).mean() + 0.5 * loudness.mean()
        loss = loss + read + 0.05 * moments + 0.2 * mel_error.mean() + 0.6 * mel_error[..., :_TONE_BINS].mean()
        result = {
            "loss": loss + 2 * phase_error,
            "true": error[:half].square().mean(),
            "decoded": error[half:].square().mean(),
            "read": read,
            "phase": phase_error,
            "mel": mel_error[..., :_TONE_BINS].mean(),
            "moments": moments,
        }
        if extend:
            error = (self.vocoder(vocoder_input) - sounds.high) / sound.AMPLITUDE
            extended = weight * (torch.sqrt(error**2 + 1e-4) + _rounded_square(error))
            result["loss"] = result["loss"] + extended.mean()
        return result

    def _reading_error(self, latents: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the waveform (B, samples) that a linear map reads off latents (B, 8, T, 16).

        Without this loss the encoder learns the tones' phases one after the other, because the decoder can use none
        before the latents have it.
        """
        windows = packed(latents)[..., :ACTIVE_AUDIO].unfold(1, _READ_LATENTS, 1).flatten(2)
        samples = 4 * spectrum.HOP
        # Latent t covers the samples from 640 t - 480 on.
        pieces = torch.nn.functional.pad(want, (samples - spectrum.HOP, 0)).unfold(1, samples, samples)
        return (self.reading(windows) - pieces[:, 1:-1, :: samples // _READ_SAMPLES]).square().mean()


def _rounded_square(error: torch.Tensor) -> torch.Tensor:
    """The square of errors up to 1, and a line beyond, so that wrong sound at the start does not drown other losses."""
    return 2 * torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none")


def _magnitudes(wave: torch.Tensor) -> torch.Tensor:
    """Short-time DFT magnitudes (B, 2, bins, frames) of sound (B, 2, samples); a sine of peak 1 has magnitude 1."""
    window = torch.hann_window(512, device=wave.device)
    transform = torch.stft(wave.flatten(0, 1), 512, 128, window=window, center=False, return_complex=True)
    return transform.abs().unflatten(0, wave.shape[:2]) / 128


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
    training.prepare(synthesise(draw_rows(rng, size.fitted, 8), 8))
    if start is not None:
        from ltx_ray.engine import components

        training.vae.load_state_dict(load_audio_vae(start).state_dict())
        training.vocoder.load_state_dict(components.load_vocoder(start, torch.float32, "cpu").state_dict())
    trainer = Trainer(training.to(device), folder, budget, rate=2e-3, warmup=300)
    rng = random.Random(f"audio {seed} {trainer.step}")
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + trainer.step)
    recorded = RecordedLosses(trainer.weights.values())

    def step(number: int) -> dict[str, torch.Tensor]:
        latents, extend = rng.choice(size.latents), number % _EXTEND_EVERY == 0

        def losses(rows: torch.Tensor, noise: torch.Tensor, ramp: torch.Tensor) -> dict[str, torch.Tensor]:
            return trainer.module.losses(synthesise(rows, latents), noise, ramp, extend)

        rows = draw_rows(rng, size.batch, latents).to(device)
        noise = draw_noise(generator, size.batch, latents, min(1.0, number / _NOISE_STEPS))
        ramp = torch.tensor(min(1.0, number / _RAMP_STEPS), device=device)
        return recorded((latents, extend), losses, rows, noise, ramp)

    trainer.run(step, show_every=200 if device.startswith("cuda") else 5)
    path = folder / "audio.safetensors"
    write(trainer.average, path, device, size)
    return score(path, device, size)


def draw_noise(generator: torch.Generator, count: int, latents: int, scale: float) -> torch.Tensor:
    """Noise (count, 8, latents, 16) on the generator's device, of another standard deviation for each clip."""

    def draw(sample: Any, *shape: int) -> torch.Tensor:
        return sample(shape, generator=generator, device=generator.device)

    each = (count, 1, 1, 1)
    sigma = scale * _NOISE * draw(torch.rand, *each) * (draw(torch.rand, *each) < _NOISY)
    return sigma * draw(torch.randn, count, AUDIO_CHANNELS, latents, AUDIO_BINS)


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
    return synthesise(torch.tensor([[hertz, octaves, peak, phase]], dtype=torch.float64), latents).source


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
    # As in the engine.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
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
