"""Model files checked by their headers: what is refused and why, and digests with their cache."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ltx_ray.checkpoints import digests
from ltx_ray.checkpoints.checkpoint import (
    PIECES,
    check_parallel,
    check_transformer,
    check_upsampler,
    open_checkpoint,
    parse_generation,
)
from ltx_ray.checkpoints.digests import cached_digest, file_digest
from ltx_ray.checkpoints.safetensors import read_header
from ltx_ray.checkpoints.transformer_keys import TRANSFORMER_PREFIX, transformer_shapes
from tests.support.checkpoint_files import BLOCK, CHECKPOINT, CONFIG, checkpoint
from tests.support.samples import write_safetensors


def refused(path: str) -> str:
    with pytest.raises(ValueError) as caught:
        read_header(path)
    assert path in str(caught.value)
    return str(caught.value)


# --- headers -------------------------------------------------------------------------------------


def test_a_header_lists_tensors_and_metadata(tmp_path):
    header = read_header(checkpoint(tmp_path))
    info = header.tensors[f"model.diffusion_model.{BLOCK}.bias"]
    assert (info.dtype, info.shape, info.end - info.start) == ("F32", (8,), 32)
    assert header.metadata["model_version"] == "2.3.0"
    assert header.config["transformer"]["num_attention_heads"] == 4
    assert header.size == os.path.getsize(header.path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "cannot be read" in refused(str(tmp_path / "none.safetensors"))
    assert "cannot be read" in refused(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        b"\x80\x02}q\x00" * 100,
        b"<!DOCTYPE html><html>" * 50,
        struct.pack("<Q", 4) + b"{nil",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 0),
        struct.pack("<Q", 7) + b'{"a":1}',
        struct.pack("<Q", 8) + b'{"a":{}}',
        struct.pack("<Q", 18) + b'{"__metadata__":7}',
        struct.pack("<Q", 38) + b'{"__metadata__":{"model_version":2.3}}',
        struct.pack("<Q", 3) + b'"\xff"',
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 55) + b'{"a":{"dtype":["x"],"shape":[1],"data_offsets":[0,4]} } '[:55],
        struct.pack("<Q", 56) + b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}  '[:56],
    ],
)
def test_a_file_that_is_not_safetensors_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert "not a safetensors file" in refused(str(path))


def test_a_truncated_download(tmp_path):
    path = Path(checkpoint(tmp_path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert f"truncated, {len(whole) - 1} bytes where its header promises {len(whole)}" in refused(str(path))
    path.write_bytes(whole[:40])
    assert "cut off inside its header" in refused(str(path))


@pytest.mark.parametrize("change", [{"shape": [8, 7]}, {"dtype": "F16"}, {"data_offsets": [-4, 28]}])
def test_a_header_whose_sizes_contradict_each_other(tmp_path, change):
    table = {"x": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]} | change}
    header = json.dumps(table).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(32))
    assert "corrupt, x is" in refused(str(path))


@pytest.mark.parametrize("config", ["{", "[]", "7"])
def test_a_config_that_is_not_a_json_object_is_refused(tmp_path, config):
    with pytest.raises(ValueError, match="metadata field 'config'"):
        _ = read_header(checkpoint(tmp_path, config=config)).config


# --- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_of_the_supported_generation_opens(tmp_path):
    found = open_checkpoint(checkpoint(tmp_path))
    assert (found.model_version, found.transformer.num_layers, found.transformer.video.heads) == ("2.3.0", 1, 4)
    assert found.linear_layers == {BLOCK: (8, 6)}, "neither connectors nor biases nor the VAE"


@pytest.mark.parametrize("prefix", PIECES)
def test_a_file_that_lacks_a_piece_is_refused(tmp_path, prefix):
    path = checkpoint(tmp_path, tensors={k: v for k, v in CHECKPOINT.items() if not k.startswith(prefix)})
    with pytest.raises(ValueError, match=f"{path}: has no {PIECES[prefix]} "):
        open_checkpoint(path)


def test_fp8_weights_are_read_with_their_scales(tmp_path):
    metadata = {"model_version": "2.3", "config": CONFIG}
    weight = f"{TRANSFORMER_PREFIX}{BLOCK}.weight"
    tensors = {**CHECKPOINT, f"{weight}_scale": (), weight.replace(".weight", ".input_scale"): ()}
    path = write_safetensors(tmp_path / "fp8.safetensors", tensors, metadata, dtype="F8_E4M3")
    found = open_checkpoint(path)
    assert found.tensors.keys() == open_checkpoint(checkpoint(tmp_path)).tensors.keys()
    assert found.tensors[f"{BLOCK}.weight"].scale.key == f"{weight}_scale"
    assert found.tensors[f"{BLOCK}.bias"].scale is None
    for name, shape in ((f"{weight}_scale", (8,)), (f"{TRANSFORMER_PREFIX}other.weight_scale", ())):
        path = write_safetensors(tmp_path / "fp8.safetensors", {**CHECKPOINT, name: shape}, metadata, dtype="F8_E4M3")
        with pytest.raises(ValueError, match="legal: one number, for a tensor in the file"):
            open_checkpoint(path)


def test_weights_of_other_quantized_dtypes_are_refused(tmp_path):
    metadata = {"model_version": "2.3", "config": CONFIG}
    path = write_safetensors(tmp_path / "int8.safetensors", CHECKPOINT, metadata, dtype="I8")
    with pytest.raises(ValueError) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: 3 of the transformer's tensors are quantized, such as model.diff")
    assert str(caught.value).endswith(" (I8); legal: BF16, F16, F32, F64, F8_E4M3, F8_E5M2")


def test_files_other_than_upsamplers_are_refused(tmp_path, toy):
    check_upsampler(toy["spatial_upsampler_path"])
    for path in (toy["checkpoint_path"], toy["distilled_lora"]):
        with pytest.raises(ValueError, match="not a spatial upsampler x2"):
            check_upsampler(path)
    for field, value in (("spatial_scale", 1.5), ("temporal_upsample", True), ("spatial_upsample", False)):
        config = json.dumps({field: value})
        path = write_safetensors(tmp_path / "up.safetensors", {"initial_conv.weight": (2,)}, {"config": config})
        with pytest.raises(ValueError, match=f"{path}: not a spatial upsampler x2; legal: such as ltx-2.3-spatial"):
            check_upsampler(path)


def test_the_toy_model_opens(toy):
    found = open_checkpoint(toy["checkpoint_path"])
    assert found.transformer.video.heads % 4 == 0


@pytest.mark.parametrize("version", ["2.0", "2.0.1", "2.5", "2.5.0-rc1", "2", "3.3", "v2.3", "2.30"])
def test_another_generation_is_refused(tmp_path, version):
    path = checkpoint(tmp_path, version)
    with pytest.raises(ValueError) as caught:
        open_checkpoint(path)
    assert path in str(caught.value)
    assert f"model_version is {version!r}; legal: 2.3.x" in str(caught.value)


@pytest.mark.parametrize("version", ["2.3", "2.3.1", "2.3.0-rc1", " 2.3.7"])
def test_every_version_2_3_is_supported(tmp_path, version):
    assert open_checkpoint(checkpoint(tmp_path, version)).model_version == version


def test_parsing_a_generation():
    assert parse_generation("2.3.1") == (2, 3, 1)
    assert parse_generation("2.3-rc1") == (2, 3)
    assert parse_generation("main") == ()


def test_files_that_are_not_ltx_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not an LTX checkpoint"):
        open_checkpoint(checkpoint(tmp_path, None, None))
    with pytest.raises(ValueError, match="model_version is 'not given'"):
        open_checkpoint(checkpoint(tmp_path, None))
    with pytest.raises(ValueError, match="has no transformer"):
        open_checkpoint(checkpoint(tmp_path, tensors={"vae.decoder.conv_in.conv.weight": (2, 2)}))


def test_tp_must_divide_the_heads(tmp_path):
    found = open_checkpoint(checkpoint(tmp_path))
    for tp in (1, 2, 4):
        check_parallel(found, tp)
    for tp in (-1, 0, 3, 8):
        with pytest.raises(ValueError, match=rf"--tp: {tp}, legal: a divisor of the 4 attention heads .*\[1, 2, 4\]"):
            check_parallel(found, tp)


def test_the_transformers_keys_follow_from_its_config(toy):
    from ltx_ray.model.transformer import Transformer

    found = open_checkpoint(toy["checkpoint_path"])
    check_transformer(found)
    with torch.device("meta"):
        built = Transformer(found.transformer)
    assert {n: tuple(p.shape) for n, p in built.named_parameters()} == transformer_shapes(found.transformer)
    names = sorted(found.tensors)
    lacking = {n: info for n, info in found.tensors.items() if n not in names[:12]}
    with pytest.raises(ValueError, match=rf"{found.path}: .* 12 missing \({names[0]}, .*{names[9]}, \.\.\.\)"):
        check_transformer(replace(found, tensors=lacking))
    more = {**found.tensors, "extra.weight": found.tensors[names[0]]}
    with pytest.raises(ValueError, match=r"1 unexpected \(extra\.weight\)"):
        check_transformer(replace(found, tensors=more))
    other = {**found.tensors, "proj_out.weight": replace(found.tensors["proj_out.weight"], shape=(1, 2))}
    with pytest.raises(ValueError, match=r"1 of another shape \(proj_out\.weight \(1, 2\) instead of"):
        check_transformer(replace(found, tensors=other))


# --- digests -------------------------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.fixture
def big(tmp_path) -> Path:
    """A file of 9 MB, of which digests read a part."""
    return Path(write_safetensors(tmp_path / "big.safetensors", {"a": (1024, 1024), "b": (1250, 1024)}))


def test_any_byte_of_a_small_file_counts(tmp_path):
    path = Path(checkpoint(tmp_path))
    before = file_digest(str(path))
    for offset in (0, 8, path.stat().st_size // 2, path.stat().st_size - 1):
        flip(path, offset)
        assert file_digest(str(path)) != before
        flip(path, offset)
    assert file_digest(str(path)) == before


@pytest.mark.parametrize("offset", [0, 7, 8, 60, 65_000, -65_536, -1])
def test_header_first_and_last_sample_of_a_big_file_count_in_scheme_1(big, offset):
    before = file_digest(str(big), 1)
    flip(big, offset)
    assert file_digest(str(big), 1) != before


def test_samples_in_the_middle_of_a_big_file_count_and_the_rest_is_not_read_in_scheme_1(big):
    size, before = big.stat().st_size, file_digest(str(big), 1)
    sample = (size - 65_536) * 31 // 63
    flip(big, sample)
    assert file_digest(str(big), 1) != before
    flip(big, sample)
    flip(big, sample + 65_536 + 1000)
    assert file_digest(str(big), 1) == before, "bytes between two samples are not read"


def test_a_damaged_file_is_hashed_in_pieces(tmp_path):
    """A folder of Gemma may hold a part whose download broke off. It is hashed whole, but not held in memory."""
    path, size = tmp_path / "part.safetensors", 64 * 2**20
    with path.open("wb") as file:
        file.write(b"\xff" * 16)
        file.truncate(size)
    tracemalloc.start()
    try:
        before = file_digest(str(path))
        assert tracemalloc.get_traced_memory()[1] < size / 4
    finally:
        tracemalloc.stop()
    flip(path, size // 2 + 5)
    assert file_digest(str(path)) != before


def test_every_tensor_counts_with_its_beginning_middle_and_end(tmp_path):
    # "small" and "middle" lie between two samples of scheme 1.
    shapes = {"a": (1024, 1024), "small": (100,), "middle": (16_000,), "z": (1024, 1024)}
    path = Path(write_safetensors(tmp_path / "x.safetensors", shapes))
    before, first_scheme = file_digest(str(path)), file_digest(str(path), 1)
    assert before != first_scheme and len(before) == 32
    unseen = 0
    for info in read_header(path).tensors.values():
        for offset in (info.start, info.start + 1, (info.start + info.end) // 2, info.end - 1):
            flip(path, offset)
            assert file_digest(str(path)) != before, (info.key, offset)
            unseen += file_digest(str(path), 1) == first_scheme
            flip(path, offset)
    assert unseen > 4 and file_digest(str(path)) == before
    flip(path, 60)  # the header
    assert file_digest(str(path)) != before


def test_another_file_counts_whole(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"x" * (9 * 2**20))
    before = file_digest(str(path))
    flip(path, 5 * 2**20 + 17)
    assert file_digest(str(path)) != before


def test_a_header_longer_than_a_sample_is_hashed_whole(tmp_path):
    path = Path(write_safetensors(tmp_path / "x.safetensors", {"a": (2**21,)}, {"note": "x" * 200_000}))
    before = file_digest(str(path))
    flip(path, 100_000)
    assert file_digest(str(path)) != before


def test_the_size_counts(big):
    before = file_digest(str(big))
    with big.open("ab") as file:
        file.truncate(big.stat().st_size + 1)
    assert file_digest(str(big)) != before


def test_the_digest_does_not_depend_on_the_path(tmp_path):
    a, b = (write_safetensors(tmp_path / n, {"a": (4,)}) for n in ("a.safetensors", "b.safetensors"))
    assert file_digest(a) == file_digest(b)
    assert len(file_digest(a)) == 32


@pytest.mark.parametrize("scheme", [1, 2])
def test_a_digest_does_not_depend_on_what_the_cache_has_seen(tmp_path, scheme):
    """A cache of models holds files under names without an ending, and links with one to them."""
    blob, link = tmp_path / "blob", tmp_path / "x.safetensors"
    write_safetensors(blob, {"a": (1024, 1024), "b": (1024, 1024)})
    link.symlink_to(blob)
    for number, paths in enumerate([(blob, link), (link, blob)]):
        found = {path: cached_digest(str(path), tmp_path / f"cache{number}", scheme) for path in paths}
        assert found == {path: file_digest(str(path), scheme) for path in paths}
    assert scheme == 1 or file_digest(str(blob)) == file_digest(str(link))


def test_a_cached_digest_is_used_until_the_file_changes(tmp_path, monkeypatch):
    path, cache = tmp_path / "w.safetensors", tmp_path / "cache"
    path.write_bytes(b"a" * 100)
    first = cached_digest(str(path), cache)
    assert first == file_digest(str(path))
    with monkeypatch.context() as patch:
        patch.setattr(digests, "file_digest", None)
        assert cached_digest(str(path), cache) == first, "not read again"
    assert cached_digest(str(path), cache, scheme=1) == file_digest(str(path), 1)


@pytest.mark.parametrize("replace", [False, True])
def test_other_weights_of_the_same_size_and_mtime_are_noticed(tmp_path, replace):
    """As rsync -t, cp -p and object stores with one mtime for all files leave them."""
    path, cache = tmp_path / "w.safetensors", tmp_path / "cache"
    path.write_bytes(b"a" * 100)
    os.utime(path, ns=(1, 10**18))
    first = cached_digest(str(path), cache)
    if replace:
        (tmp_path / "other").write_bytes(b"b" * 100)
        os.utime(tmp_path / "other", ns=(1, 10**18))
        (tmp_path / "other").replace(path)
    else:
        changed = path.stat().st_ctime_ns
        while path.stat().st_ctime_ns == changed:  # the clock of a file system ticks every few milliseconds
            path.write_bytes(b"b" * 100)
            os.utime(path, ns=(1, 10**18))
    assert cached_digest(str(path), cache) == file_digest(str(path)) != first


def test_without_a_usable_cache_the_file_is_read_again(tmp_path):
    path, cache = tmp_path / "w.safetensors", tmp_path / "cache"
    path.write_bytes(b"a")
    expected = cached_digest(str(path), cache)
    for entry in (cache / "digests").iterdir():
        entry.write_text("[]")
    assert cached_digest(str(path), cache) == expected
    (tmp_path / "file").write_text("")
    assert cached_digest(str(path), tmp_path / "file") == expected


def test_a_folders_digest_covers_weights_configs_and_tokenizer(tmp_path):
    folder, cache = tmp_path / "gemma", tmp_path / "cache"
    (folder / "sub").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.model", "sub/x.json"):
        (folder / name).write_text(name)
    (folder / "README.md").write_text("1")
    before = cached_digest(str(folder), cache)
    (folder / "README.md").write_text("other")
    assert cached_digest(str(folder), cache) == before
    for name in ("config.json", "model.safetensors", "tokenizer.model", "sub/x.json"):
        (folder / name).write_text("other")
        after = cached_digest(str(folder), cache)
        assert after != before
        before = after
    (folder / "config.json").rename(folder / "renamed.json")
    assert cached_digest(str(folder), cache) != before
    folder.rename(tmp_path / "moved")
    assert cached_digest(str(tmp_path / "moved"), cache) != before


def test_a_text_of_another_width_than_its_stream_is_refused(toy):
    """Before its tensors are looked at, which may agree with it."""
    opened = open_checkpoint(toy["checkpoint_path"])
    check_transformer(opened)
    config = opened.transformer
    for stream, field in (("video", "cross_attention_dim"), ("audio", "audio_cross_attention_dim")):
        wider = replace(getattr(config, stream), context_dim=2 * getattr(config, stream).dim)
        with pytest.raises(ValueError, match=rf"{field} is {wider.context_dim}; legal: {wider.dim}, the heads times"):
            check_transformer(replace(opened, transformer=replace(config, **{stream: wider})))
