"""The examples of docs/dataset.md that hand a dataset on, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ltx_ray.cli.export import export
from ltx_ray.dataset.description import describe_dataset
from ltx_ray.dataset.existing import list_existing
from ltx_ray.storage.store import Store
from tests.support.damaged_dataset import build

_DOCS = Path(__file__).resolve().parents[2] / "docs"


def example(package: str) -> str:
    """The example that imports `package`."""
    section = (_DOCS / "dataset.md").read_text().split("\n## Handing it on\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    [found] = [block for block in blocks if re.search(rf"^(?:import|from) {re.escape(package)}\b", block, re.MULTILINE)]
    return found


def sql_examples() -> list[str]:
    """The SQL statements of the page."""
    return re.findall(r"^```sql\n(.*?)^```", (_DOCS / "dataset.md").read_text(), re.MULTILINE | re.DOTALL)


def run_example(package: str) -> dict[str, Any]:
    """The names that the example leaves. It is run in the working directory."""
    names: dict[str, Any] = {}
    exec(compile(example(package), "docs/dataset.md", "exec"), names)
    return names


def make_dataset(here: Path, **exports: str) -> None:
    """A dataset of four rows at `here`/out, and its exports: names of folders with the form of each."""
    store = build(Store(str(here / "out")))
    describe_dataset(store, list_existing(store))
    for name, form in exports.items():
        export(str(here / "out"), str(here / name), form, print, lambda done, total: None)
