#!/usr/bin/env python
"""Render one manifest with two checkouts on this machine, and compare the two indexes bit for bit.

    scripts/compare_versions.py OLD_CHECKOUT [NEW_CHECKOUT] [--dtype float32] [--work FOLDER]

The manifests have a row of every kind (tests/data/version_before/rows.jsonl, and distilled.jsonl for the distilled
pipeline); the model is the toy. Each checkout runs in processes of its own, makes its own toy model, and is used only
through its command line. NEW_CHECKOUT defaults to the one that this file is in. Two rows are equal when their item_id
and latents_sha256 are. Exits with 1 when anything differs. Takes three to six minutes on two cores. With --work the
datasets stay in FOLDER, so that rows that differ can be inspected.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support import version_before
from tests.support.version_before import DTYPES, MANIFESTS, Version


@dataclass(frozen=True)
class Compared:
    """One row of one manifest in one dtype, as rendered by both versions."""

    dtype: str
    label: str
    old: Mapping[str, str]
    new: Mapping[str, str]

    def same(self, column: str) -> bool:
        return self.old[column] == self.new[column]

    def __str__(self) -> str:
        shown = (self._shown("item_id", 32), self._shown("latents_sha256", 16))
        return f"{self.dtype:<9} {self.label:<18} " + "  ".join(shown)

    def _shown(self, column: str, digits: int) -> str:
        old, new = self.old[column][:digits], self.new[column][:digits]
        return f"{old} equal" if self.same(column) else f"{old} is now {new}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("old", metavar="OLD_CHECKOUT", type=Path)
    parser.add_argument("new", metavar="NEW_CHECKOUT", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="render only this one (default: both)")
    parser.add_argument(
        "--work", metavar="FOLDER", type=Path, help="keep the datasets in this folder, which is emptied first"
    )
    args = parser.parse_args()
    for checkout in (args.old, args.new):
        if not (checkout / "ltx_ray").is_dir():
            parser.error(f"{checkout}: not a checkout of ltx-ray; legal: a folder that contains ltx_ray/")
    with work_folder(args.work) as folder:
        old, new = (
            Version(checkout, folder / name, cache=folder / name / "cache")
            for name, checkout in (("old", args.old), ("new", args.new))
        )
        old_toy, new_toy = old.toy_digests(), new.toy_digests()
        rows = [row for dtype in args.dtype or DTYPES for row in compare(old, new, dtype)]
    if old_toy != new_toy:
        changed = sorted(name for name in old_toy.keys() | new_toy.keys() if old_toy.get(name) != new_toy.get(name))
        print(f"the toy models differ, and with them every item_id: {', '.join(changed)}")
    ids, latents = (sum(row.same(column) for row in rows) for column in ("item_id", "latents_sha256"))
    print(f"{len(rows)} rows: {ids} equal ids, {latents} equal latents_sha256")
    return 0 if old_toy == new_toy and ids == latents == len(rows) else 1


def compare(old: Version, new: Version, dtype: str) -> Iterator[Compared]:
    """Every row of both manifests in this dtype. A row is printed when both versions have rendered it."""
    for manifest in MANIFESTS:
        indexes = []
        for version in (old, new):
            output = version.folder / f"{manifest}-{dtype}"
            print(f"# {manifest}.jsonl in {dtype} with {version.checkout}", flush=True)
            version_before.finish(version.start_render(manifest, dtype, output.name))
            indexes.append(version_before.by_label(manifest, version_before.rows_of(output)))
        for label in indexes[0]:
            row = Compared(dtype, label, *(index[label] for index in indexes))
            print(row, flush=True)
            yield row


@contextlib.contextmanager
def work_folder(asked: Path | None) -> Iterator[Path]:
    """`asked`, emptied, or a temporary folder that is deleted afterwards."""
    if asked is None:
        with tempfile.TemporaryDirectory(prefix="ltx-ray-versions-") as folder:
            yield Path(folder)
        return
    for name in ("old", "new"):
        shutil.rmtree(asked / name, ignore_errors=True)
    yield asked


if __name__ == "__main__":
    raise SystemExit(main())
