"""`ltx-ray export`: copies a dataset into a form that others read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ltx_ray.dataset.export import ExportJob, check_places
from ltx_ray.storage.store import Store

_FILES = {"webdataset": "shards", "hf": "folders"}


@dataclass(frozen=True)
class ExportDone:
    """What an export ends with: its last line, and the number of rows whose clip is missing or damaged."""

    line: str
    left_out: int


def export(
    output: str, destination: str, to: str, say: Callable[[str], None], on_rows: Callable[[int, int], None]
) -> ExportDone:
    """Export the dataset at `output` in the form `to`: webdataset, hf or delta.

    Raises ValueError for a destination that holds something else, OSError when a store does not answer.
    """
    check_places(output, destination)
    job = ExportJob(Store(output), Store(destination), say, on_rows)
    job.target.check_writable("DESTINATION")
    if to == "delta":
        from ltx_ray.dataset.export_delta import export_delta

        rows, version = export_delta(job)
        return ExportDone(f"{job.target.name}: {rows} rows appended, version {version} of the table", job.left_out)
    if to == "hf":
        from ltx_ray.dataset.export_hf import export_hf

        exported = export_hf(job).exported
    else:
        from ltx_ray.dataset.export_webdataset import export_webdataset

        exported = export_webdataset(job).exported
    left_out = f", {job.left_out} left out" if job.left_out else ""
    line = f"{job.target.name}: {exported.rows} rows in {exported.files} {_FILES[to]} by now{left_out}"
    return ExportDone(line, job.left_out)
