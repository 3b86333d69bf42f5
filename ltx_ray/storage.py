"""One small wrapper over pyarrow.fs: put-then-publish, list, exists; local paths, s3:// and gs://."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from urllib.parse import quote

import pyarrow.fs as pafs


class Store:
    """A root folder on a local disk or in an object store; paths are relative to it, with '/'.

    Nothing is ever seen half-written: local files are renamed into place, object stores show an
    object only when its upload is complete. Credentials, region and endpoint of an object store come from
    the environment (AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL ...), or from options behind a '?' in
    the URI as pyarrow has them (`s3://bucket/path?region=eu-west-1`). Keys stand in a URI as they are, not
    percent-encoded.
    """

    def __init__(self, uri: str):
        self.uri = uri.rstrip("/") if len(uri) > 1 else uri
        if "://" in uri:
            place, options = split_options(uri)
            scheme, _, rest = place.rstrip("/").partition("://")
            host, slash, key = rest.partition("/")
            self.fs, self.root = pafs.FileSystem.from_uri(f"{scheme}://{host}{slash}{quote(key)}{options}")
        else:
            self.fs, self.root = pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
        self.is_local = isinstance(self.fs, pafs.LocalFileSystem)

    def path(self, relative: str = "") -> str:
        """Full path of `relative` within the filesystem."""
        return f"{self.root.rstrip('/')}/{relative}" if relative else self.root

    def check_writable(self) -> None:
        """Raise ValueError naming the URI unless a file can be made and removed under it."""
        probe = f"_probe-{secrets.token_hex(4)}"
        try:
            self.write_bytes(probe, b"")
            self.delete(probe)
        except Exception as error:  # every filesystem raises its own kinds
            raise ValueError(f"--output: {self.uri}, cannot be written ({error})") from None

    def exists(self, relative: str) -> bool:
        return self.fs.get_file_info(self.path(relative)).type != pafs.FileType.NotFound

    def list(self, folder: str, recursive: bool = False) -> list[str]:
        """Names (without folders) of the files in `folder`, sorted; empty when there is no such folder."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True, recursive=recursive)
        return sorted(info.base_name for info in self.fs.get_file_info(selector) if info.type == pafs.FileType.File)

    def read_bytes(self, relative: str) -> bytes:
        """Raises FileNotFoundError when it is not there."""
        with self.fs.open_input_file(self.path(relative)) as file:
            return file.read()

    def write_bytes(self, relative: str, data: bytes) -> None:
        """Write a whole file, replacing an older one at once."""
        target = self.path(relative)
        if self.is_local:
            temporary = _temporary_beside(target)
            try:
                temporary.write_bytes(data)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        else:
            with self.fs.open_output_stream(target) as file:
                file.write(data)

    def append_text(self, relative: str, text: str) -> None:
        """Append to a local file. Object stores cannot: the caller rewrites the whole there."""
        assert self.is_local
        Path(self.path(relative)).parent.mkdir(parents=True, exist_ok=True)
        with open(self.path(relative), "a", encoding="utf-8") as file:
            file.write(text)

    def publish(self, local_file: str, relative: str) -> None:
        """Move the finished `local_file` to `relative`."""
        target = self.path(relative)
        if self.is_local:
            temporary = _temporary_beside(target)
            try:
                shutil.move(local_file, temporary)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        else:
            local = pafs.LocalFileSystem()
            pafs.copy_files(local_file, target, source_filesystem=local, destination_filesystem=self.fs)
            os.unlink(local_file)

    def delete(self, relative: str) -> None:
        """Remove a file; nothing happens when it is not there."""
        try:
            self.fs.delete_file(self.path(relative))
        except FileNotFoundError:
            pass

    def scratch_dir(self) -> str | None:
        """A folder on the same local disk for files that will be published, or None for the default."""
        if not self.is_local:
            return None
        folder = Path(self.root) / "_tmp"
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)


def split_options(uri: str) -> tuple[str, str]:
    """A URI without its options, and these with their '?'; a local path has none."""
    if "://" not in uri:
        return uri, ""
    place, mark, options = uri.partition("?")
    return place, mark + options


def join(folder: str, name: str) -> str:
    """Path or URI of `name` below `folder`, with the folder's options."""
    place, options = split_options(folder)
    return f"{place.rstrip('/')}/{name}{options}" if "://" in folder else os.path.join(folder, name)


def parent(uri: str) -> str:
    """Path or URI of the folder that holds `uri`, with its options."""
    place, options = split_options(uri)
    return os.path.dirname(place) + options


def _temporary_beside(target: str) -> Path:
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")
