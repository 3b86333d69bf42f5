"""Exports to WebDataset: tar files, in which each row is an mp4 and a JSON file of one name."""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path
from typing import IO

from ltx_ray.dataset.export import ExportJob, ExportRecord, Place, Row, begin, row_json, sample_name

#: Bytes after which a shard is complete.
SHARD_BYTES = 10**9


def export_webdataset(job: ExportJob, shard_bytes: int = SHARD_BYTES) -> ExportRecord:
    """Write `<dataset>-<number>.tar`, each whole or not at all; returns what there is by now.

    The last shard is smaller. A later export goes on behind it.
    """
    record = begin(job, "webdataset")
    exported = record.exported
    shard: _Shard | None = None
    places = dict(exported.places)
    try:
        for part, place, row, clip in job.clips(dict(places)):
            if shard is None:
                shard = _Shard(job)
            shard.add(row, clip)
            places[part.dataset] = place
            if shard.size >= shard_bytes:
                shard.publish(record, places)
                shard = None
        if shard is not None:
            shard.publish(record, places)
            shard = None
    finally:
        if shard is not None:
            shard.discard()
        job.target.remove_scratch()
    return record


class _Shard:
    """A shard that is being filled, in a temporary file."""

    def __init__(self, job: ExportJob):
        self._target = job.target
        handle = tempfile.NamedTemporaryFile(suffix=".tar", dir=job.target.scratch_dir(), delete=False)  # noqa: SIM115
        self._file: IO[bytes] = handle
        self._path = Path(handle.name)
        self._tar = tarfile.open(fileobj=handle, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._rows = 0

    @property
    def size(self) -> int:
        return self._file.tell()

    def add(self, row: Row, clip: bytes) -> None:
        for ending, data in (("mp4", clip), ("json", row_json(row))):
            # The same rows give the same bytes: no times, no owners.
            info = tarfile.TarInfo(f"{sample_name(row)}.{ending}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self._rows += 1

    def publish(self, record: ExportRecord, places: dict[str, Place]) -> None:
        exported = record.exported
        try:
            self._tar.close()
            self._file.close()
            self._target.publish_file(f"{exported.dataset}-{exported.files:06d}.tar", self._path)
        finally:
            self.discard()
        exported.files += 1
        exported.rows += self._rows
        exported.places = dict(places)
        record.write()

    def discard(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)
