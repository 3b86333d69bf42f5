"""Files of the Hub as a model's URIs, over a filesystem that answers as huggingface_hub's does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from ltx_ray.checkpoints import model_paths, node_cache
from ltx_ray.checkpoints.digests import cached_digest
from ltx_ray.config import ModelFiles
from ltx_ray.storage.hub import HubFiles, hub_location
from ltx_ray.storage.retry import RetryPolicy

huggingface_hub = pytest.importorskip("huggingface_hub")
COMMIT = "c0ffee"


class FakeSystem:
    """`folder` as the repository org/repo at COMMIT. `errors` are raised first, one for each read."""

    def __init__(self, folder: Path):
        self.folder, self.errors, self.sha256 = folder, [], None

    def _local(self, path: str) -> Path:
        repository, _, rest = path.partition(f"@{COMMIT}")
        assert repository == "org/repo", path
        return self.folder / rest.strip("/")

    def info(self, path: str) -> dict[str, Any]:
        local = self._local(path)
        if not local.exists():
            raise FileNotFoundError(path)
        kind = "directory" if local.is_dir() else "file"
        lfs = {"sha256": self.sha256} if self.sha256 else None
        return {"name": path, "type": kind, "size": local.stat().st_size, "lfs": lfs, "blob_id": "b10b"}

    def find(self, path: str, detail: bool) -> dict[str, Any]:
        local = self._local(path)
        if not local.exists():
            raise FileNotFoundError(path)
        inside = [local] if local.is_file() else filter(Path.is_file, local.rglob("*"))
        names = [f"org/repo@{COMMIT}/{file.relative_to(self.folder)}" for file in inside]
        return {name: self.info(name) for name in names}

    def open(self, path: str, mode: str, cache_type: str) -> Any:
        if self.errors:
            raise self.errors.pop(0)
        return open(self._local(path), mode)


@pytest.fixture
def system(tmp_path, monkeypatch) -> FakeSystem:
    (tmp_path / "repo").mkdir()
    system = FakeSystem(tmp_path / "repo")
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: system)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda self, repo, revision: SimpleNamespace(sha=COMMIT))
    monkeypatch.setenv("LTX_RAY_CACHE", str(tmp_path / "node"))
    monkeypatch.setattr(node_cache, "_held", {})
    for cached in (model_paths.remote_files, model_paths._head, model_paths._below, model_paths._block):
        cached.cache_clear()
    return system


def failure(status: int) -> Exception:
    response = httpx.Response(status, request=httpx.Request("GET", "http://hub"))
    return huggingface_hub.errors.HfHubHTTPError(f"{status} from the hub", response=response)


@pytest.mark.parametrize("uri", ["hf://org/repo", "hf://org/repo@v1", "hf://org/repo@refs%2Fpr%2F1/a/b.safetensors"])
def test_locations_of_the_hub(uri):
    assert hub_location(uri) == hub_location(uri + "/") == uri


def test_files_and_folders_are_those_of_a_copy(system, toy, tmp_path):
    (system.folder / "gemma").symlink_to(toy["gemma_root"])
    (system.folder / "dev.safetensors").symlink_to(toy["checkpoint_path"])
    for uri, path in (("hf://org/repo/gemma", "gemma_root"), ("hf://org/repo@v1/dev.safetensors", "checkpoint_path")):
        assert cached_digest(uri, tmp_path) == cached_digest(toy[path], tmp_path)
    assert model_paths.is_folder("hf://org/repo") and not model_paths.is_file("hf://org/repo/none")
    place = node_cache.on_this_node(node_cache.pinned(ModelFiles("hf://org/repo/dev.safetensors", "", "")))
    assert Path(place.checkpoint_path).read_bytes() == Path(toy["checkpoint_path"]).read_bytes()


def test_the_hubs_own_sha256_is_compared(system):
    (system.folder / "x.safetensors").write_bytes(bytes(1000))
    system.sha256 = "0" * 64
    with pytest.raises(ValueError, match=r"has the SHA-256 .* legal: 0000"):
        node_cache.on_this_node(node_cache.pinned(ModelFiles("hf://org/repo/x.safetensors", "", "")))


def test_a_busy_hub_is_asked_again_and_a_forbidden_file_is_not(system):
    (system.folder / "x").write_bytes(b"content")
    files = HubFiles("hf://org/repo", RetryPolicy("hf://org/repo", 10.0, wait=lambda seconds: None))
    size, version = files.head("x")
    assert size == 7 and json.loads(version)["commit"] == COMMIT
    system.errors = [failure(429), failure(503)]
    assert files.read_range("x", 1, 3, version) == b"ont"
    system.errors = [failure(403), failure(403)]
    with pytest.raises(PermissionError, match="403"):
        files.read_range("x", 1, 3, version)
    assert len(system.errors) == 1
