"""Model files that are given as URIs, downloaded to a node once: `$LTX_RAY_CACHE/weights/<digest>/`.

One process of a node downloads, under a lock, and the others wait for it. A folder of the cache is complete from the
moment when it has its name. Processes hold its lock, shared, for as long as they live, and what is locked is never
removed.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from ltx_ray.checkpoints.checkpoint import gemma_folders
from ltx_ray.checkpoints.diffusers_layout import COMPONENTS, upsampler_folder
from ltx_ray.checkpoints.digests import cache_root, cached_digest, file_digest, writable_cache_root
from ltx_ray.checkpoints.lora import config_beside
from ltx_ray.checkpoints.model_paths import (
    files_below,
    in_order,
    is_folder,
    is_remote,
    pieces,
    remote_files,
    shown,
    size,
    version,
)
from ltx_ray.checkpoints.safetensors import read_header
from ltx_ray.config import ModelFiles, RemoteFile
from ltx_ray.storage.checksums import SHA256, comparable
from ltx_ray.storage.hub import HubFiles
from ltx_ray.storage.local_files import sync_folder
from ltx_ray.storage.locations import join, parent, split_options
from ltx_ray.storage.object_client import FileReplaced
from ltx_ray.storage.store import Store

#: Endings of the files of a folder that are downloaded: weights, configurations, tokenizers and chat templates.
_ENDINGS = (".safetensors", ".json", ".model", ".txt", ".jinja")
#: Bytes of a request. As many as `RANGES_AT_ONCE` are in memory.
_PART_BYTES = 8 * 2**20
#: Called with the bytes that have come and with how many there are.
OnBytes: TypeAlias = Callable[[int, int], None]

_lock = threading.Lock()
#: Descriptors of the locks that this process holds, by entry.
_held: dict[str, int] = {}


# --- on the driver -----------------------------------------------------------------------------------------------


def pinned(model: ModelFiles) -> ModelFiles:
    """`model` with what the driver knows of the files below each URI. Nodes take these files and no others.

    Raises ValueError when a file cannot be read.
    """
    wanted: dict[str, set[str]] = {}
    for path in filter(is_remote, model.paths()):
        wanted.setdefault(path, set()).update(_needed(model, path))
    try:
        remote = tuple((path, tuple(_seen(path, name) for name in sorted(names))) for path, names in wanted.items())
    except OSError as error:
        raise ValueError(f"the model's files cannot be read ({error})") from None
    whole = sum(file.size for _, files in remote for file in files)
    if model.cache_bytes is not None and whole > model.cache_bytes:
        raise ValueError(
            f"--weights-cache-gb: {model.cache_bytes / 1e9:g}, legal: at least {whole / 1e9:.1f}, the size of the "
            f"model's files"
        )
    return replace(model, remote=remote)


def _needed(model: ModelFiles, path: str) -> Iterator[str]:
    """Paths, relative to `path`, of the files that ranks open."""
    if not is_folder(path):
        yield ""
        is_lora = path == model.distilled_lora or any(path == lora.path for lora in model.loras)
        if is_lora and config_beside(read_header(path)) is not None:
            yield _BESIDE
        return
    folders: list[str] = []
    if path == model.checkpoint_path:
        folders += [join(path, name) for name in COMPONENTS]
    if path == model.gemma_root:
        folders += gemma_folders(path)
    if path == model.spatial_upsampler_path:
        folders.append(upsampler_folder(path))
    for name in files_below(path):
        # A folder's own files count, and not those of folders in it: a repository may hold other models there.
        if name.endswith(_ENDINGS) and parent(join(path, name)) in folders:
            yield name


#: Stands for the adapter_config.json beside a LoRA.
_BESIDE = "adapter_config.json"


def _location(path: str, relative: str) -> str:
    """Location of one file of a model at `path`."""
    if not relative:
        return path
    return join(parent(path) if relative == _BESIDE and not is_folder(path) else path, relative)


def _seen(path: str, relative: str) -> RemoteFile:
    location = _location(path, relative)
    return RemoteFile(relative, size(location), version(location), cached_digest(location))


# --- on a node ---------------------------------------------------------------------------------------------------


def on_this_node(model: ModelFiles) -> ModelFiles:
    """The same files as paths on this node, downloaded if they are not there yet.

    They stay there while this process lives. Raises ValueError for a file that is not what the driver has read, OSError
    when its store does not answer or the disk is full.
    """
    places = {path: fetch(path, files, model.cache_bytes) for path, files in model.remote}
    return model.in_place().at(places)


def fetch(
    path: str,
    files: Sequence[RemoteFile],
    cache_bytes: int | None = None,
    on_bytes: OnBytes = lambda done, total: None,
) -> str:
    """The path on this node of `files` of the model at `path`, downloaded if they are not there yet.

    `on_bytes` is told how many bytes have come, and of how many.
    """
    entry = writable_cache_root() / "weights" / _key(path, files)
    with _lock:
        if entry.name not in _held:
            entry.parent.mkdir(parents=True, exist_ok=True)
            _held[entry.name] = _open_lock(entry)
            _take(entry, path, files, cache_bytes, on_bytes)
    single = any(not file.relative for file in files)
    return str(entry / _name(path, "") if single else entry)


def _key(path: str, files: Sequence[RemoteFile]) -> str:
    lines = "".join(f"{_name(path, file.relative)} {file.size} {file.digest}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()[:32]


def _name(path: str, relative: str) -> str:
    """Name of a file in its folder of the cache."""
    return relative or os.path.basename(split_options(path)[0])


def _open_lock(entry: Path) -> int:
    # The file stays when the entry goes: another process may be about to lock it.
    return os.open(f"{entry}.lock", os.O_RDWR | os.O_CREAT, 0o666)


def _take(entry: Path, path: str, files: Sequence[RemoteFile], cache_bytes: int | None, on_bytes: OnBytes) -> None:
    """Have the entry complete and its lock, which is open, shared.

    Who downloads holds a lock of its own: those that wait for it must not wait for those that use the entry.
    """
    descriptor = _held[entry.name]
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not entry.is_dir():
            with _exclusively(Path(f"{entry}.download.lock")):
                if not entry.is_dir():  # another process may have made it by now
                    _download(entry, path, files, cache_bytes, on_bytes)
        os.utime(descriptor)  # says when it was used last
    except BaseException:
        os.close(_held.pop(entry.name))
        raise


def _download(entry: Path, path: str, files: Sequence[RemoteFile], cache_bytes: int | None, on_bytes: OnBytes) -> None:
    partial, total = _partial(entry), sum(file.size for file in files)
    # Two downloads may not count on the same bytes.
    with _exclusively(entry.parent / "room.lock"):
        _make_room(entry, total, cache_bytes)
        # A file without data, but of the final size, counts for others that make room at the same time.
        for file in files:
            target = partial / _name(path, file.relative)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                with open(f"{target}.part", "wb") as out:
                    out.truncate(file.size)
    before = 0
    for file in files:
        target = partial / _name(path, file.relative)
        if not target.exists():  # as it may, from a process that was killed
            for done in _download_file(target, _location(path, file.relative), file):
                on_bytes(before + done, total)
        before += file.size
    for folder in {(partial / _name(path, file.relative)).parent for file in files}:
        sync_folder(str(folder))
    partial.rename(entry)
    sync_folder(str(entry.parent))


def _partial(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.partial")


def _download_file(target: Path, location: str, file: RemoteFile) -> Iterator[int]:
    """Write the file in this version, by many ranges at once, and yield how many bytes have come.

    What arrives is compared with the store's checksum.
    """
    remote = remote_files(location)
    read = functools.partial(remote.read_range, "", version=file.version)
    part = Path(f"{target}.part")
    try:
        kept = _kept_checksums(location, file)
        name, whole = comparable(kept) or ("", None)
        with open(part, "r+b") as out:
            for block in in_order(read, pieces([(0, file.size)], _PART_BYTES)):
                if whole is not None:
                    whole.update(block)
                out.write(block)
                yield out.tell()
            out.flush()
            os.fsync(out.fileno())
    except (FileReplaced, FileNotFoundError) as error:
        raise ValueError(f"{shown(location)}: is not the file that the driver read ({error}); start again") from None
    found_and_expected = [("digest", file_digest(str(part)), file.digest)]
    if whole is not None:
        found_and_expected.append((name, whole.hexdigest(), kept[name]))
    for what, found, expected in found_and_expected:
        if found != expected:
            part.unlink()
            raise ValueError(
                f"{shown(location)}: has the {what} {found} on this node, legal: {expected}; it was damaged on its "
                f"way, or replaced"
            )
    part.rename(target)


def _kept_checksums(location: str, file: RemoteFile) -> Mapping[str, str]:
    """What the store of a file keeps of it as a whole, by the names of checksums."""
    if not isinstance(remote_files(location), HubFiles):
        return Store(location).stored_checksums("")
    sha256 = HubFiles.sha256(file.version)
    return {} if sha256 is None else {SHA256: sha256}


# --- room --------------------------------------------------------------------------------------------------------


@contextmanager
def _exclusively(lock: Path) -> Iterator[None]:
    """Hold the file's lock, which only one process has at a time."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make_room(entry: Path, needed: int, cache_bytes: int | None) -> None:
    """Remove what was used the longest time ago until `needed` bytes fit, under the bound and on the disk."""
    weights = entry.parent
    sizes = {key: _bytes_of(weights, key) for key in _keys(weights) if key != entry.name}
    on_disk = {key: _bytes_on_disk(weights / key) + _bytes_on_disk(_partial(weights / key)) for key in sizes}
    # Others have yet to write a part of what is theirs.
    promised = sum(max(0, size - on_disk[key]) for key, size in sizes.items())
    free = shutil.disk_usage(weights).free + _bytes_on_disk(_partial(entry)) - promised
    bound = float("inf") if cache_bytes is None else cache_bytes
    for key in sorted(sizes, key=lambda key: _used(weights / key)):
        if sum(sizes.values()) + needed <= bound and needed <= free:
            return
        if _remove_unused(weights / key):
            free += sizes.pop(key)
    if sum(sizes.values()) + needed > bound:
        raise OSError(
            f"{weights}: {needed / 1e9:.1f} GB do not fit into --weights-cache-gb {bound / 1e9:g} beside "
            f"{sum(sizes.values()) / 1e9:.1f} GB that other runs use"
        )
    if needed > free:
        raise OSError(f"{weights}: {needed / 1e9:.1f} GB are needed, and the disk has {free / 1e9:.1f} GB free")


def unfinished_bytes() -> int:
    """Bytes on this node's disk of downloads that are under way."""
    return sum(_bytes_on_disk(folder) for folder in (cache_root() / "weights").glob("*.partial"))


def _keys(weights: Path) -> set[str]:
    return {path.name.removesuffix(".partial") for path in weights.iterdir() if path.is_dir()}


def _bytes_of(weights: Path, key: str) -> int:
    """Bytes of an entry, those that are still to come included."""
    size = 0
    for folder in (weights / key, _partial(weights / key)):
        for file in folder.rglob("*"):
            with suppress(FileNotFoundError):
                size += 0 if file.is_dir() else file.stat().st_size
    return size


def _bytes_on_disk(folder: Path) -> int:
    blocks = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # renamed since
            blocks += file.stat().st_blocks
    return 512 * blocks


def _used(entry: Path) -> float:
    try:
        return os.stat(f"{entry}.lock").st_mtime
    except FileNotFoundError:
        return 0.0


def _remove_unused(entry: Path) -> bool:
    """Remove an entry, and what there is of an unfinished one, unless a process uses it."""
    descriptor = _open_lock(entry)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        if entry.is_dir():
            # Under its name, an entry is complete. A crash while it is removed must not leave a part of it there.
            shutil.rmtree(_partial(entry), ignore_errors=True)
            entry.rename(_partial(entry))
        shutil.rmtree(_partial(entry))
        return True
    finally:
        os.close(descriptor)
