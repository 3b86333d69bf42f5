"""The training of the audio VAE and of the vocoder with bandwidth extension, together.

The latents carry a tone's phase (`spectrum.analyse` says why and how), so the sound that comes back is compared with
the true one sample by sample, and no adversary is needed.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from miniature_training.loop import Budget, Trainer

from ltx_ray.miniature import export, measure, sound, spectrum, world
from ltx_ray.miniature.shape import ACTIVE_AUDIO, ACTIVE_AUDIO_CHANNELS, AUDIO_BINS, AUDIO_CHANNELS

RATE, RATE_OUT = spectrum.SAMPLE_RATE, 48000
_POSTERIOR = 0.1
_NOISE, _NOISY = 0.3, 0.6
#: Steps over which that noise rises from nothing.
_NOISE_STEPS = 1000
#: Each so many steps the second generator, which extends the band, is trained as well. It has little to do here.
_EXTEND_EVERY = 8
#: Mel bins below 1,050 Hz, where the world's sounds are.
_HEARD_BINS = 23


@dataclass(frozen=True)
class Plan:
    """Clips of a batch, latents of a training clip, clips scored for each sound."""

    batch: int = 32
    latents: tuple[int, ...] = (10, 16, 24)
    scored: int = 8


SMOKE = Plan(batch=2, latents=(3, 5), scored=1)


# --- data --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sounds:
    """A batch of sounds of T latents. `heard` (B, samples + 864) at 16 kHz is what is analysed: it starts 512 samples
    early. `low` (B, 1, N) at 16 kHz and `high` (B, 1, 3 N) at 48 kHz are what is to
    come back, N = 160 (4 T - 3)."""

    heard: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def samples_of(latents: int) -> int:
    """Samples at 16 kHz that so many latents decode to."""
    return (4 * latents - 3) * spectrum.HOP


def draw_sounds(rng: random.Random, plan: Plan, latents: int, device: str) -> Sounds:
    """Five in six are the world's sounds; the others are tones and sweeps of other pitch and level."""
    rows = [_draw_sweep(rng, latents) for _ in range(plan.batch)]
    return render(np.array(rows), latents, device)


def _draw_sweep(rng: random.Random, latents: int) -> tuple[float, float, float, float]:
    """(Hz at the start, octaves a second, peak, first phase in turns)."""
    seconds = samples_of(latents) / RATE
    phase = rng.random()
    if rng.random() < 5 / 6:
        name = rng.choice(world.SOUNDS)
        if name == "silent":
            return 220.0, 0.0, 0.0, phase
        if name == "rising":  # some part of a clip that may be longer
            length = seconds * math.exp(rng.uniform(0, math.log(6)))
            octaves = math.log2(sound.RISING[1] / sound.RISING[0]) / length
            return sound.RISING[0] * 2 ** (octaves * rng.uniform(0, length - seconds)), octaves, sound.AMPLITUDE, phase
        return sound.TONES[name], 0.0, sound.AMPLITUDE, phase
    peak = sound.AMPLITUDE * 10 ** rng.uniform(-0.5, 0.3)
    ends = [math.exp(rng.uniform(math.log(200), math.log(950))) for _ in range(2)]
    octaves = math.log2(ends[1] / ends[0]) / seconds if rng.random() < 0.5 else 0.0
    return ends[0], octaves, peak, phase


def render(rows: np.ndarray, latents: int, device: str) -> Sounds:
    """Sounds of (B, 4) rows as _draw_sweep gives them."""
    hertz, octaves, peak, phase = (torch.from_numpy(c).to(device)[:, None] for c in rows.T.astype(np.float64))
    slope = octaves * math.log(2)
    even = slope == 0

    def wave(first: int, count: int, rate: int) -> torch.Tensor:
        time = (torch.arange(count, device=device, dtype=torch.float64) + first) / rate
        turns = torch.where(even, hertz * time, hertz * torch.expm1(slope * time) / torch.where(even, 1.0, slope))
        return (peak * torch.sin(2 * math.pi * (turns + phase))).float()

    samples = samples_of(latents)
    heard = wave(-spectrum.FFT // 2, samples + spectrum.FFT - spectrum.HOP, RATE)
    low, high = wave(0, samples, RATE), wave(0, samples * RATE_OUT // RATE, RATE_OUT)
    return Sounds(heard, low[:, None], high[:, None])


# --- the model ---------------------------------------------------------------------------------------------------


class AudioTraining(torch.nn.Module):
    """Audio VAE and vocoder, and the losses of a batch of sounds."""

    def __init__(self):
        super().__init__()
        self.vae, self.vocoder = export.new_audio_vae(), export.new_vocoder()
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
        """Set fresh weights so that spectrograms like these (B, 2, frames, 64) come in and go out near mean 0 and
        deviation 1. Both channels count alike."""
        std, mean = torch.std_mean(mel, dim=(0, 1, 2))
        std = std.clamp(min=0.1)
        first = self.vocoder.vocoder.conv_in  # takes (channel, bin)
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
        """`noise` scales the noise on the latents, for the first steps of all; `extend` trains the second generator.

        The vocoder works from the true spectrogram in one half of the batch and from the decoded one in the other.
        """

        def draw(shape, sample=torch.randn):
            return sample(shape, generator=generator, device=sounds.low.device)

        true = spectrum.analyse(sounds.heard)
        latents = self.encode(true)
        used = packed(latents)[..., :ACTIVE_AUDIO].flatten(0, 1)
        std, mean = torch.std_mean(used, dim=0)
        moments = (mean**2 + (std - 1) ** 2).mean()
        each = (latents.shape[0], 1, 1, 1)
        sigma = noise * _NOISE * draw(each, torch.rand) * (draw(each, torch.rand) < _NOISY)
        mel = self.vae.decoder((latents + sigma * draw(latents.shape)) * self.active).float()
        apart = (mel - true).abs()
        # a tone's phase is what changes from frame to frame
        turning = (mel - true)[..., :_HEARD_BINS].diff(dim=2).abs().mean()
        half = len(mel) // 2
        taken = torch.cat([true[:half], mel[half:]])
        low, want = self.vocoder.vocoder(taken), sounds.low / sound.AMPLITUDE
        error = low / sound.AMPLITUDE - want
        flat = torch.sqrt(error**2 + 1e-4).mean()
        loudness = (_magnitudes(low / sound.AMPLITUDE) - _magnitudes(want.expand(-1, 2, -1))).abs().mean()
        loss = flat + error.square().mean() + 0.5 * loudness + 0.05 * moments
        result = {
            "loss": loss + 0.2 * apart.mean() + 0.6 * apart[..., :_HEARD_BINS].mean() + 2 * turning,
            "true": error[:half].square().mean(),
            "decoded": error[half:].square().mean(),
            "loudness": loudness,
            "turning": turning,
            "mel": apart[..., :_HEARD_BINS].mean(),
            "moments": moments,
        }
        if extend:
            error = (self.vocoder(taken) - sounds.high) / sound.AMPLITUDE
            result["loss"] = result["loss"] + error.square().mean() + torch.sqrt(error**2 + 1e-4).mean()
        return result


def _magnitudes(wave: torch.Tensor) -> torch.Tensor:
    """Magnitudes of a short DFT of sound (B, 2, samples), in units in which a sine of peak 1 has 1."""
    window = torch.hann_window(512, device=wave.device)
    return torch.stft(wave.flatten(0, 1), 512, 128, window=window, center=False, return_complex=True).abs() / 128


def packed(latents: torch.Tensor) -> torch.Tensor:
    """(B, T, 128) of (B, 8, T, 16), the order of the statistics: channel * 16 + bin."""
    return latents.permute(0, 2, 1, 3).flatten(2)


# --- training ----------------------------------------------------------------------------------------------------


def train(
    folder: Path, budget: Budget, seed: int, device: str, plan: Plan, start: Path | None = None
) -> dict[str, float]:
    """Train both parts from their newest checkpoint, export them to `folder/audio.safetensors` and score them.

    Without a checkpoint they start from the weights of an exported file `start`, without that from fresh ones.
    """
    torch.manual_seed(seed)
    training = AudioTraining()
    rng = random.Random(f"audio {seed}")
    training.prepare(spectrum.analyse(draw_sounds(rng, plan, plan.latents[-1], "cpu").heard))
    if start is not None:
        from ltx_ray.engine import components

        training.vae.load_state_dict(load_audio_vae(start).state_dict())
        training.vocoder.load_state_dict(components.load_vocoder(start, torch.float32, "cpu").state_dict())
    trainer = Trainer(training.to(device), folder, budget, rate=2e-3, warmup=300)
    rng = random.Random(f"audio {seed} {trainer.step}")
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + trainer.step)

    def step(number: int) -> dict[str, torch.Tensor]:
        latents = rng.choice(plan.latents)
        sounds = draw_sounds(rng, plan, latents, device)
        return trainer.module.losses(sounds, generator, min(1.0, number / _NOISE_STEPS), number % _EXTEND_EVERY == 0)

    trainer.run(step, show_every=200 if device.startswith("cuda") else 5)
    path = folder / "audio.safetensors"
    write(trainer.average, path, device, plan)
    return score(path, device, plan)


@torch.no_grad()
def write(training: AudioTraining, path: Path, device: str, plan: Plan) -> None:
    """Measure the latents' statistics over the world's sounds and write the parts' file."""
    rng = random.Random("statistics")
    values = []
    for name in world.SOUNDS:
        for _ in range(plan.scored):
            heard = analysed(name, rng.uniform(0.6, 5.0), rng.random()).to(device)
            values.append(packed(training.encode(spectrum.analyse(heard))).flatten(0, 1))
    std, mean = torch.std_mean(torch.cat(values), dim=0)
    used = torch.arange(AUDIO_CHANNELS * AUDIO_BINS, device=device) < ACTIVE_AUDIO
    training.vae.latents_mean.copy_(torch.where(used, mean, 0.0))
    # a number that hardly varies over the world's sounds must not be blown up into noise
    training.vae.latents_std.copy_(torch.where(used, std.clamp(min=0.1), 1.0))
    tensors = export.released_audio_vae(training.vae.state_dict())
    export.save_part(path, {**tensors, **export.released_vocoder(training.vocoder.state_dict())})


def analysed(name: str, seconds: float, phase: float) -> torch.Tensor:
    """What is analysed of a world's sound, (1, samples): as many whole latents as a clip of `seconds` has.

    The sound goes on before and after the clip, so that its ends are like its middle.
    """
    latents = max(1, round(seconds * 25))
    octaves = math.log2(sound.RISING[1] / sound.RISING[0]) / seconds if name == "rising" else 0.0
    hertz = sound.TONES.get(name, sound.RISING[0])
    peak = 0.0 if name == "silent" else sound.AMPLITUDE
    return render(np.array([[hertz, octaves, peak, phase]]), latents, "cpu").heard


# --- score -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score(path: Path, device: str, plan: Plan) -> dict[str, float]:
    """The world's sounds at lengths not trained on, through the file as the product loads it.

    For each sound: the share of clips that are read as it, mean errors of pitch (as a factor, less 1) and of level
    (dB), and the share with noise of deviation 0.3 on the normalised latents. The audio VAE runs in bfloat16 on a
    GPU. The encoder's weights are the file's, too.
    """
    from ltx_ray.engine import apply, components

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    decoder = components.load_audio_decoder(path, dtype, device)
    vocoder = components.load_vocoder(path, dtype, device)
    encoder = load_audio_vae(path).to(device)
    rng = random.Random("score")
    generator = torch.Generator(device).manual_seed(0)
    result = {}
    for name in world.SOUNDS:
        rows = []
        for _ in range(plan.scored):
            seconds = rng.uniform(0.7, 6.0)
            z = normalised(encoder, analysed(name, seconds, rng.random()).to(device))
            noise = torch.randn(z.shape, generator=generator, device=device)
            clean, noisy = (
                apply.decode_audio(decoder, vocoder, x.to(dtype))[0].cpu().numpy() for x in (z, z + 0.3 * noise)
            )
            rows.append(_compare(name, clean, noisy))
        for key in rows[0]:
            result[f"{name} {key}"] = float(np.mean([row[key] for row in rows]))
    return result


def load_audio_vae(path: Path) -> torch.nn.Module:
    """The whole audio VAE of a part's file, in float32. The product loads its decoder only."""
    from safetensors.torch import load_file

    state = load_file(str(path))
    module = export.new_audio_vae()
    names = export.released_audio_vae({key: torch.tensor(i) for i, key in enumerate(module.state_dict())})
    keys = list(module.state_dict())
    module.load_state_dict({keys[int(i)]: state[name].float() for name, i in names.items()})
    return module.requires_grad_(False).eval()


def normalised(vae: torch.nn.Module, heard: torch.Tensor) -> torch.Tensor:
    """Normalised latents (B, 8, T, 16) of sound (B, samples) at 16 kHz."""
    means = vae.encoder(spectrum.analyse(heard))[:, :AUDIO_CHANNELS]
    rows = (packed(means) - vae.latents_mean) / vae.latents_std
    return rows.unflatten(2, (AUDIO_CHANNELS, AUDIO_BINS)).permute(0, 2, 1, 3)


def _compare(name: str, clean: np.ndarray, noisy: np.ndarray) -> dict[str, float]:
    row = {
        "right": float(measure.sound_of(clean, RATE_OUT) == name),
        "noisy right": float(measure.sound_of(noisy, RATE_OUT) == name),
        "dBFS": measure.level_dbfs(clean),
    }
    if name in sound.TONES:
        row["pitch error"] = abs(measure.pitch(clean, RATE_OUT) / sound.TONES[name] - 1)
    return row
