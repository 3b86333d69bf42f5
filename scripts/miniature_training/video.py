"""Training of the video VAE on clips of the miniature's world.

The latents must suit a diffusion model. They are kept near mean 0 and standard deviation 1, the decoder gets them with
noise added, and only some of the 128 channels are used (`ltx_ray/miniature/config.py` says why).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ltx_ray.miniature import export, measure, picture, world
from ltx_ray.miniature.config import ACTIVE_VIDEO, LATENT_CHANNELS
from scripts.miniature_training.graphs import RecordedLosses
from scripts.miniature_training.loop import Budget, Trainer, chunks

#: Standard deviation of the posterior. It is a constant, because nothing samples from the posterior.
_POSTERIOR = 0.1
#: Largest standard deviation of the noise on latents in training, and the fraction of clips that get any.
_NOISE, _NOISY = 0.25, 0.5
#: Steps over which that noise rises from 0.
_NOISE_STEPS = 1000
#: Training sizes (frames, height, width); repeated ones are drawn more often. They are few because a graph is recorded
#: for each.
_SIZES = (
    *[(33, 128, 192)] * 10,
    *[(33, 256, 384)] * 4,
    (25, 192, 128),
    (17, 384, 256),
    (9, 320, 448),
    (49, 160, 96),
    (1, 256, 384),
    (65, 64, 128),
)
_SCORED = ((33, 128, 192), (33, 256, 384))


@dataclass(frozen=True)
class TrainingSize:
    """Pixels (frames x height x width) of a batch, training sizes, and the clips scored at each of `scored_sizes`."""

    pixels: int = 10_000_000
    scored: int = 32
    sizes: tuple[tuple[int, int, int], ...] = _SIZES
    scored_sizes: tuple[tuple[int, int, int], ...] = _SCORED


FULL = TrainingSize()
SMOKE = TrainingSize(pixels=2 * 9 * 64 * 96, scored=2, sizes=((9, 64, 96), (1, 64, 64)), scored_sizes=((9, 64, 96),))


class VideoTraining(torch.nn.Module):
    """The VAE and the losses of a batch of pixels (B, 3, F, H, W) in [-1, 1]."""

    active: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.vae: Any = export.new_video_vae()
        with torch.no_grad():
            last = self.vae.encoder.conv_out.conv
            last.weight[ACTIVE_VIDEO:] = 0
            last.bias[ACTIVE_VIDEO:] = 0
            last.bias[-1] = 2 * math.log(_POSTERIOR)
            self.vae.decoder.conv_in.conv.weight[:, ACTIVE_VIDEO:] = 0
        active = torch.arange(LATENT_CHANNELS) < ACTIVE_VIDEO
        self.register_buffer("active", active.float().view(1, -1, 1, 1, 1), persistent=False)

    @torch.no_grad()
    def prepare(self, pixels: torch.Tensor) -> None:
        """Scale the random weights so that each convolution's outputs have standard deviation 1 on these pixels.

        With PyTorch's initial weights the signal fades from layer to layer below the latents' noise, and training takes
        a thousand steps to learn a first colour. Residual blocks start as the identity, and all pixels that one input
        position is spread over start with the same weights.
        """
        encoder, decoder = self.vae.encoder, self.vae.decoder
        upsamplers = [block.upsamplers[0] for block in decoder.up_blocks]
        for block in (encoder.mid_block, *encoder.down_blocks, decoder.mid_block, *decoder.up_blocks):
            for resnet in block.resnets:
                resnet.conv2.conv.weight.zero_()
                resnet.conv2.conv.bias.zero_()
        spread = [(u.conv.conv, math.prod(u.stride)) for u in upsamplers] + [(decoder.conv_out.conv, 16)]
        for conv, copies in spread:
            for values in (conv.weight, conv.bias):
                values.copy_(values[::copies].repeat_interleave(copies, 0))
        scaled = [encoder.conv_in.conv, *(block.downsamplers[0].conv.conv for block in encoder.down_blocks)]
        scaled += [encoder.conv_out.conv, decoder.conv_in.conv, *(conv for conv, _ in spread)]
        hooks = [conv.register_forward_hook(_standardise) for conv in scaled]
        for hook in hooks:
            self.vae.decoder(self.encode(pixels))
            hook.remove()
        decoder.conv_out.conv.weight.mul_(0.3)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Means of the posterior (B, 128, F', H', W') float32, not normalised; unused channels are 0."""
        return self.vae.encoder(pixels)[:, :LATENT_CHANNELS].float() * self.active

    def losses(self, pixels: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """Named losses of pixels (B, 3, F, H, W); `noise` (B, 128, F', H', W') is added to the latents."""
        latents = self.encode(pixels)
        used = latents[:, :ACTIVE_VIDEO].transpose(0, 1).flatten(1)
        std, mean = torch.std_mean(used, dim=1)
        moments = (mean**2 + (std - 1) ** 2).mean()
        noisy = (latents + noise) * self.active
        out = self.vae.decoder(noisy).float()
        error = out - pixels
        weight = edge_weights(pixels)
        flat = (weight * torch.sqrt(error**2 + 1e-4)).mean()
        slopes = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        if pixels.shape[2] > 1:
            slopes = slopes + error.diff(dim=2).abs().mean()
        return {
            "loss": flat + 2 * (weight * error.square()).mean() + 0.5 * slopes + 0.05 * moments,
            "l1": error.abs().mean(),
            "mse": error.square().mean(),
            "moments": moments,
        }


@torch.no_grad()
def edge_weights(pixels: torch.Tensor) -> torch.Tensor:
    """Weight of the error at each pixel (B, 1, F, H, W): 1, and more within 4 pixels of an edge.

    Corners have few pixels. With equal weights, a blob of the right colour has almost as small a loss as a star. All
    edges of a clip together weigh as much as all its pixels, so that small objects count as much as large ones.
    """
    frames = pixels.transpose(1, 2).flatten(0, 1)
    steps = torch.nn.functional.pad(frames.diff(dim=-1).abs().amax(1, keepdim=True), (0, 1))
    steps = steps.maximum(torch.nn.functional.pad(frames.diff(dim=-2).abs().amax(1, keepdim=True), (0, 0, 0, 1)))
    near = torch.nn.functional.max_pool2d((steps > 0.1).float(), 9, stride=1, padding=4)
    near = near.unflatten(0, (pixels.shape[0], -1)).transpose(1, 2)
    return 1 + near / near.mean(dim=(1, 2, 3, 4), keepdim=True).clamp(min=0.02)


def _standardise(conv: torch.nn.Conv3d, _: Any, out: torch.Tensor) -> torch.Tensor:
    """A forward hook that scales a convolution so that its outputs have mean 0 and standard deviation 1.

    Outputs whose weights are all 0 are unused and stay as they are.
    """
    assert conv.bias is not None
    std, mean = torch.std_mean(out.transpose(0, 1).flatten(1), dim=1)
    used = conv.weight.flatten(1).any(1)
    factor = torch.where(used, 1 / std.clamp(min=1e-3), 1.0)
    mean = torch.where(used, mean, 0.0)
    conv.weight.mul_(factor.view(-1, 1, 1, 1, 1))
    conv.bias.sub_(mean).mul_(factor)
    each = (1, -1, 1, 1, 1)
    return (out - mean.view(each)) * factor.view(each)


# --- data --------------------------------------------------------------------------------------------------------


def draw_training_clip(rng: random.Random, aspect: float) -> world.Clip:
    """A training clip. One in five is zoomed in and cut in time, as parts of larger and longer videos.

    Nearly half of them show stars, which have the finest details.
    """
    scene = rng.choice(_stars()) if rng.random() < 1 / 4 else None
    clip = world.draw_clip(rng, "train", aspect, scene)
    if rng.random() < 4 / 5:
        return clip
    zoom, first = math.exp(rng.uniform(0, math.log(5))), rng.random()
    last = first + (1 - first) * rng.random()

    def mixed(a: float, b: float, at: float) -> float:
        return a + (b - a) * at

    ends = [[mixed(a, b, t) for a, b in zip(clip.start, clip.end)] for t in (first, last)]
    sizes = [mixed(clip.start_size, clip.end_size, t) for t in (first, last)]
    # The window's centre lies near the object's, so that usually some of the object's edge is inside.
    centre = [mixed(a, b, 0.5) + rng.uniform(-0.25, 0.25) for a, b in zip(*ends)]
    (x0, y0), (x1, y1) = ([0.5 + (a - c) * zoom for a, c in zip(end, centre)] for end in ends)
    return replace(clip, start=(x0, y0), end=(x1, y1), start_size=sizes[0] * zoom, end_size=sizes[1] * zoom)


@cache
def _stars() -> tuple[world.Scene, ...]:
    return tuple(scene for scene in world.scenes("train") if scene.shape == "star")


# --- training ----------------------------------------------------------------------------------------------------


def train(
    folder: Path, budget: Budget, seed: int, device: str, size: TrainingSize, start: Path | None = None
) -> dict[str, float]:
    """Train the video VAE, export it to `folder/vae.safetensors` and return its score.

    Training resumes from the checkpoint in `folder`. Without one it starts from the exported file `start`, and
    without that from random weights.
    """
    torch.manual_seed(seed)
    training = VideoTraining().to(device)
    rng = random.Random(f"video {seed}")
    frames, height, width = size.sizes[0]
    clips = [draw_training_clip(rng, width / height) for _ in range(8)]
    training.prepare(picture.draw_frames(clips, frames, height, width, device))
    if start is not None:
        from ltx_ray.engine import components

        exported = components.load_video_vae(start, torch.float32, device, part="both")
        # Residual blocks that the file lacks stay the identity.
        training.vae.load_state_dict({**training.vae.state_dict(), **exported.state_dict()})
    if device.startswith("cuda"):
        # torch's stubs lack this overload.
        training = training.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    trainer = Trainer(training, folder, budget, rate=1e-3, warmup=300, decay=0.8, muon_rate=0.01)
    rng = random.Random(f"video {seed} {trainer.step}")
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + trainer.step)
    recorded = RecordedLosses(trainer.weights.values())

    def losses(pixels: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
            return training.losses(pixels, noise)

    def step(number: int) -> dict[str, torch.Tensor]:
        frames, height, width = rng.choice(size.sizes)
        batch = max(1, size.pixels // (frames * height * width))
        clips = [draw_training_clip(rng, width / height) for _ in range(batch)]
        pixels = picture.draw_frames(clips, frames, height, width, device)
        noise = draw_noise(generator, pixels.shape, _NOISE * min(1.0, number / _NOISE_STEPS))
        return recorded((frames, height, width), losses, pixels, noise)

    trainer.run(step, show_every=200 if device.startswith("cuda") else 5)
    path = folder / "vae.safetensors"
    write(trainer.average, path, device, size)
    return score(path, device, size, folder)


def draw_noise(
    generator: torch.Generator, pixels: Sequence[int], largest: float, noisy: float = _NOISY
) -> torch.Tensor:
    """Noise for the latents of pixels of shape (B, 3, F, H, W).

    Its standard deviation is another for each clip, at most `largest`, and 0 but for the fraction `noisy` of the clips.
    """

    def draw(sample: Any, *shape: int) -> torch.Tensor:
        return sample(shape, generator=generator, device=generator.device)

    count, _, frames, height, width = pixels
    each = (count, 1, 1, 1, 1)
    sigma = largest * draw(torch.rand, *each) * (draw(torch.rand, *each) < noisy)
    return sigma * draw(torch.randn, count, LATENT_CHANNELS, (frames + 7) // 8, height // 32, width // 32)


@torch.no_grad()
def write(training: VideoTraining, path: Path, device: str, size: TrainingSize) -> None:
    """Measure the latents' statistics over training clips and write the part's file."""
    rng = random.Random("statistics")
    values = []
    for frames, height, width in size.scored_sizes:
        for part in chunks(size.scored * 2, 8):
            clips = [world.draw_clip(rng, "train", width / height) for _ in part]
            latents = training.encode(picture.draw_frames(clips, frames, height, width, device))
            values.append(latents.transpose(0, 1).flatten(1))
    std, mean = torch.std_mean(torch.cat(values, dim=1), dim=1)
    used = training.active.flatten() > 0
    training.vae.latents_mean.copy_(torch.where(used, mean, 0.0))
    training.vae.latents_std.copy_(torch.where(used, std, 1.0))
    export.save_part(path, export.released_video_vae(training.vae.state_dict()))


# --- score -------------------------------------------------------------------------------------------------------


def score(path: Path, device: str, size: TrainingSize, pictures: Path | None = None) -> dict[str, float]:
    """Scores over held-out clips of the file as the engine loads it, in bfloat16 on a GPU and float32 elsewhere.

    PSNR is in dB. Colour errors are in sRGB units: the largest error of a channel, averaged over clips. The centre's
    error is a fraction of the shorter side. Shape and motion are fractions of correct readings. The noisy PSNR and
    shape have noise of standard deviation 0.3 on the normalised latents. With `pictures`, a folder, one contact sheet a
    size is written there: original, decoded, decoded with noise.
    """
    from ltx_ray.engine import codec, components

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    vae = components.load_video_vae(path, dtype, device, part="both")
    generator = torch.Generator(device).manual_seed(0)
    result = {}
    for frames, height, width in size.scored_sizes:
        rng = random.Random(f"score {height}x{width}")
        clips = [world.draw_clip(rng, "held_out", width / height) for _ in range(size.scored)]
        rows: list[dict[str, float]] = []
        sheet: list[np.ndarray] = []
        for part in chunks(len(clips), 8):
            pixels = picture.draw_frames([clips[i] for i in part], frames, height, width, device)
            latents = codec.encode_video(vae, pixels)
            noise = torch.randn(latents.shape, generator=generator, device=device, dtype=torch.float32)
            clean = codec.decode_video_tile(vae, latents).float()
            noisy = codec.decode_video_tile(vae, (latents.float() + 0.3 * noise).to(dtype)).float()
            for row, i in enumerate(part):
                rows.append(_compare(clips[i], *(to_bytes(x[row]) for x in (pixels, clean, noisy))))
            if not sheet:
                picked = [0, frames // 2, frames - 1]
                for row in range(len(part)):
                    shown = [to_bytes(x[row])[picked] for x in (pixels, clean, noisy)]
                    sheet.append(np.concatenate([f for x in shown for f in x], axis=1))
        for name in rows[0]:
            result[f"{height}x{width} {name}"] = float(np.mean([row[name] for row in rows]))
        if pictures is not None:
            from PIL import Image

            Image.fromarray(np.concatenate(sheet)).save(pictures / f"vae-{height}x{width}.png")
    return result


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """(F, H, W, 3) uint8 of (3, F, H, W) in [-1, 1], rounded down as the decode stage does."""
    return ((pixels + 1) / 2).clamp(0, 1).mul(255).byte().permute(1, 2, 3, 0).cpu().numpy()


def _compare(clip: world.Clip, truth: np.ndarray, clean: np.ndarray, noisy: np.ndarray) -> dict[str, float]:
    height, width = truth.shape[1:3]
    want, seen, blurred = (
        [measure.read_frame(x[i]) for i in (0, len(x) // 2, len(x) - 1)] for x in (truth, clean, noisy)
    )
    found = all(s.colour is not None for s in seen)
    off = [np.hypot(*np.subtract(s.centre, w.centre)) for s, w in zip(seen, want)]
    ink = np.asarray(world.COLOURS[clip.scene.colour])
    ground = np.asarray(world.COLOURS[clip.scene.ground])
    return {
        "psnr": psnr(truth, clean),
        "ground error": float(abs(seen[1].ground - ground).max()),
        "colour error": float(abs(seen[1].colour - ink).max()) if found else 255.0,
        "centre error": float(np.mean(off)) / min(height, width),
        "shape": float(np.mean([s.shape == clip.scene.shape for s in seen])),
        "motion": float(measure.classify_motion(seen[0], seen[-1], height, width) == clip.scene.motion),
        "noisy psnr": psnr(truth, noisy),
        "noisy shape": float(np.mean([s.shape == clip.scene.shape for s in blurred])),
    }


def psnr(truth: np.ndarray, out: np.ndarray) -> float:
    error = np.square(truth.astype(np.float32) - out).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-3)))
