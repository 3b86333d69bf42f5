"""Rendering by `ltx-ray render`, in a process of its own as a user starts it, and reading of its clips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pyarrow.dataset

from ltx_ray.dataset.layout import INDEX, PREVIEWS, latents_path, preview_path
from ltx_ray.miniature.files import ensure_miniature, ensure_miniature_distilled
from ltx_ray.miniature.world import Clip
from scripts.clip_quality.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
#: Exit codes of `ltx-ray render`: all rows are rendered, and some failed.
_DONE, _SOME_FAILED = 0, 3


def images_of(clips: list[Clip], settings: Settings) -> list[np.ndarray]:
    """The first frame (H, W, 3) uint8 of each clip, as it is drawn."""
    from ltx_ray.miniature import picture

    drawn = (picture.draw_frames([clip], 1, settings.height, settings.width)[0, :, 0] for clip in clips)
    return [((frame + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for frame in drawn]


def write_manifest(folder: Path, clips: list[Clip], settings: Settings) -> Path:
    """Write a row for each clip, and its image if it has one. Returns the manifest's path."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    pictures = images_of(clips, settings) if settings.images else [None] * len(clips)
    path = folder / "prompts.jsonl"
    with path.open("w") as file:
        for number, (name, clip, picture) in enumerate(zip(settings.ids(), clips, pictures, strict=True)):
            row = {
                "id": name,
                "prompt": clip.prompt,
                "seed": settings.seed + number,
                "height": settings.height,
                "width": settings.width,
                "num_frames": settings.num_frames,
                "frame_rate": settings.frame_rate,
                "pipeline": settings.pipeline,
            }
            if picture is not None:
                Image.fromarray(picture).save(folder / f"{name}.png")
                row["images"] = [{"path": f"{name}.png"}]
            file.write(json.dumps(row) + "\n")
    return path


def model_files(settings: Settings) -> dict[str, str]:
    """Paths of the miniature's files. Raises ValueError for a part that is not there."""
    ensure = ensure_miniature_distilled if settings.pipeline == "distilled" else ensure_miniature
    return ensure(weights=settings.weights)


def model_options(settings: Settings) -> list[str]:
    """The options of `ltx-ray render` that name the miniature's files."""
    files = model_files(settings)
    if settings.pipeline == "distilled":
        files["distilled_checkpoint_path"] = files.pop("checkpoint_path")
    return [word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", path)]


def render(clips: list[Clip], settings: Settings, output: Path) -> dict[str, Path]:
    """Render the clips into the dataset `output`, and return the mp4 of each id. A clip that failed has none.

    Latents are saved too, unless stage 2 is left out. Raises RuntimeError when the run ended otherwise than with
    rendered and failed rows.
    """
    manifest = write_manifest(output.parent / f"{output.name}-rows", clips, settings)
    command = [sys.executable, str(ROOT / "jobs" / "render.py"), str(manifest), "--output", str(output)]
    command += [*model_options(settings), *([] if settings.stage1_alone else ["--save-latents"]), *settings.options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    code = subprocess.run(command, env=environment).returncode
    if code not in (_DONE, _SOME_FAILED):
        raise RuntimeError(f"the render ended with exit code {code}: {' '.join(command)}")
    return rendered(output, settings)


def rendered(output: Path, settings: Settings) -> dict[str, Path]:
    """The mp4 of each id of the settings that the dataset `output` has."""
    table = output / (PREVIEWS if settings.stage1_alone else INDEX)
    if not table.is_dir():
        return {}
    wanted = set(settings.ids())
    parts = sorted(table.glob("part-*.parquet"))
    rows = pyarrow.dataset.dataset(parts, format="parquet").to_table(["id", "item_id"]).to_pylist() if parts else []
    columns = {row["id"]: row["item_id"] for row in rows if row["id"] in wanted}
    return {name: output / _path(item_id, settings) for name, item_id in columns.items()}


def _path(item_id: str, settings: Settings) -> str:
    from ltx_ray.dataset.layout import clip_path

    return preview_path(item_id) if settings.stage1_alone else clip_path(item_id)


def latents_of(clip: Path, output: Path) -> Path:
    """The file of the latents of the clip at `clip` in the dataset `output`."""
    return output / latents_path(clip.stem)


def read_mp4(path: Path) -> tuple[np.ndarray, np.ndarray, int, float]:
    """Frames (F, H, W, 3) uint8, sound (channels, samples) float32, samples a second, frames a second.

    Without sound, the sound has no samples.
    """
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate or 0)
        # The clips are BT.709 in limited range, which the reformatter does not take from the stream.
        frames = [
            frame.reformat(
                format="rgb24", src_colorspace="ITU709", src_color_range="MPEG", dst_color_range="JPEG"
            ).to_ndarray()
            for frame in container.decode(video=0)
        ]
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return np.stack(frames), np.zeros((2, 0), np.float32), 48000, rate
        sound_rate = container.streams.audio[0].rate
        blocks = [frame.to_ndarray() for frame in container.decode(audio=0)]
    return np.stack(frames), np.concatenate(blocks, axis=1), sound_rate, rate
