"""The audio's kernels in a CUDA stream of their own, beside those of the video."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from ltx_ray.checkpoints.transformer_keys import StreamNames
from ltx_ray.model.block import STREAM_NAMES


class AudioCudaStream:
    """Runs the audio's kernels, which are too small to fill a GPU, in a CUDA stream beside that of the video.

    A tensor that one of the CUDA streams made and the other reads must live until they `synchronize`. Its memory
    returns to the CUDA stream that allocated it, which does not know of the other's readers. On a CPU all this does
    nothing.
    """

    def __init__(self, device: torch.device):
        self._audio = torch.cuda.Stream(device) if device.type == "cuda" else None

    def wait_for_video(self) -> None:
        """The audio waits for all that the video's CUDA stream has been given so far."""
        if self._audio is not None:
            self._audio.wait_stream(torch.cuda.current_stream(self._audio.device))

    def join_video(self) -> None:
        """The video waits for the audio. Every pass ends so, as the capture of a CUDA graph has to."""
        if self._audio is not None:
            torch.cuda.current_stream(self._audio.device).wait_stream(self._audio)

    def synchronize(self) -> None:
        """Each waits for the other."""
        self.join_video()
        self.wait_for_video()

    def running(self, names: StreamNames) -> AbstractContextManager:
        """A context whose work belongs to the modality with these names."""
        return (
            torch.cuda.stream(self._audio) if self._audio is not None and names is STREAM_NAMES.audio else nullcontext()
        )
