"""Training of the latent upsampler on pairs of latents of one clip, at half and at whole size.

A pair is what the engine has before and after its upsampling: the clip drawn at half the height and width, which is
what stage 1 renders, and drawn at the whole size, both encoded by the trained video VAE. The VAE stays as it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ltx_ray.miniature import export, measure, picture, world
from ltx_ray.miniature.config import ACTIVE_VIDEO, upsampler_config
from scripts.miniature_training import video
from scripts.miniature_training.graphs import RecordedLosses
from scripts.miniature_training.loop import Budget, Trainer, chunks, weights_of

#: Largest standard deviation of the noise on the half-size latents, and the fraction of clips that get any. A DiT's
#: latents are not exact.
_NOISE, _NOISY = 0.3, 0.7
#: Factor of the first convolution's initial weights.
_SMALL = 0.05
#: Whole sizes (frames, height, width), multiples of 64; repeated ones are drawn more often.
_SIZES = (
    *[(33, 256, 384)] * 6,
    *[(33, 128, 192)] * 2,
    (33, 384, 256),
    (17, 256, 256),
    (9, 320, 448),
    (65, 192, 128),
    (121, 128, 192),
    (1, 256, 384),
    (9, 512, 768),
)
_SCORED = ((33, 256, 384), (33, 128, 192))


@dataclass(frozen=True)
class TrainingSize:
    """Pixels (frames x height x width, at the whole size) of a batch, and the part of it that is decoded as well.

    `sizes` are drawn in training; `scored` clips are scored at each of `scored_sizes`.
    """

    pixels: int = 26_000_000
    decoded: float = 0.34
    scored: int = 48
    sizes: tuple[tuple[int, int, int], ...] = _SIZES
    scored_sizes: tuple[tuple[int, int, int], ...] = _SCORED


FULL = TrainingSize()
SMOKE = TrainingSize(
    pixels=2 * 9 * 64 * 128, scored=2, sizes=((9, 64, 128), (1, 128, 64)), scored_sizes=((9, 64, 128),)
)


class UpsamplerTraining(torch.nn.Module):
    """The upsampler, and the losses of a batch of pairs.

    `vae` is the trained VAE, frozen, which is no part of the module. Latents are normalised unless it says otherwise.
    """

    mean: torch.Tensor
    std: torch.Tensor
    active: torch.Tensor

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.upsampler: Any = export.new_upsampler()
        self.decoder: list[Any] = [vae.decoder]  # in a list, so that it is no child
        self.encoder: list[Any] = [vae.encoder]
        shape = (1, -1, 1, 1, 1)
        self.register_buffer("mean", vae.latents_mean.detach().float().view(shape), persistent=False)
        self.register_buffer("std", vae.latents_std.detach().float().view(shape), persistent=False)
        active = torch.arange(self.mean.numel()) < ACTIVE_VIDEO
        self.register_buffer("active", active.float().view(shape), persistent=False)
        with torch.no_grad():
            self._start()

    def _start(self) -> None:
        """Clear the weights of unused channels, and begin with a first convolution that gives small values.

        Weights that are 0 and get no gradient stay exactly 0. Noise in unused input channels therefore changes nothing,
        and unused output channels are exactly 0: stage 2 must find there what the DiT is trained on, noise over zeros.

        With 32 channels, the norms' 32 groups have a single channel each, and so norm each channel over the clip. Where
        its variance is far above the norm's eps, only signs and ratios of what a clip shows remain. From small values
        the norm subtracts the mean and keeps the sizes.
        """
        u = self.upsampler
        u.initial_conv.weight[:, ACTIVE_VIDEO:] = 0
        u.initial_conv.weight.mul_(_SMALL)
        u.final_conv.weight[ACTIVE_VIDEO:] = 0
        u.final_conv.bias[ACTIVE_VIDEO:] = 0

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised latents (B, 128, F', H', W') float32 of pixels (B, 3, F, H, W) in [-1, 1]."""
        means = self.encoder[0](pixels)[:, : self.mean.numel()].float()
        return (means - self.mean) / self.std * self.active

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, F, H, W) float32 in about [-1, 1] of normalised latents."""
        return self.decoder[0](latents * self.std + self.mean).float()

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, 128, F', H', W') at twice their height and width, as `engine.codec.upsample_latents`."""
        latents = latents * self.active
        out = self.upsampler(latents * self.std + self.mean).float()
        return (out - self.mean) / self.std * self.active

    def losses(
        self, small: torch.Tensor, large: torch.Tensor, noise: torch.Tensor, decoded: int
    ) -> dict[str, torch.Tensor]:
        """Named losses of pixels at half (B, 3, F, H/2, W/2) and whole size (B, 3, F, H, W).

        `noise` is added to the half-size latents. The first `decoded` clips are compared as pixels too, because equal
        errors of latents are not equally visible.
        """
        start, goal = self.encode(small), self.encode(large)
        out = self(start + noise)
        error = (out - goal)[:, :ACTIVE_VIDEO]
        latent = error.square().mean()
        losses = {"latent": latent}
        loss = latent
        if decoded:
            pixels = large[:decoded]
            off = self.decode(out[:decoded]) - pixels
            weight = video.edge_weights(pixels)
            flat = (weight * torch.sqrt(off**2 + 1e-4)).mean()
            loss = latent + flat + 2 * (weight * off.square()).mean()
            losses |= {"l1": off.abs().mean(), "mse": off.square().mean()}
        return {"loss": loss, **losses}


# --- training ----------------------------------------------------------------------------------------------------


def train(
    folder: Path, budget: Budget, seed: int, device: str, size: TrainingSize, start: Path | None = None
) -> dict[str, float]:
    """Train the upsampler, export it to `folder/upsampler.safetensors` and return its score.

    Training resumes from the checkpoint in `folder`. Without one it starts from the exported file `start`, and
    without that from random weights. The video VAE is that of a training beside `folder`, or else the shipped one.
    """
    from ltx_ray.engine import components

    torch.manual_seed(seed)
    weights = weights_of("vae", folder)
    vae = components.load_video_vae(weights, torch.float32, device, part="both")
    training = UpsamplerTraining(vae).to(device)
    if device.startswith("cuda"):
        _channels_last(training)
    if start is not None:
        exported = components.load_upsampler(start, torch.float32, device)
        training.upsampler.load_state_dict(exported.state_dict())
    trainer = Trainer(training, folder, budget, rate=1e-3, warmup=300, decay=0.8, muon_rate=0.01)
    rng = random.Random(f"upsampler {seed} {trainer.step}")
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + trainer.step)
    recorded = RecordedLosses(trainer.weights.values())

    def losses_of(decoded: int) -> Callable[..., dict[str, torch.Tensor]]:
        def losses(small: torch.Tensor, large: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
            with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
                return training.losses(small, large, noise, decoded)

        return losses

    def step(number: int) -> dict[str, torch.Tensor]:
        frames, height, width = rng.choice(size.sizes)
        batch = max(1, size.pixels // (frames * height * width))
        clips = [video.draw_training_clip(rng, width / height) for _ in range(batch)]
        small = picture.draw_frames(clips, frames, height // 2, width // 2, device)
        large = picture.draw_frames(clips, frames, height, width, device)
        noise = video.draw_noise(generator, small.shape, _NOISE, _NOISY)
        decoded = round(size.decoded * batch)
        return recorded((frames, height, width), losses_of(decoded), small, large, noise)

    trainer.run(step, show_every=200 if device.startswith("cuda") else 5)
    path = folder / "upsampler.safetensors"
    export.save_part(path, trainer.average.upsampler.state_dict(), upsampler_config())
    return score(path, weights, device, size, folder)


def _channels_last(module: torch.nn.Module) -> None:
    """Lay the weights of 3-D convolutions out channels last. `Module.to` refuses a module that has 2-D ones as well."""
    for weight in module.parameters():
        if weight.dim() == 5:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)


# --- score -------------------------------------------------------------------------------------------------------


def score(path: Path, weights: Path, device: str, size: TrainingSize, pictures: Path | None = None) -> dict[str, float]:
    """Scores over held-out clips of the file as the engine loads it, in bfloat16 on a GPU and float32 elsewhere.

    `weights` is the file of the video VAE.

    PSNR, in dB, compares the decoded upsampled latents with the decoded true ones. Colour errors are in sRGB units,
    shape is the fraction of frames (first, middle, last) that are read correctly. "true" are the decoded true latents,
    "bilinear" the half-size latents enlarged without an upsampler, and "noisy" has noise of standard deviation 0.3 in
    all 128 channels of the half-size latents. With `pictures`, a folder, one contact sheet a size is written there.
    """
    from ltx_ray.engine import codec, components

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    vae = components.load_video_vae(weights, dtype, device, part="both")
    upsampler = components.load_upsampler(path, dtype, device)
    mean, std = (x.to(device, dtype) for x in components.latent_stats(weights))
    generator = torch.Generator(device).manual_seed(0)
    result = {}
    for frames, height, width in size.scored_sizes:
        rng = random.Random(f"score upsampler {height}x{width}")
        clips = [world.draw_clip(rng, "held_out", width / height) for _ in range(size.scored)]
        rows: list[dict[str, float]] = []
        sheet: list[np.ndarray] = []
        for part in chunks(len(clips), 8):
            shown = [clips[i] for i in part]
            start = codec.encode_video(vae, picture.draw_frames(shown, frames, height // 2, width // 2, device))
            goal = codec.encode_video(vae, picture.draw_frames(shown, frames, height, width, device))
            noise = torch.randn(start.shape, generator=generator, device=device, dtype=torch.float32)
            noisy = (start.float() + 0.3 * noise).to(dtype)
            latents = {
                "true": goal,
                "upsampled": codec.upsample_latents(upsampler, mean, std, start),
                "noisy": codec.upsample_latents(upsampler, mean, std, noisy),
                "bilinear": _bilinear(start, goal),
            }
            drawn = {name: codec.decode_video_tile(vae, x).float() for name, x in latents.items()}
            for row, i in enumerate(part):
                seen = {name: video.to_bytes(x[row]) for name, x in drawn.items()}
                rows.append(_compare(clips[i], seen))
                if i < 8:
                    picked = [0, frames // 2, frames - 1]
                    sheet.append(np.concatenate([f for x in seen.values() for f in x[picked]], axis=1))
            used = (latents["upsampled"] - goal)[:, :ACTIVE_VIDEO].float().square().mean((1, 2, 3, 4)).tolist()
            for scored, value in zip(rows[-len(used) :], used, strict=True):
                scored["latent error"] = value
        for name in rows[0]:
            result[f"{height}x{width} {name}"] = float(np.mean([row[name] for row in rows]))
        if pictures is not None:
            from PIL import Image

            Image.fromarray(np.concatenate(sheet)).save(pictures / f"upsampler-{height}x{width}.png")
    return result


def _bilinear(start: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    flat = start.transpose(1, 2).flatten(0, 1).float()
    grown = torch.nn.functional.interpolate(flat, size=goal.shape[-2:], mode="bilinear")
    return grown.unflatten(0, (len(start), -1)).transpose(1, 2).to(goal.dtype)


def _compare(clip: world.Clip, seen: dict[str, np.ndarray]) -> dict[str, float]:
    """Scores of one clip, by name. `seen` are frames (F, H, W, 3) uint8."""
    row = {}
    for name, frames in seen.items():
        if name != "true":
            row[f"{name} psnr"] = video.psnr(seen["true"], frames)
        read = [measure.read_frame(frames[i]) for i in (0, len(frames) // 2, len(frames) - 1)]
        ground, ink = (np.asarray(world.COLOURS[x]) for x in (clip.scene.ground, clip.scene.colour))
        row[f"{name} ground error"] = float(abs(read[1].ground - ground).max())
        row[f"{name} colour error"] = float(abs(read[1].colour - ink).max()) if read[1].colour is not None else 255.0
        row[f"{name} shape"] = float(np.mean([r.shape == clip.scene.shape for r in read]))
    return row
