#!/usr/bin/env python3
"""Train a part of the miniature: python scripts/train_miniature.py --part vae --minutes 8 --out DIR.

Training resumes from the checkpoint in DIR/<part>. It ends after the given minutes, writes the part's weights under the
released names beside the checkpoint, and prints the part's score as one line of JSON. With 0 minutes it writes and
scores what the checkpoint has. `--smoke` runs three small steps in DIR/smoke, for tests.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

#: Part -> module of scripts.miniature_training.
PARTS = {"vae": "video", "audio": "audio", "dit": "diffusion", "lora": "lora", "upsampler": "upsampler"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a part of the miniature.")
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--minutes", type=_minutes, default=8.0, help="time of the steps alone (default 8)")
    parser.add_argument(
        "--out", type=Path, default=Path("miniature-training"), help="folder of checkpoints and results"
    )
    parser.add_argument("--start", type=Path, help="exported weights to start from when there is no checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None, help="default: cuda if available, otherwise cpu")
    parser.add_argument("--smoke", action="store_true", help="run three small steps, in DIR/smoke")
    args = parser.parse_args(arguments)

    import torch

    from scripts.miniature_training.loop import Budget

    part = importlib.import_module(f"scripts.miniature_training.{PARTS[args.part]}")

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    budget = Budget(args.minutes, steps=3 if args.smoke else None)
    size = part.SMOKE if args.smoke else part.FULL
    # What a smoke run leaves must not be taken for a trained part.
    out = args.out / "smoke" if args.smoke else args.out
    try:
        result = part.train(out / args.part, budget, args.seed, device, size, args.start)
    except ValueError as error:
        print(f"train_miniature: {error}", file=sys.stderr)
        return 2
    for name, value in result.items():
        print(f"{name:28} {value:9.4f}")
    print(json.dumps({"part": args.part, "score": {name: round(value, 5) for name, value in result.items()}}))
    return 0


def _minutes(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{value}; legal: 0 or more")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
