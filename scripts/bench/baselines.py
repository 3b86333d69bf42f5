"""Recorded figures by GPU model, and which figures of a new run are worse."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "baselines.json"
#: The relative difference that two runs of the same code may have.
TOLERANCE = 0.05


class Baselines:
    """The figures recorded for one GPU model, named as by `torch.cuda.get_device_name`."""

    def __init__(self, device_name: str, path: Path = FILE):
        self.device_name, self.path = device_name, path

    @property
    def figures(self) -> dict[str, float]:
        """Case -> figure, as recorded."""
        return self._all().get(self.device_name, {})

    def compare(self, figures: Mapping[str, float], lower_is_better: bool = True) -> list[str]:
        """One line for each figure that is worse than recorded by more than TOLERANCE; one without a record passes."""
        worse = []
        for case, before in self.figures.items():
            if case not in figures:
                continue
            now = figures[case]
            change = (now / before - 1) if before else float(now != before)
            if not (change if lower_is_better else -change) <= TOLERANCE:  # NaN counts as worse
                worse.append(f"{case}: {now:.4g}, was {before:.4g} ({change:+.1%})")
        return worse

    def missing(self, figures: Mapping[str, float]) -> list[str]:
        """The cases of `figures` without a record for this GPU model."""
        return [case for case in figures if case not in self.figures]

    def record(self, figures: Mapping[str, float]) -> None:
        """Record `figures`; other cases keep theirs."""
        known = self._all()
        known[self.device_name] = {**known.get(self.device_name, {}), **figures}
        temporary = self.path.with_suffix(".json.new")
        temporary.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
        os.replace(temporary, self.path)

    def _all(self) -> dict[str, dict[str, float]]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}


def check(baselines: Baselines, figures: Mapping[str, float], lower_is_better: bool = True) -> int:
    """Print how `figures` compare with the records. Returns the exit code: 1 when one is worse, else 0."""
    missing = baselines.missing(figures)
    worse = baselines.compare(figures, lower_is_better)
    if missing:
        print(f"no baseline on {baselines.device_name} for: {', '.join(missing)}")
    for line in worse:
        print(f"WORSE  {line}")
    good = len(figures) - len(missing) - len(worse)
    if good:
        print(f"within {TOLERANCE:.0%} of their baselines or better: {good} of {len(figures)} figures")
    return 1 if worse else 0
