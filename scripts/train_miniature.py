#!/usr/bin/env python3
"""Make the miniature's weights, part by part: python scripts/train_miniature.py --part vae --minutes 8 --out DIR.

Each part goes on from its newest checkpoint in DIR/<part>, trains for the minutes given, writes its weights under the
released names beside the checkpoint, and prints its score on held-out clips as one line of JSON. `--smoke` makes a
few steps of the real thing at a small size, for tests.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

PARTS = ("vae", "audio")


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a part of the miniature.")
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="time to train, without scoring (default 8)")
    parser.add_argument("--out", type=Path, default=Path("miniature-training"), help="where checkpoints are")
    parser.add_argument("--start", type=Path, help="weights to start from where there is no checkpoint yet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None, help="default: cuda where there is one, otherwise cpu")
    parser.add_argument("--smoke", action="store_true", help="a few small steps only")
    args = parser.parse_args()

    import torch
    from miniature_training.loop import Budget

    if args.part == "vae":
        from miniature_training import video as part
    else:
        from miniature_training import audio as part

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    budget = Budget(args.minutes, steps=3 if args.smoke else None)
    plan = part.SMOKE if args.smoke else part.Plan()
    result = part.train(args.out / args.part, budget, args.seed, device, plan, args.start)
    for name, value in result.items():
        print(f"{name:28} {value:9.4f}")
    print(json.dumps({"part": args.part, "score": {name: round(value, 5) for name, value in result.items()}}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
