"""What the benchmarks that render clips share: their model, and the file that keeps figures from run to run."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def device_name(device: str) -> str:
    """The model of the first GPU for "cuda"."""
    if device == "cpu":
        return "cpu"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()


def write_files(arguments: argparse.Namespace, folder: Path, layers: int) -> dict[str, str]:
    """Write the model that the command line names below `folder`. Returns its paths by option name."""
    if arguments.model == "toy":
        from ltx_ray.toy import ToyShape, make_toy_model

        return make_toy_model(folder / "model", shape=ToyShape(layers=layers))
    from scripts.bench import random_model

    gemma_layers = arguments.gemma_layers or layers
    return random_model.write_model(folder / "model", layers, gemma_layers, arguments.connector_layers)


def known_figures(path: Path | None, of: str) -> dict[str, Any]:
    """The figures that the file --json holds from an earlier run with the settings `of`; none without a file."""
    if not (path and path.exists()):
        return {}
    try:
        before = json.loads(path.read_text())
        settings, figures = before["of"], dict(before["figures"])
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"--json: {path}, was not written by this script ({type(error).__name__})") from error
    if settings != of:
        raise SystemExit(f"--json: {path}, has figures of {settings}; this run is {of}")
    return figures


def save_figures(path: Path | None, of: str, figures: Mapping[str, Any]) -> None:
    """Replace the file, if one is asked for."""
    if path:
        temporary = path.with_name(path.name + ".new")
        temporary.write_text(json.dumps({"of": of, "figures": figures}, indent=2))
        os.replace(temporary, path)


def time_and_commit() -> str:
    """The time and, where git knows it, the commit, which go with a figure."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "an unknown commit"
    return f"{time.strftime('%Y-%m-%d %H:%M')} at {commit}"
