"""The decode engine: latents to frames and sound, encoded in the same process and published when complete.

A replica may be called from two threads at once: the GPU decodes one clip while another is encoded and uploaded.

It also serves the stages that deal with stored latents: LOAD_LATENTS reads those of stage 1, and SAVE_LATENTS stores
those of a clip that could not be finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ltx_ray
from ltx_ray.checkpoints.digests import cache_root
from ltx_ray.checkpoints.node_cache import on_this_node
from ltx_ray.config import EngineSpec
from ltx_ray.dataset.clips import publish_clip
from ltx_ray.dataset.layout import clip_path, preview_path, thumb_path
from ltx_ray.dataset.package_versions import TRITON
from ltx_ray.dataset.thumbnails import FrameSheet
from ltx_ray.engine import codec, components
from ltx_ray.engine.base import PartSeconds, Rank, is_out_of_memory, resolve_dtype
from ltx_ray.engine.decode_warm_up import WarmUp
from ltx_ray.engine.evidence import FileDigests, evidence, known_latents
from ltx_ray.engine.frames import PictureCheck, decode_tiled, to_yuv420
from ltx_ray.engine.latents import LatentStore, latents_sha256, named_latents
from ltx_ray.engine.loudness import measure_sound
from ltx_ray.engine.mp4 import read_metadata, write_mp4
from ltx_ray.engine.patchify import latent_sizes
from ltx_ray.engine.prefetch import prefetch
from ltx_ray.engine.tiling import LADDER, Tiling, distinct_rungs
from ltx_ray.placement.numerics import numerics_json, numerics_of_row
from ltx_ray.presets import PIPELINES
from ltx_ray.records import AV, Clip, EngineFacts, Evidence, RowError, StageLatents, WorkItem
from ltx_ray.shapes import AUDIO_SAMPLE_RATE, ClipShape, frame_rate_fraction
from ltx_ray.stages import Stage
from ltx_ray.storage.store import Store

_log = logging.getLogger(__name__)
#: Seconds for which the write of a thumbnail is retried. The clip does not wait for its picture longer.
_THUMB_RETRY_SECONDS = 2.0
#: Bytes of frames up to which a clip is decoded without waiting for its encoder, so that the GPU is free for the next.
_FRAMES_AHEAD_BYTES = 2 * 2**30
#: More chunks than any clip has.
_ALL_CHUNKS = 10_000


class DecodeEngine:
    """The video VAE's decoder, the audio VAE's decoder and the vocoder."""

    def __init__(self, spec: EngineSpec, rank: Rank):
        self.spec, self.rank = spec, rank
        self.device = torch.device(rank.device)
        self.dtype = resolve_dtype(spec.numerics.dtype)
        self._of_thread = threading.local()
        #: Held while the GPU decodes a clip, and while stored latents are read or written.
        self._gpu, self._stored = threading.Lock(), threading.Lock()
        #: By size of a clip (pixels x frames): the rung that sufficed for it, where that was not the first. Larger
        #: clips that needed no higher rung are left out, so there is at most one size for each rung.
        self._rung_by_size: dict[int, int] = {}
        #: The warm-up under way, whether another one would be of use, and how many clips there are to give way to.
        self._warm_up: WarmUp | None = None
        self._is_warm, self._clips = False, 0
        self._warming = threading.Lock()

    @property
    def facts(self) -> EngineFacts:
        """Those of the last call on this thread."""
        return getattr(self._of_thread, "facts", EngineFacts())

    @facts.setter
    def facts(self, facts: EngineFacts) -> None:
        self._of_thread.facts = facts

    def load(self) -> None:
        """Load the decoders. Raises ValueError for files that do not fit, UnfitNode as load_video_vae does."""
        parts = PartSeconds()
        with parts.measure("read"):
            self._load()
        self.facts = EngineFacts(start_seconds=parts.take())

    def _load(self) -> None:
        path = on_this_node(self.spec.model).checkpoint_path
        self._files = FileDigests(self.spec, "checkpoint_path")
        self.store = Store(self.spec.output)
        self.latents = LatentStore(self.store)
        # Kernels are compiled once for all processes, and for all nodes where the cache is shared.
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache_root() / "triton"))
        fused = self.spec.numerics.compile == "fused" and self.device.type == "cuda"
        self.video_vae = components.load_video_vae(path, self.dtype, self.device, part="decoder", fused=fused)
        if self.device.type == "cpu" and self.dtype == torch.bfloat16:
            # The reference has its weights in this format, and a CPU rounds bfloat16 convolutions by memory format.
            # Float32 on a CPU would be slower in it, and so would a GPU that decodes without fused steps.
            self.video_vae.decoder.to(memory_format=torch.channels_last_3d)
        self.audio_vae = components.load_audio_decoder(path, self.dtype, self.device)
        self.vocoder = components.load_vocoder(path, self.dtype, self.device)

    def begin_warm_up(self) -> None:
        """Decode nothing, of the size of the run's first clip, in the background until a clip comes. Not on a CPU."""
        if self.spec.first_shape is not None and self.device.type == "cuda":
            self._begin_warm_up(self.spec.first_shape)

    def _begin_warm_up(self, shape: ClipShape) -> None:
        with self._warming:
            if not (self._is_warm or self._clips or self._warm_up is not None):
                self._warm_up = WarmUp(self._decode_nothing(shape), self._release_cached_memory)

    def _decode_nothing(self, shape: ClipShape) -> Generator[None, None, None]:
        """Decode a clip of zeros for `shape`, of half the size where previews are made; yields between two steps."""
        shape = shape.half() if self.spec.stop_after else shape
        latents = latent_sizes(shape).map(torch.zeros)
        sheet = FrameSheet(shape.num_frames)
        with contextlib.closing(self._frames(latents.video, LADDER[0], PictureCheck(), sheet)) as chunks:
            for _ in chunks:
                yield
        measure_sound(self._sound(latents.audio, shape.audio_samples))
        yield
        sheet.webp()

    def _begin_clip(self) -> dict[str, float] | None:
        """Stop the warm-up, if there is one. Returns its seconds to the first call after it."""
        with self._warming:
            self._clips += 1
            warm_up, self._warm_up = self._warm_up, None
            if warm_up is None:
                return None
            waited = PartSeconds()
            with waited.measure("waited for warm"):
                warm_up.stop()
            self._is_warm = not warm_up.cut_short
            return waited.take() | {"warm": round(warm_up.seconds, 3)}

    def _end_clip(self, preflight: bool) -> None:
        """Begin a warm-up again that the tiny clip of a preflight has cut short. Any other clip has done its work."""
        with self._warming:
            self._clips -= 1
            self._is_warm |= not preflight
        self.begin_warm_up()

    @torch.inference_mode()
    def evidence(self) -> Evidence:
        """What this rank computes with, and the pixels and the sound of a clip of few tokens.

        Raises ReplicaError when they are not finite.
        """
        video, audio = known_latents().map(lambda latents: latents.to(self.device, self.dtype))
        pixels = codec.decode_video_tile(self.video_vae, video)
        sound, _ = codec.decode_audio(self.audio_vae, self.vocoder, audio)
        kernels = TRITON if self.spec.numerics.compile == "fused" else ()
        shown = evidence(self._files, self.device, {"decoder": AV(pixels, sound)}, kernels)
        del pixels
        self._release_cached_memory()
        return shown

    @torch.inference_mode()
    def run(self, stage: Stage, item: WorkItem, *stages: StageLatents) -> Clip | StageLatents | str:
        """Serve one of three stages for `item`.

        DECODE publishes the clip, or the preview when the run stops after stage 1, and before it the latents if the
        run saves them. Nothing of a preflight item is published. Returns the Clip. Raises RowError when the clip is not
        finite, OutOfMemoryError when memory does not suffice for the smallest tiles.
        LOAD_LATENTS returns the stored latents of stage 1. Raises StoredLatentsGone.
        SAVE_LATENTS stores the latents of `stages`, on this node when the output refuses them. Returns where.
        """
        if stage == Stage.DECODE:
            start_seconds = self._begin_clip()
            try:
                return self._decode(item, stages)
            finally:
                self.facts = dataclasses.replace(self.facts, start_seconds=start_seconds)
                self._release_cached_memory()
                self._end_clip(item.preflight)
        if stage == Stage.LOAD_LATENTS:
            with self._stored:
                latents, location = self.latents.load_stage1(item, self.dtype)
                self.facts = EngineFacts(stored_at=location, unchecked=self.latents.unchecked)
            return latents
        assert stage == Stage.SAVE_LATENTS and stages, stage
        with self._stored:
            location = self.latents.save(item, stages)
        self.facts = EngineFacts(stored_at=location)
        return location

    def _decode(self, item: WorkItem, stages: tuple[StageLatents, ...]) -> Clip:
        stored_facts: dict[str, Any] = {}
        if (self.spec.save_latents or self.spec.stop_after) and not item.preflight:
            with self._stored:
                stages, stored_facts = self._publish_latents(item, stages)
        named = named_latents(*stages)
        digest = latents_sha256(named)
        metadata = {
            "item_id": item.item_id,
            "recipe_digest": item.recipe_digest,
            "latents_sha256": digest,
            "ltx_ray": ltx_ray.__version__,
        }
        if self.spec.stop_after:
            # Stage 1 renders at half size, and its latents are decoded at that size.
            path, shape = preview_path(item.item_id), item.request.shape.half()
            video_stage = audio_stage = "stage_1"
            metadata["preview"] = "stage_1"
        else:
            path, shape, video_stage = clip_path(item.item_id), item.request.shape, "stage_2"
            audio_stage = PIPELINES[item.request.pipeline].audio_stage
        sound = self._sound(named[f"{audio_stage}.audio"], shape.audio_samples)
        handle, temporary = tempfile.mkstemp(suffix=".mp4", dir=self.store.scratch_dir())
        os.close(handle)
        try:
            pictures, sheet = self._write(temporary, named[f"{video_stage}.video"], shape, sound, metadata)
            self.facts = dataclasses.replace(self.facts, **stored_facts)
            heard = measure_sound(sound)
            # Pixels of smaller tiles differ slightly from those of the reference's.
            smaller = ("tiled_smaller",) if self.facts.decode_rung else ()
            flags = pictures.flags() + heard.flags(shape.seconds) + smaller
            data = Path(temporary).read_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            clip = Clip(path, sha256, digest, flags, audio_stage, pictures.measures(), heard)
            if item.preflight:
                return dataclasses.replace(clip, path=None)
            clip = publish_clip(self.store, clip, item.item_id, data, read_metadata)
        finally:
            os.unlink(temporary)
        if not self.spec.stop_after:
            self._publish_thumb(item, sheet)
            # An earlier attempt that failed may have cached them. A finished clip needs them no longer.
            self.latents.delete_cached(item)
        return clip

    def _publish_latents(
        self, item: WorkItem, stages: tuple[StageLatents, ...]
    ) -> tuple[tuple[StageLatents, ...], dict[str, Any]]:
        """Store the latents; those to decode, and facts of them where they are of an earlier run."""
        stored_before = bool(self.spec.stop_after) and self.latents.holds_both_stages(item, self.dtype)
        self.latents.publish(item, stages)
        if not stored_before:
            return stages, {}
        # They stay. The preview is of the latents that a promotion continues.
        stored, _ = self.latents.load_stage1(item, self.dtype)
        numerics = numerics_of_row(numerics_json(self.spec.numerics), item.request)
        return (stored,), {
            "noise_ledger": stored.ledger,
            "stage1_numerics": stored.other_numerics(numerics, stages[0].device_name),
            "unchecked": self.latents.unchecked,
        }

    def _publish_thumb(self, item: WorkItem, sheet: FrameSheet) -> None:
        """Write the picture of a clip. The report makes one of the clip where there is none, so that no row fails."""
        try:
            self.store.retrying_for(_THUMB_RETRY_SECONDS).write_bytes(thumb_path(item.item_id), sheet.webp())
        except OSError as error:
            _log.warning("%s: no thumbnail (%s)", item.item_id, error)

    def _release_cached_memory(self) -> None:
        """Free what PyTorch caches of the frames' memory, some 10 GiB that other processes on the card need."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _write(
        self, target: str, latent: torch.Tensor, shape: ClipShape, sound: np.ndarray, metadata: dict[str, str]
    ) -> tuple[PictureCheck, FrameSheet]:
        """Decode and encode to `target`, in smaller tiles when memory does not suffice.

        Returns what it measured, and some of the frames.

        The first rung is one that sufficed for a clip of this size or smaller. Raises OutOfMemoryError after the last.
        """
        size = shape.num_frames * shape.height * shape.width
        rungs = distinct_rungs(latent.shape[2:])
        known = max((rung for known_size, rung in self._rung_by_size.items() if known_size <= size), default=0)
        first = max(rung for rung in rungs if rung <= known)
        reason = ""
        depth = _ALL_CHUNKS if size * 3 // 2 <= _FRAMES_AHEAD_BYTES else 1
        for rung in (r for r in rungs if r >= first):
            check, sheet = PictureCheck(), FrameSheet(shape.num_frames)
            try:
                write_mp4(
                    target,
                    # The GPU decodes the next frames while the CPU encodes the last ones.
                    prefetch(self._frames(latent, LADDER[rung], check, sheet), depth),
                    width=shape.width,
                    height=shape.height,
                    frame_rate=frame_rate_fraction(shape.frame_rate),
                    audio=sound,
                    sample_rate=AUDIO_SAMPLE_RATE,
                    metadata=metadata,
                )
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
            else:
                if rung > first:
                    with self._gpu:
                        known_rungs = self._rung_by_size.items()
                        self._rung_by_size = {s: r for s, r in known_rungs if s < size or r > rung} | {size: rung}
                self.facts = EngineFacts(decode_rung=rung)
                return check, sheet
            # Outside the except block, where the error and with it the frames' tensors are gone.
            self._release_cached_memory()
            _log.warning("%s: no memory to decode in %s (%s)", metadata["item_id"], LADDER[rung], reason)
        raise torch.OutOfMemoryError(
            f"decoding {shape.num_frames} frames of {shape.width}x{shape.height} in the smallest tiles: {reason}"
        )

    def _frames(
        self, latent: torch.Tensor, tiling: Tiling, check: PictureCheck, sheet: FrameSheet
    ) -> Generator[np.ndarray, None, None]:
        """Chunks of I420 frames (f, 3 * height / 2, width) uint8 of a latent (1, C, F, H, W)."""

        def decode(tile: torch.Tensor) -> torch.Tensor:
            return codec.decode_video_tile(self.video_vae, tile)

        with self._gpu:
            for chunk in decode_tiled(decode, latent.to(self.device, self.dtype), tiling):
                if not torch.isfinite(chunk).all():
                    raise RowError("decoded frames are not finite")
                frames = to_yuv420(chunk)
                check.update(frames)
                encodable = frames.cpu().numpy()
                sheet.update(encodable)
                yield encodable

    def _sound(self, latent: torch.Tensor, samples: int) -> np.ndarray:
        """Stereo float32 (2, samples) of a latent (1, 8, T, 16), cut or padded to the length of the video."""
        with self._gpu:
            waveform, rate = codec.decode_audio(self.audio_vae, self.vocoder, latent.to(self.device, self.dtype))
            assert rate == AUDIO_SAMPLE_RATE, rate
            if not torch.isfinite(waveform).all():
                raise RowError("the decoded sound is not finite")
        sound = waveform.float().cpu().numpy()[:, :samples]
        return np.pad(sound, ((0, 0), (0, samples - sound.shape[1])))
