"""The pool of a schedule: rows of an existing manifest, read as `ltx-ray render` reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ltx_ray.manifest.raw import RawRow
from ltx_ray.manifest.reader import manifest_folder, open_manifest
from ltx_ray.manifest.rules import extra_json
from ltx_ray.storage.locations import parent, recorded, resolve, split_options


class SourceManifest:
    """A manifest whose rows are counted first and read when picked.

    Raises ValueError when it cannot be read.
    """

    def __init__(self, uri: str) -> None:
        #: Whether a row that was taken has images; known once the rows are taken.
        self.has_images = False
        try:
            self._manifest = open_manifest(uri)
            self._length = sum(1 for _ in self._manifest.rows(extra=False))
            #: The folder that images may be in.
            self.folder = manifest_folder(uri)
        except (OSError, ValueError) as error:
            raise ValueError(f"manifest: {recorded(uri)!r}, must be readable JSONL or Parquet ({error})") from None

    def __len__(self) -> int:
        return self._length

    def say_skipped(self, say: Callable[[str], None]) -> None:
        """Name what the manifest leaves out of a folder."""
        self._manifest.say_skipped(say)

    def take(self, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The rows at these ascending indices, as JSON values.

        Relative image paths become absolute, because the manifest of the date lies in another folder. Raises ValueError
        for a row that cannot be read.
        """
        picked = set(indices)
        for index, raw in enumerate(self._manifest.rows()):
            if index not in picked:
                continue
            if raw.unreadable is not None:
                raise ValueError(f"{raw.source}: {raw.unreadable}")
            row = _json_values(raw)
            if isinstance(row.get("images"), list) and row["images"]:
                self.has_images = True
                row["images"] = [_absolute(image, raw.file) for image in row["images"]]
            yield row


def _json_values(raw: RawRow) -> dict[str, Any]:
    """The values of a row; those of unknown columns as the index would have them."""
    extra = json.loads(extra_json(raw) or "{}")
    return {name: extra.get(name, value) for name, value in raw.values.items()}


def _absolute(image: Any, file: str) -> Any:
    path = image.get("path") if isinstance(image, Mapping) else None
    if not isinstance(path, str) or "://" in path:
        return image  # the render reports it when it is illegal
    try:
        return {**image, "path": split_options(resolve(path, parent(file)))[0]}
    except ValueError:
        return image
