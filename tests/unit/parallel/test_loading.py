"""Reading shards: every slice, dtype and failure, in chunks smaller than the tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ltx_ray.checkpoints.safetensors import read_header
from ltx_ray.parallel import loading
from ltx_ray.parallel.collectives import RankGroup
from ltx_ray.parallel.layers import ColumnParallelLinear, RowParallelLinear
from ltx_ray.parallel.loading import ShardRead, load_shard, read_shards, shard_shape


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loading, "CHUNK_BYTES", 96)


@pytest.fixture
def file(tmp_path):
    tensors = {
        "wide": torch.randn(16, 24).bfloat16(),
        "tall": torch.randn(40, 8),
        "half": torch.randn(8, 8).half(),
        "bias": torch.randn(16).bfloat16(),
        "one": torch.randn(8).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    return tensors, read_header(tmp_path / "a.safetensors").tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_rank_reads_its_slices(file, size, dtype):
    tensors, infos = file
    for rank in range(size):
        tp = RankGroup(rank, size)
        for name, tensor in tensors.items():
            for dim in [None, *range(tensor.dim())]:
                into = torch.full(shard_shape(infos[name], dim, tp), torch.nan, dtype=dtype)
                assert list(read_shards([ShardRead(infos[name], dim, into)], tp)) == [0]
                part = tensor.shape[dim] // size if dim is not None else 0
                expected = tensor if dim is None else tensor.narrow(dim, rank * part, part)
                assert torch.equal(into, expected.to(dtype)), (name, dim, rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 4])
def test_prequantized_weights_are_scaled(tmp_path, size, dtype):
    """In float32 and rounded once, as the reference multiplies a weight by its scale."""
    values = torch.randn(16, 24).to(torch.float8_e4m3fn)
    save_file({"w": values, "w_scale": torch.tensor(0.0371)}, tmp_path / "fp8.safetensors")
    infos = read_header(tmp_path / "fp8.safetensors").tensors
    info = replace(infos["w"], scale=infos["w_scale"])
    whole = (values.float() * torch.tensor(0.0371)).to(dtype)
    for rank in range(size):
        tp = RankGroup(rank, size)
        for dim in (0, 1):
            into = torch.empty(shard_shape(info, dim, tp), dtype=dtype)
            assert list(read_shards([ShardRead(info, dim, into)], tp)) == [0]
            assert torch.equal(into, whole.narrow(dim, rank * into.shape[dim], into.shape[dim]))


def test_every_read_is_yielded_once(file):
    tensors, infos = file
    names = list(tensors)[::-1]
    reads = [ShardRead(infos[n], None, torch.empty_like(tensors[n])) for n in names]
    assert sorted(read_shards(reads, RankGroup())) == list(range(len(names)))
    assert all(torch.equal(r.target.float(), tensors[n].float()) for r, n in zip(reads, names, strict=True))


def test_a_file_cut_off_after_its_header_was_read(file, tmp_path):
    tensors, infos = file
    last = max(infos.values(), key=lambda info: info.end)
    with open(last.path, "r+b") as opened:
        opened.truncate(last.end - 1)
    reads = [ShardRead(info, None, torch.empty_like(tensors[name])) for name, info in infos.items()]
    with pytest.raises(ValueError, match=rf"{last.path}: {last.key}: the file ends at byte {last.end - 1}, inside it"):
        list(read_shards(reads, RankGroup()))


class Layers(nn.Module):
    def __init__(self, tp: RankGroup, hidden: int = 24):
        super().__init__()
        self.up, self.down = ColumnParallelLinear(8, hidden, tp), RowParallelLinear(hidden, 8, tp)


def saved(tmp_path, **change):
    whole = {"up.weight": (24, 8), "up.bias": (24,), "down.weight": (8, 24), "down.bias": (8,)} | change
    tensors = {name: torch.randn(shape) for name, shape in whole.items() if shape}
    save_file(tensors, tmp_path / "m.safetensors")
    return tensors, read_header(tmp_path / "m.safetensors").tensors


def load(infos, tp, proceed=lambda: None):
    with torch.device("meta"):
        model = Layers(tp)
    load_shard(model, infos, tp, dtype=torch.float32, device=torch.device("cpu"), proceed=proceed)
    return model


def test_shards_put_together_are_the_file(tmp_path):
    tensors, infos = saved(tmp_path)
    shards = [load(infos, RankGroup(rank, 4)) for rank in range(4)]
    assert torch.equal(torch.cat([s.up.weight for s in shards]), tensors["up.weight"])
    assert torch.equal(torch.cat([s.down.weight for s in shards], 1), tensors["down.weight"])
    assert torch.equal(torch.cat([s.up.bias for s in shards]), tensors["up.bias"])
    assert all(torch.equal(s.down.bias, tensors["down.bias"]) for s in shards)


@pytest.mark.parametrize("reads", [0, 1, 3])
def test_reading_ends_where_it_may_not_proceed(tmp_path, monkeypatch, reads):
    _, infos = saved(tmp_path)
    closed = []
    monkeypatch.setattr(loading._OpenFiles, "close", lambda files: closed.append(files))
    asked = []

    def proceed():
        asked.append(len(asked))
        if len(asked) > reads:
            raise ValueError("the node is unfit")

    with pytest.raises(ValueError, match="the node is unfit"):
        load(infos, RankGroup(0, 2), proceed)
    assert len(asked) == reads + 1 and len(closed) == (reads > 0)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"up.bias": None}, r"1 missing \(up\.bias\)"),
        ({"more": (2,)}, r"1 unexpected \(more\)"),
        ({f"x{i:02}": (2,) for i in range(12)}, r"12 unexpected \(x00, .*x09, \.\.\.\)"),
        ({"down.weight": (8, 20)}, r"down\.weight has shape \(8, 20\); legal: one of which rank 0 of 1 gets \(8, 24\)"),
        ({"up.bias": (24, 1)}, r"up\.bias has shape \(24, 1\)"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, change, words):
    _, infos = saved(tmp_path, **change)
    with pytest.raises(ValueError, match=words) as caught:
        load(infos, RankGroup())
    assert "m.safetensors" in str(caught.value)
