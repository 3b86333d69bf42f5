#!/usr/bin/env python3
"""Write the toy model to a folder and list its files: python scripts/make_toy_model.py OUT_DIR [--seed N]."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ltx_ray.toy import make_toy_model


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a tiny LTX-2.3 with random weights in the released formats.")
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    made = make_toy_model(args.out_dir, seed=args.seed)
    total = 0
    for name, path in made.items():
        for file in sorted(p for p in [Path(path), *Path(path).glob("*")] if p.is_file()):
            size = file.stat().st_size
            total += size
            print(f"{size / 1e6:9.3f} MB  {name:24} {file}")
    print(f"{total / 1e6:9.3f} MB  in all")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
