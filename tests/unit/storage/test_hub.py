"""Files of the Hub as a model's URIs, through huggingface_hub and a server that answers as the Hub does."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from ltx_ray.checkpoints import model_paths, node_cache
from ltx_ray.checkpoints.digests import cached_digest
from ltx_ray.cli.app import app
from ltx_ray.config import ModelFiles
from ltx_ray.storage.hub import HubFiles, hub_location
from ltx_ray.storage.retry import RetryPolicy, StoreUnavailable
from tests.support.hub_server import COMMIT, HubServer

constants = pytest.importorskip("huggingface_hub.constants")
FILE = "hf://org/repo/x.safetensors"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub that huggingface_hub asks, with the folder of its repository, and a node on which nothing is yet."""
    (tmp_path / "repo").mkdir()
    hub = HubServer(tmp_path / "repo")
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    own = template.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", own)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # as no other test may ask the Hub
    monkeypatch.setenv("LTX_RAY_CACHE", str(tmp_path / "node"))
    monkeypatch.setattr(node_cache, "_held", {})
    model_paths.look_again()
    yield hub
    hub.close()
    model_paths.look_again()


def blob(hub: HubServer, size: int = 20_000_000) -> tuple[ModelFiles, bytes]:
    """A file of random bytes that stands for a model, as the driver has seen it, and its content."""
    content = os.urandom(size)
    (hub.folder / "x.safetensors").write_bytes(content)
    return node_cache.pinned(ModelFiles(FILE, "", "")), content


def files(seconds: float = 10.0, uri: str = "hf://org/repo") -> HubFiles:
    return HubFiles(uri, RetryPolicy(uri, seconds, wait=lambda seconds: None))


@pytest.mark.parametrize("uri", ["hf://org/repo", "hf://org/repo@v1", "hf://org/repo@refs%2Fpr%2F1/a/b.safetensors"])
def test_locations_of_the_hub(uri):
    assert hub_location(uri) == hub_location(uri + "/") == uri


@pytest.mark.slow
def test_files_and_folders_are_those_of_a_copy(hub, toy, tmp_path):
    shutil.copytree(toy["gemma_root"], hub.folder / "gemma")
    shutil.copy(toy["checkpoint_path"], hub.folder / "dev.safetensors")
    uris = {"hf://org/repo/gemma": "gemma_root", "hf://org/repo@v%2F1/dev.safetensors": "checkpoint_path"}
    for uri, path in uris.items():
        assert cached_digest(uri, tmp_path) == cached_digest(toy[path], tmp_path)
    assert model_paths.is_folder("hf://org/repo") and not model_paths.is_file("hf://org/repo/none")
    assert not model_paths.is_file("hf://org/repo") and not model_paths.is_folder("hf://org/repo/none")
    assert model_paths.files_below("hf://org/repo/gemma") == model_paths.files_below(toy["gemma_root"])
    place = node_cache.on_this_node(node_cache.pinned(ModelFiles("hf://org/repo/dev.safetensors", "", "")))
    assert Path(place.checkpoint_path).read_bytes() == Path(toy["checkpoint_path"]).read_bytes()


@pytest.mark.slow
def test_fetch_downloads_a_model_of_the_hub(hub, toy):
    for field in ("checkpoint_path", "spatial_upsampler_path", "distilled_lora"):
        shutil.copy(toy[field], hub.folder / f"{field}.safetensors")
    shutil.copytree(toy["gemma_root"], hub.folder / "gemma")
    options = [
        *("--checkpoint-path", "hf://org/repo@main/checkpoint_path.safetensors"),
        *("--spatial-upsampler-path", "hf://org/repo/spatial_upsampler_path.safetensors"),
        *("--distilled-lora", "hf://org/repo/distilled_lora.safetensors"),
        *("--gemma-root", "hf://org/repo/gemma"),
    ]
    done = CliRunner().invoke(app, ["fetch", *options])
    assert done.exit_code == 0, done.output
    places = [Path(line.rpartition(" in ")[2]) for line in done.output.splitlines()]
    assert places[0].read_bytes() == Path(toy["checkpoint_path"]).read_bytes()
    counts = hub.counts()
    assert (counts["commits"], counts["listings"]) == (2, 2), "of main and of no revision, and of two folders"
    assert set(Counter(path for method, path in hub.requests if method == "HEAD").values()) == {1}


def test_a_file_is_looked_up_once_and_nothing_else_is_listed(hub):
    """The Hub counts requests for files and pages of listings, and not those for their ranges."""
    pinned, content = blob(hub)
    for number in range(20):
        (hub.folder / f"{number}.json").write_text("{}")
    counts = hub.counts()
    assert counts["commits"] == 1 and counts["look-ups"] == 1 and counts["listings"] == 0, counts
    model_paths.look_again()
    hub.requests.clear()
    assert Path(node_cache.on_this_node(pinned).checkpoint_path).read_bytes() == content
    assert hub.counts() == {"look-ups": 1, "ranges": 3}, "on a node, which knows the commit"


def test_a_commit_needs_no_request(hub):
    (hub.folder / "x").write_bytes(b"content")
    assert files(uri=f"hf://org/repo@{COMMIT}").head("x")[0] == 7
    assert hub.counts() == {"look-ups": 1}


def test_a_listing_of_several_pages(hub):
    for name in ("a/b/x", "a/y", "z", *(f"a/{number}" for number in range(20))):
        (hub.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (hub.folder / name).write_bytes(name.encode())
    found = {name: size for name, size, _ in files().listed("a")}
    assert len(found) == 22 and found["b/x"] == 5
    assert len(list(files().listed(""))) == 23 and list(files().listed("none")) == []


def test_a_small_file_that_comes_whole_is_cut(hub):
    (hub.folder / "x").write_bytes(b"content")
    size, version = files().head("x")
    assert size == 7 and json.loads(version)["commit"] == COMMIT and HubFiles.sha256(version) is None
    assert files().read_range("x", 1, 3, version) == b"ont"


def test_a_large_file_that_would_come_whole_is_refused(hub, monkeypatch):
    monkeypatch.setattr("ltx_ray.storage.hub._MOST_WHOLE", 10_000)
    (hub.folder / "x").write_bytes(bytes(20_000))
    hub.faults["store"] = ["whole"]
    with pytest.raises(StoreUnavailable, match="a whole file comes where a range is asked for"):
        files(seconds=0.0).read_range("x", 1, 3, files().head("x")[1])


def test_the_hubs_own_sha256_is_compared(hub):
    hub.digests["x.safetensors"] = "0" * 64
    pinned, _ = blob(hub)
    with pytest.raises(ValueError, match=r"has the SHA-256 .* legal: 0000"):
        node_cache.on_this_node(pinned)


def test_a_file_that_has_changed_under_its_commit_is_refused(hub):
    pinned, content = blob(hub)
    (hub.folder / "x.safetensors").write_bytes(content[::-1])
    model_paths.look_again()
    with pytest.raises(ValueError, match=r"x\.safetensors: has the digest"):
        node_cache.on_this_node(pinned)
    assert not [path for path in Path(os.environ["LTX_RAY_CACHE"], "weights").iterdir() if path.suffix == ""]


def test_a_file_that_has_become_shorter_is_refused(hub, monkeypatch):
    pinned, content = blob(hub)
    (hub.folder / "x.safetensors").write_bytes(content[:-1000])
    monkeypatch.setattr("ltx_ray.storage.store.RETRY_SECONDS", 0.0)
    model_paths.look_again()
    with pytest.raises(OSError, match=r"bytes came where .* were asked for"):
        node_cache.on_this_node(pinned)


def test_cut_connections_and_a_busy_hub_are_asked_again(hub):
    pinned, content = blob(hub)
    model_paths.look_again()
    hub.faults = {"resolve": [429, 503], "store": ["cut", 503, "cut", 500]}
    assert Path(node_cache.on_this_node(pinned).checkpoint_path).read_bytes() == content
    assert not any(hub.faults.values())


def test_an_address_that_is_not_valid_any_more_is_asked_for_again(hub):
    (hub.folder / "x").write_bytes(bytes(range(200)) * 100)
    there = files()
    _, version = there.head("x")
    assert there.read_range("x", 1, 3, version) == bytes((1, 2, 3))
    hub.faults["store"] = ["expired"]
    assert there.read_range("x", 4, 3, version) == bytes((4, 5, 6))
    assert hub.counts()["look-ups"] == 2
    hub.faults["store"] = [403, 403]
    with pytest.raises(PermissionError, match="403"):
        there.read_range("x", 1, 3, version)


def test_the_token_goes_to_the_hub_and_not_to_the_store(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (hub.folder / "large").write_bytes(bytes(5000))
    (hub.folder / "small").write_bytes(bytes(50))
    hub.token, there = "hf_secret", files()
    for name in ("large", "small"):
        assert there.read_range(name, 1, 3, there.head(name)[1]) == bytes(3)
    assert hub.tokens["store"] == {None} and hub.tokens["resolve"] == hub.tokens["api"] == {"hf_secret"}


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("hf://org/none/x", "there is no such repository, or the token (HF_TOKEN) may not read it (HTTP status 404)"),
        ("hf://org/repo@none/x", "the repository has no such revision (HTTP status 404)"),
        ("hf://org/repo/none", "no such object"),
    ],
)
def test_what_is_not_there_is_a_mistake_of_the_user_and_said_at_once(hub, uri, told):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        model_paths.size(uri)
    assert told in str(caught.value)


def test_a_gated_repository_says_what_to_do(hub):
    (hub.folder / "x").write_bytes(b"content")
    hub.token = "hf_of_another"
    with pytest.raises(ValueError, match=r"the repository is gated: accept its terms on the Hub, and set HF_TOKEN"):
        model_paths.size("hf://org/repo/x")


def test_a_hub_that_is_not_reached_is_no_traceback(hub, monkeypatch, tmp_path):
    hub.close()
    monkeypatch.setattr("ltx_ray.storage.store.RETRY_SECONDS", 0.0)
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "prompt": "a"}\n')
    model_paths.look_again()
    done = CliRunner().invoke(app, ["plan", str(tmp_path / "rows.jsonl"), "--checkpoint-path", FILE])
    assert done.exit_code == 2 and "looking up failed (tried once): " in done.output, done.output
    assert "Traceback" not in done.output
