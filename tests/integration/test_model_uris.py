"""Models in an object store: looked at by ranges, downloaded to a node once, and the same clips as from a disk."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from ltx_ray.checkpoints import model_paths, node_cache
from ltx_ray.checkpoints.digests import cached_digest
from ltx_ray.cli.app import app
from ltx_ray.config import ModelFiles
from ltx_ray.driver import progress
from ltx_ray.storage import store
from ltx_ray.storage.retry import StoreUnavailable
from ltx_ray.storage.store import Store
from tests.support.google_store import GoogleStore
from tests.support.local_cluster import wait_for
from tests.support.s3_faults import Faults, Proxy

FIELDS = ("checkpoint_path", "gemma_root", "spatial_upsampler_path", "distilled_lora")


@pytest.fixture
def proxy(s3, monkeypatch):
    """A proxy that the environment names as the endpoint. It injects no fault until a test asks for some."""
    proxy = Proxy(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    model_paths.remote_files.cache_clear()
    yield proxy
    proxy.close()
    model_paths.remote_files.cache_clear()


@pytest.fixture(autouse=True)
def node(tmp_path, monkeypatch) -> Path:
    """The cache of a node on which nothing is yet."""
    monkeypatch.setenv("LTX_RAY_CACHE", str(tmp_path / "node"))
    monkeypatch.setattr(node_cache, "_held", {})
    model_paths.look_again()
    return tmp_path / "node" / "weights"


def upload(paths: dict[str, str], bucket: str) -> dict[str, str]:
    """Copy the model's files into the bucket; their URIs by option name."""
    store, uris = Store(bucket), {}
    for field in FIELDS:
        path = Path(paths[field])
        for file in [path] if path.is_file() else filter(Path.is_file, path.rglob("*")):
            store.write_bytes(str(file.relative_to(path.parent)), file.read_bytes())
        uris[field] = f"{bucket}/{path.name}"
    return uris


def blob(bucket: str, size: int = 40_000_000, name: str = "big.safetensors") -> tuple[ModelFiles, bytes]:
    """A file of random bytes that stands for a model, and its content."""
    content = os.urandom(size)
    Store(bucket).write_bytes(name, content)
    model_paths.look_again()
    return ModelFiles(f"{bucket}/{name}", "", ""), content


def arguments(files: dict[str, str]) -> list[str]:
    return [text for field in FIELDS for text in (f"--{field.replace('_', '-')}", files[field])]


def gets(proxy: Proxy) -> int:
    """Bytes of ranges that were asked for."""
    total = 0
    for method, _, headers in proxy.requests:
        spans = {name.lower(): value for name, value in headers.items()}.get("range", "")
        if method == "GET" and spans.startswith("bytes="):
            first, _, last = spans.removeprefix("bytes=").partition("-")
            total += int(last) - int(first) + 1
    return total


# --- the driver --------------------------------------------------------------------------------------------------


def test_digests_are_those_of_the_content(toy, bucket, tmp_path):
    uris = upload(toy, bucket)
    for scheme in (1, 2):
        for field in FIELDS:
            assert cached_digest(uris[field], tmp_path, scheme) == cached_digest(toy[field], tmp_path, scheme), field


def test_a_plan_from_uris_is_that_from_a_disk_and_downloads_nothing(toy, bucket, tmp_path, node):
    (manifest := tmp_path / "rows.jsonl").write_text('{"id": "a", "prompt": "a"}\n')
    uris = upload(toy, bucket)
    here, there = (
        CliRunner().invoke(app, ["plan", str(manifest), "--resolved", *arguments(files)]) for files in (toy, uris)
    )
    assert there.exit_code == here.exit_code == 0
    there_lines, here_lines = there.output.splitlines(), here.output.splitlines()
    assert there_lines[:-1] == here_lines[: len(there_lines) - 1], "but for the disk that each needs"
    assert "(LTX_RAY_CACHE)" in there_lines[-1] and "LTX_RAY_CACHE" not in here.output
    assert not node.exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda uri: f"{uri}x", "{}x: cannot be read (no such object)"),
        (lambda uri: "s3://no-such-bucket-at-all/model.safetensors", "s3://no-such-bucket-at-all/model.safetensors: "),
        (lambda uri: "hf://only-one-name", "--checkpoint-path: hf://only-one-name, names no file of the Hub"),
        (lambda uri: "http://host/x.safetensors", "--checkpoint-path: http://host/x.safetensors: unsupported scheme"),
    ],
)
def test_a_uri_that_names_nothing_is_a_mistake_of_the_user(toy, bucket, tmp_path, change, message):
    (manifest := tmp_path / "rows.jsonl").write_text('{"id": "a", "prompt": "a"}\n')
    uris = upload(toy, bucket)
    files = {**uris, "checkpoint_path": change(uris["checkpoint_path"])}
    done = CliRunner().invoke(app, ["plan", str(manifest), *arguments(files)])
    assert done.exit_code == 2 and message.format(uris["checkpoint_path"]) in done.output, done.output


def test_a_truncated_object_is_refused_like_a_truncated_file(toy, bucket, tmp_path):
    (manifest := tmp_path / "rows.jsonl").write_text('{"id": "a", "prompt": "a"}\n')
    uris = upload(toy, bucket)
    name = Path(toy["checkpoint_path"]).name
    Store(bucket).write_bytes(name, Path(toy["checkpoint_path"]).read_bytes()[:-100])
    done = CliRunner().invoke(app, ["plan", str(manifest), *arguments(uris)])
    assert done.exit_code == 2 and f"{uris['checkpoint_path']}: truncated" in done.output, done.output


# --- a node ------------------------------------------------------------------------------------------------------


def test_fetch_downloads_what_ranks_open_once(toy, proxy, bucket, node):
    uris = upload(toy, bucket)
    done = CliRunner().invoke(app, ["fetch", *arguments(uris)])
    assert done.exit_code == 0, done.output
    places = [Path(line.rpartition(" in ")[2]) for line in done.output.splitlines()]
    for field, place in zip(FIELDS, places, strict=True):
        path = Path(toy[field])
        files = [path] if path.is_file() else sorted(filter(Path.is_file, path.iterdir()))
        for file in files:
            copy = place if path.is_file() else place / file.name
            assert copy.read_bytes() == file.read_bytes()
    node_cache._held.clear()  # as in another process
    proxy.requests.clear()
    model = node_cache.pinned(ModelFiles(**uris))
    before = gets(proxy)
    found = node_cache.on_this_node(model)
    assert gets(proxy) == before and str(node) in found.checkpoint_path and os.path.isdir(found.gemma_root)


def test_whoever_fetches_is_told_how_much_has_come(toy, bucket, node, monkeypatch):
    monkeypatch.setattr(progress, "_LOG_PERIOD", 0.0)
    uris = upload(toy, bucket)
    done = CliRunner().invoke(app, ["fetch", *arguments(uris)])
    assert done.exit_code == 0, done.output
    whole = Path(toy["checkpoint_path"]).stat().st_size // 10**6
    assert f"{whole} of {whole} MB of {uris['checkpoint_path']} | " in done.stderr
    node_cache._held.clear()
    assert CliRunner().invoke(app, ["fetch", *arguments(uris)]).stderr == "", "it is there already"


def test_a_download_of_several_files_is_one(toy, bucket, node):
    uris, told = upload(toy, bucket), []
    files = next(files for path, files in node_cache.pinned(ModelFiles(**uris)).remote if path == uris["gemma_root"])
    node_cache.fetch(uris["gemma_root"], files, None, lambda done, total: told.append((done, total)))
    whole = sum(file.size for file in files)
    assert len(files) > 1 and told == sorted(told) and told[-1] == (whole, whole)


def test_cut_connections_and_throttling_cost_retries_only(proxy, bucket):
    model, content = blob(bucket)
    pinned = node_cache.pinned(model)
    proxy.faults = Faults(("cut_response", "slow_down", "lost_response", "error"), ("GET",), probability=0.3, seed=3)
    assert Path(node_cache.on_this_node(pinned).checkpoint_path).read_bytes() == content
    met = Counter({kind: n for (_, kind), n in proxy.faults.met.items()})
    assert met["cut_response"] and met["slow_down"]


def test_a_file_alone_needs_no_right_to_list(proxy, bucket):
    model, _ = blob(bucket)
    proxy.requests.clear()
    assert cached_digest(model.checkpoint_path) and not model_paths.is_folder(model.checkpoint_path)
    assert not [path for _, path, _ in proxy.requests if "list-type" in path or "prefix" in path]


def test_a_store_that_stays_silent_leaves_nothing_under_the_name(proxy, bucket, node, monkeypatch):
    model, content = blob(bucket, 20_000_000)
    pinned = node_cache.pinned(model)
    monkeypatch.setattr(store, "RETRY_SECONDS", 0.0)
    model_paths.remote_files.cache_clear()
    monkeypatch.setattr(store, "Store", lambda uri: Store(uri, retry_seconds=0.0))
    proxy.faults = Faults(("error",), ("GET",), probability=1.0)
    with pytest.raises(StoreUnavailable):
        node_cache.on_this_node(pinned)
    assert not [path for path in node.iterdir() if path.is_dir() and path.suffix != ".partial"]
    proxy.faults = Faults()
    assert Path(node_cache.on_this_node(pinned).checkpoint_path).read_bytes() == content


def test_a_file_that_was_replaced_since_is_refused(bucket, node):
    model, content = blob(bucket, 20_000_000)
    pinned = node_cache.pinned(model)
    Store(bucket).write_bytes("big.safetensors", content[::-1])
    with pytest.raises(ValueError, match=r"big\.safetensors: is not the file that the driver read .*replaced"):
        node_cache.on_this_node(pinned)
    assert not [path for path in node.iterdir() if path.is_dir() and path.suffix != ".partial"]


@pytest.mark.parametrize("wrong", ["digest", "size"])
def test_a_digest_or_a_size_that_does_not_match_is_refused(bucket, node, wrong, monkeypatch):
    monkeypatch.setattr(store, "Store", lambda uri: Store(uri, retry_seconds=0.0))
    model_paths.remote_files.cache_clear()
    model, _ = blob(bucket, 9_000_000)
    pinned = node_cache.pinned(model)
    ((path, (file,)),) = pinned.remote
    bad = replace(file, digest="0" * 32) if wrong == "digest" else replace(file, size=file.size + 1000)
    error, text = (ValueError, "has the digest") if wrong == "digest" else (OSError, "bytes came|range|Range")
    with pytest.raises(error, match=text):
        node_cache.on_this_node(replace(pinned, remote=((path, (bad,)),)))
    assert not [path for path in node.iterdir() if path.is_dir() and path.suffix != ".partial"]


def test_bytes_that_no_sample_covers_are_compared_with_the_stores_checksum(bucket, monkeypatch):
    model, _ = blob(bucket, 9_000_000)
    pinned = node_cache.pinned(model)
    for name, digits in (("SHA-256", 64), ("CRC32", 8)):
        monkeypatch.setattr(Store, "stored_checksums", lambda self, relative, kept={name: "0" * digits}: kept)
        with pytest.raises(ValueError, match=rf"has the {name} .* legal: 0000"):
            node_cache.on_this_node(pinned)


TAKE = """
import pickle, sys
from ltx_ray.checkpoints.node_cache import on_this_node
place = on_this_node(pickle.load(open(sys.argv[1], "rb"))).checkpoint_path
print(place, flush=True)
sys.stdin.read()
"""


def processes(pinned: ModelFiles, folder: Path, count: int) -> list[subprocess.Popen]:
    """Processes that take the model at once, and keep it until their input ends."""
    import pickle

    (folder / "model").write_bytes(pickle.dumps(pinned))
    command = [sys.executable, "-c", TAKE, str(folder / "model")]
    return [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)]


def test_of_two_processes_one_downloads_and_what_is_in_use_stays(proxy, bucket, node, tmp_path):
    model, content = blob(bucket)
    pinned = node_cache.pinned(model)
    before = gets(proxy)
    users = processes(pinned, tmp_path, 2)
    places = [user.stdout.readline().strip() for user in users]
    assert places[0] == places[1] and Path(places[0]).read_bytes() == content
    assert gets(proxy) - before == len(content)

    # While they live, the files stay, however little room there is.
    other, _ = blob(bucket, 30_000_000, "other.safetensors")
    bounded = node_cache.pinned(replace(other, cache_bytes=50_000_000))
    with pytest.raises(OSError, match=r"0\.0 GB do not fit into --weights-cache-gb 0\.05 beside 0\.0 GB"):
        node_cache.on_this_node(bounded)
    assert Path(places[0]).read_bytes() == content
    for user in users:
        user.communicate()
    node_cache.on_this_node(bounded)
    assert not Path(places[0]).exists()


def test_a_download_that_was_killed_is_taken_over(proxy, bucket, node, tmp_path):
    model, content = blob(bucket)
    pinned = node_cache.pinned(model)
    proxy.faults = Faults(("stall",), ("GET",), pattern="big", probability=0.5, seconds=3600.0)
    (user,) = processes(pinned, tmp_path, 1)
    wait_for(lambda: list(node.glob("*.partial/*.part")), "part of the download")
    user.kill()
    user.communicate()
    assert list(node.glob("*.partial"))
    proxy.faults = Faults()
    assert Path(node_cache.on_this_node(pinned).checkpoint_path).read_bytes() == content
    assert not list(node.glob("*.partial"))


def test_what_was_used_the_longest_time_ago_goes_first(bucket, node):
    places = {}
    for number, name in enumerate(("a", "b", "c")):
        model, _ = blob(bucket, 9_000_000, name)
        places[name] = Path(node_cache.on_this_node(node_cache.pinned(model)).checkpoint_path)
        lock = Path(f"{places[name].parent}.lock")
        os.utime(lock, (number, number))
    for descriptor in node_cache._held.values():
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
    node_cache._held.clear()
    model, _ = blob(bucket, 9_000_000, "d")
    node_cache.on_this_node(node_cache.pinned(replace(model, cache_bytes=30_000_000)))
    assert {name: place.exists() for name, place in places.items()} == {"a": False, "b": True, "c": True}


def test_a_cache_that_is_smaller_than_the_model_is_refused_by_the_driver(bucket):
    model, _ = blob(bucket, 9_000_000)
    with pytest.raises(ValueError, match=r"--weights-cache-gb: 0\.005, legal: at least 0\.0, the size"):
        node_cache.pinned(replace(model, cache_bytes=5_000_000))


def test_a_run_from_uris_gives_the_clips_of_a_run_from_a_disk(toy, bucket, runner, node):
    uris = upload(toy, bucket)
    row = {"id": "a", "prompt": "a", "width": 64, "height": 64, "num_frames": 9, "num_inference_steps": 3}
    manifest = runner.manifest([row])
    rows = []
    for name, files in (("here", toy), ("there", uris)):
        assert (
            runner.render(manifest, runner.folder / name, fake=False, model=ModelFiles(**files), stage1=1, stage2=0)
            == 0
        )
        rows.append(runner.index(runner.folder / name)["a"])
    assert rows[0]["latents_sha256"] == rows[1]["latents_sha256"] and rows[0]["item_id"] == rows[1]["item_id"]


# --- Google's store ----------------------------------------------------------------------------------------------


@pytest.fixture
def google() -> Iterator[tuple[GoogleStore, ModelFiles, bytes]]:
    """Google's store with a file of random bytes that stands for a model, as the driver has seen it."""
    google, content = GoogleStore("bucket"), os.urandom(20_000_000)
    google.objects["m/big.safetensors"] = (1, content)
    uri = f"gs://anonymous@bucket/m/big.safetensors?scheme=http&endpoint_override={google.address}"
    yield google, node_cache.pinned(ModelFiles(uri, "", "")), content
    google.close()


def test_a_model_of_googles_store(google, node):
    store, pinned, content = google
    store.faults = ["cut", 503, "cut", 429]
    place = Path(node_cache.on_this_node(pinned).checkpoint_path)
    assert place.read_bytes() == content and place.name == "big.safetensors" and store.faults == []
    folder = pinned.checkpoint_path.replace("/big.safetensors", "")
    assert model_paths.is_folder(folder) and model_paths.files_below(folder) == ["big.safetensors"]
    assert not model_paths.is_file(pinned.checkpoint_path.replace("big", "none"))


@pytest.mark.parametrize("replaced", [True, False])
def test_other_bytes_of_googles_store_are_refused(google, node, replaced):
    """With a generation of their own, or as if they had been damaged on their way."""
    store, pinned, content = google
    store.objects["m/big.safetensors"] = (2 if replaced else 1, content[::-1])
    told = "is not the file that the driver read" if replaced else "has the digest"
    with pytest.raises(ValueError, match=rf"big\.safetensors.*: {told}"):
        node_cache.on_this_node(pinned)
    assert not [path for path in node.iterdir() if path.is_dir() and path.suffix != ".partial"]


def test_a_file_of_googles_store_that_has_become_shorter_is_refused(google, node, monkeypatch):
    server, pinned, content = google
    server.objects["m/big.safetensors"] = (1, content[:-1000])
    monkeypatch.setattr(store, "Store", lambda uri: Store(uri, retry_seconds=0.0))
    model_paths.look_again()
    with pytest.raises(OSError, match=r"bytes came|range"):
        node_cache.on_this_node(pinned)
    assert not [path for path in node.iterdir() if path.is_dir() and path.suffix != ".partial"]
