#!/usr/bin/env python3
"""Render held-out prompts of the miniature's world with the miniature, and score the clips by plain rules.

    scripts/quality.py --clips 50 --pipeline hq --seed 1 --json quality.json
    scripts/quality.py --clips 20 --pipeline base --output DIR -- --precision fp8

`ltx-ray render` renders them, and takes the options after `--`. Printed are the fractions of clips that have the
ground, the colour, the shape, the motion and the sound of their prompt, and which values were taken for which. A sound
is right when its pitch is, when it is as long as the picture, and when a tone lasts from the beginning to the end.

Sharpness is how many times as wide the object's edge is without stage 2: in the frames of stage 1, which have half the
size, enlarged bilinearly. With `-- --stop-after stage1`, the clips of stage 1 are scored, at half the size.

With `--images`, each clip's first frame is given as an image, and `first_frame` is the fraction of clips in which the
object has the place, size and colour of that image at the beginning.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_ray.miniature import judge
from ltx_ray.miniature.world import Clip
from ltx_ray.presets import PIPELINES
from ltx_ray.shapes import ClipShape, size_problems
from scripts.clip_quality import rendering, scoring
from scripts.clip_quality.settings import Settings

#: Renders clips into a folder; returns the mp4 of each id.
Render = Callable[[list[Clip], Settings, Path], dict[str, Path]]
#: Confusions that are shown for each attribute.
_SHOWN = 6


def main(arguments: Sequence[str] | None = None, render: Render = rendering.render) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    args = _parser().parse_args(words[:cut])
    settings = Settings(
        clips=args.clips,
        pipeline=args.pipeline,
        seed=args.seed,
        height=args.height,
        width=args.width,
        num_frames=args.num_frames,
        frame_rate=args.frame_rate,
        images=args.images,
        weights=args.weights,
        options=tuple(words[cut + 1 :]),
    )
    if problems := size_problems(ClipShape(args.num_frames, args.height, args.width, args.frame_rate)):
        column, value, legal = problems[0]
        print(f"quality: --{column.replace('_', '-')}: {value}; legal: {legal}", file=sys.stderr)
        return 2
    clips = settings.scenes()
    with tempfile.TemporaryDirectory(prefix="ltx-ray-quality-") as scratch:
        output = (args.output or Path(scratch) / "out").absolute()
        try:
            paths = render(clips, settings, output)
        except (ValueError, RuntimeError) as error:
            print(f"quality: {error}", file=sys.stderr)
            return 2 if isinstance(error, ValueError) else 1
        scores = scoring.score(clips, paths, settings, output, args.sharpness_clips)
    result = _result(clips, scores, settings)
    _show(clips, scores, result)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Render held-out prompts with the miniature and score the clips.",
        usage="%(prog)s [options] [-- options of ltx-ray render]",
    )
    parser.add_argument("--clips", type=_count, default=50, metavar="N", help="number of prompts (default 50)")
    parser.add_argument("--pipeline", choices=sorted(PIPELINES), default="hq", help="default hq")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts and of the first clip (default 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the scores go as JSON")
    parser.add_argument("--height", type=int, default=256, help="multiple of 64 (default 256)")
    parser.add_argument("--width", type=int, default=384, help="multiple of 64 (default 384)")
    parser.add_argument("--num-frames", type=int, default=33, help="8k + 1 (default 33)")
    parser.add_argument("--frame-rate", type=float, default=24.0, help="frames a second (default 24)")
    parser.add_argument("--images", action="store_true", help="give each clip's first frame as an image")
    parser.add_argument("--output", type=Path, metavar="DIR", help="keep the dataset there; a second call goes on")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="the miniature's parts (default: the package's)")
    parser.add_argument(
        "--sharpness-clips", type=int, default=16, metavar="N", help="clips whose edges are measured (default 16)"
    )
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}; legal: at least 1")
    return value


def _result(clips: list[Clip], scores: scoring.Scores, settings: Settings) -> dict[str, Any]:
    """The scores as JSON has them."""
    kept = scores.first_frames
    return {
        **judge.accuracy(clips, scores.readings),
        "sharpness": scores.sharpness,
        **({} if kept is None else {"first_frame": sum(kept) / len(kept)}),
        "clips": settings.clips,
        "pipeline": settings.pipeline,
        "seed": settings.seed,
        "settings": settings.shown(),
    }


def _show(clips: list[Clip], scores: scoring.Scores, result: dict[str, Any]) -> None:
    wrong = judge.confusions(clips, scores.readings)
    for name in judge.ATTRIBUTES:
        shown = ", ".join(f"{asked} as {read} {count}" for asked, read, count in wrong[name][:_SHOWN])
        more = ", …" if len(wrong[name]) > _SHOWN else ""
        print(f"{name:12} {result[name]:7.1%}  {shown}{more}".rstrip())
    if "first_frame" in result:
        print(f"{'first frame':12} {result['first_frame']:7.1%}")
    if result["sharpness"] is not None:
        print(f"{'sharpness':12} {result['sharpness']:7.2f}  edges without stage 2 are so many times as wide")
    missing = sum(reading == scoring.NOT_RENDERED for reading in scores.readings)
    if missing:
        print(f"{missing} of {len(clips)} clips were not rendered and count as wrong")


if __name__ == "__main__":
    raise SystemExit(main())
