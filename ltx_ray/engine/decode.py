"""The decode engine: latents to frames and sound, muxed where they are decoded, published when complete."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from safetensors.torch import save_file

from ltx_ray.config import EngineSpec
from ltx_ray.dataset.mux import write_mp4
from ltx_ray.engine import apply, components
from ltx_ray.engine.base import Rank, resolve_dtype
from ltx_ray.engine.frames import PictureCheck, decode_tiled, to_yuv420
from ltx_ray.recipe import PIPELINES
from ltx_ray.records import Clip, RowError, StageLatents, WorkItem
from ltx_ray.shapes import AUDIO_SAMPLE_RATE, frame_rate_fraction
from ltx_ray.storage import Store

#: A clip whose loudest sample is below this (-60 dBFS) is flagged.
_SILENT_PEAK = 1e-3


class DecodeEngine:
    """The video VAE's decoder, the audio VAE's decoder and the vocoder."""

    def __init__(self, spec: EngineSpec, rank: Rank):
        self.spec, self.rank = spec, rank
        self.device = torch.device(rank.device)
        self.dtype = resolve_dtype(spec.numerics.dtype)
        self.info: dict[str, str] = {}

    def load(self) -> None:
        path = self.spec.model.local().checkpoint_path
        self.store = Store(self.spec.output)
        if self.spec.stop_after is None:
            self.video_vae = components.load_video_vae(path, self.dtype, self.device, part="decoder")
            if self.device.type == "cpu" and self.dtype == torch.bfloat16:
                # where the reference has its weights: a CPU rounds bf16 convolutions by the memory order. A GPU gives
                # the same frames either way and is slower so, float32 on a CPU too
                self.video_vae.decoder.to(memory_format=torch.channels_last_3d)
            self.audio_vae = components.load_audio_decoder(path, self.dtype, self.device)
            self.vocoder = components.load_vocoder(path, self.dtype, self.device)

    @torch.inference_mode()
    def run(self, stage: str, item: WorkItem, *stages: StageLatents) -> Clip:
        """Publish the clip (and with --save-latents the latents) of `item` from its stages' latents."""
        named = named_latents(*stages)
        digest = latents_sha256(named)
        if self.spec.save_latents or self.spec.stop_after:
            self._publish_latents(item, named)
        audio_stage = PIPELINES[item.request.pipeline].audio_stage
        if self.spec.stop_after:
            return Clip(None, None, digest, (), audio_stage)
        shape = item.request.shape
        waveform = self._sound(named[f"{audio_stage}.audio"], shape.audio_samples)
        check = PictureCheck()
        path = f"clips/{item.item_id[:2]}/{item.item_id}.mp4"
        handle, temporary = tempfile.mkstemp(suffix=".mp4", dir=self.store.scratch_dir())
        os.close(handle)
        try:
            write_mp4(
                temporary,
                self._frames(named["stage_2.video"], check),
                width=shape.width,
                height=shape.height,
                frame_rate=frame_rate_fraction(shape.frame_rate),
                audio=waveform,
                sample_rate=AUDIO_SAMPLE_RATE,
                metadata={"item_id": item.item_id, "recipe_digest": item.recipe_digest},
            )
            sha256 = _file_sha256(temporary)
            os.chmod(temporary, 0o644)
            self.store.publish(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
        flags = check.flags() + (("silent",) if np.abs(waveform).max() < _SILENT_PEAK else ())
        return Clip(path, sha256, digest, flags, audio_stage)

    def _frames(self, latent: torch.Tensor, check: PictureCheck) -> Iterator[np.ndarray]:
        def decode(tile: torch.Tensor) -> torch.Tensor:
            return apply.decode_video_tile(self.video_vae, tile)

        for chunk in decode_tiled(decode, latent.to(self.device, self.dtype)):
            if not torch.isfinite(chunk).all():
                raise RowError("decoded frames are not finite")
            frames = to_yuv420(chunk)
            check.see(frames)
            yield frames.cpu().numpy()

    def _sound(self, latent: torch.Tensor, samples: int) -> np.ndarray:
        """Stereo float32 (2, samples): the decoded sound, cut or padded to the length of the picture."""
        latent = latent.to(self.device, self.dtype)
        waveform, rate = apply.decode_audio(self.audio_vae, self.vocoder, latent)
        assert rate == AUDIO_SAMPLE_RATE, rate
        if not torch.isfinite(waveform).all():
            raise RowError("the decoded sound is not finite")
        sound = waveform.float().cpu().numpy()[:, :samples]
        return np.pad(sound, ((0, 0), (0, samples - sound.shape[1])))

    def _publish_latents(self, item: WorkItem, named: dict[str, torch.Tensor]) -> None:
        handle, temporary = tempfile.mkstemp(suffix=".safetensors", dir=self.store.scratch_dir())
        os.close(handle)
        save_file({k: v.contiguous() for k, v in named.items()}, temporary, metadata={"item_id": item.item_id})
        os.chmod(temporary, 0o644)
        self.store.publish(temporary, f"latents/{item.item_id[:2]}/{item.item_id}.safetensors")


def named_latents(*stages: StageLatents) -> dict[str, torch.Tensor]:
    """`stage_1.video`, `stage_1.audio`, `stage_2.video`, ... in the order in which they were made."""
    return {
        f"stage_{n}.{name}": tensor
        for n, stage in enumerate(stages, start=1)
        for name, tensor in zip(("video", "audio"), stage.latents, strict=True)
    }


def latents_sha256(named: dict[str, torch.Tensor]) -> str:
    """sha256 over each latent's name, dtype, shape and raw little-endian bytes."""
    digest = hashlib.sha256()
    for name, tensor in named.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}:{dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _file_sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
