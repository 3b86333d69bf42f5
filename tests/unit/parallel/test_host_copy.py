"""Copies to host memory in the background: what they hold, switches before they are done, and errors on the way."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from ltx_ray.parallel import host_copy
from ltx_ray.parallel.host_copy import HostCopy, HostCopyFailed, HostTensor
from ltx_ray.parallel.lora import LoraSetting
from ltx_ray.parallel.weight_cache import FreeMemory, WeightCache
from tests.support.lora_files import STRENGTHS, assert_same, expected, merger
from tests.support.lora_files import files as files

CPU = torch.device("cpu")


def tensors(*sizes: int) -> list[HostTensor]:
    return [HostTensor(str(n), (size,), torch.int64, 8 * size) for n, size in enumerate(sizes)]


def numbered(targets) -> None:
    for name, target in targets.items():
        target.copy_(torch.arange(len(target)) + 1000 * int(name))


@pytest.fixture
def gate(monkeypatch):
    """Holds copies from files until it is set."""
    opened = threading.Event()
    read_all = WeightCache._read_all

    def waits(self, targets):
        assert opened.wait(30)
        read_all(self, targets)

    monkeypatch.setattr(WeightCache, "_read_all", waits)
    yield opened
    opened.set()


@pytest.mark.parametrize("slab_bytes", [1, 600, 2**20])
def test_every_tensor_lies_in_one_slab(monkeypatch, slab_bytes):
    monkeypatch.setattr(host_copy, "SLAB_BYTES", slab_bytes)
    sizes = (5, 64, 1, 200, 0, 33, 32)
    memory = HostCopy(tensors(*sizes), numbered, CPU).result()
    slabs = [(slab.memory.data_ptr(), slab.memory.data_ptr() + len(slab.memory)) for slab in memory.slabs]
    for number, size in enumerate(sizes):
        found = memory.tensors[str(number)]
        assert torch.equal(found, torch.arange(size) + 1000 * number)
        start = found.data_ptr()
        assert not size or any(low <= start and start + 8 * size <= high for low, high in slabs)
    assert len(slabs) == {1: 7, 600: 6, 2**20: 1}[slab_bytes]


def test_nothing_to_copy():
    assert HostCopy([], numbered, CPU).result().tensors == {}


def test_one_copy_goes_after_another():
    order, opened = [], threading.Event()

    def first(targets):
        assert opened.wait(30)
        order.append("first")

    earlier = HostCopy(tensors(1), first, CPU)
    later = HostCopy(tensors(1), lambda targets: order.append("later"), CPU, after=earlier)
    opened.set()
    later.result()
    assert order == ["first", "later"]


def test_an_error_of_any_slab_is_reported_and_frees_all_memory(monkeypatch):
    monkeypatch.setattr(host_copy, "SLAB_BYTES", 1)
    memory = []

    def read(targets):
        memory.extend(weakref.ref(target.untyped_storage()) for target in targets.values())
        if "7" in targets:
            raise ValueError("the file ends at byte 3")

    gc.disable()  # A reference cycle would keep the memory until the collector runs.
    try:
        copy = HostCopy(tensors(*[4] * 12), read, CPU)
        with pytest.raises(HostCopyFailed, match="ValueError: the file ends at byte 3"):
            copy.result()
        alive = [ref for ref in memory if ref() is not None]
    finally:
        gc.enable()
    assert memory and not alive
    assert not copy._tensors and not copy._memory


def test_switches_read_the_files_until_the_copy_is_done(files, gate):
    model, merging = merger(files)
    merging.cache_sources(0, FreeMemory(0, 0), "host", "host")
    for strengths in STRENGTHS:
        assert merging.take_over() is None
        merging.switch_to(LoraSetting(strengths))
        assert_same(model, expected(files, strengths))
    assert (merging.clean_weights, merging.lora_factors) == ("file", "file")
    gate.set()
    assert merging.take_over(wait=True) > 0
    assert (merging.clean_weights, merging.lora_factors) == ("host", "host")
    for strengths in reversed(STRENGTHS):
        merging.switch_to(LoraSetting(strengths))
        assert_same(model, expected(files, strengths))


def test_the_copy_is_of_clean_weights_whatever_is_merged_meanwhile(files, gate):
    model, merging = merger(files)
    merging.switch_to(LoraSetting(STRENGTHS[1]))
    merging.cache_sources(0, FreeMemory(0, 0), "host", "file")
    merging.switch_to(LoraSetting(STRENGTHS[2]))
    gate.set()
    merging.take_over(wait=True)
    assert merging.clean_weights == "host"
    for name, value in merging._clean._cached.items():
        assert torch.equal(value, expected(files, ())[f"{name}.weight"]), name
    merging.switch_to(LoraSetting(()))
    assert_same(model, expected(files, ()))


def test_without_pinned_memory_the_files_are_read(files, monkeypatch, caplog):
    def refuses(self, nbytes):
        raise HostCopyFailed("no memory")

    monkeypatch.setattr("ltx_ray.parallel.host_copy._Slab.__init__", refuses)
    model, merging = merger(files)
    merging.cache_sources(0, FreeMemory(0, 0), "host", "host")
    assert merging.take_over(wait=True) is None
    assert "clean weights stay in the file: no memory" in caplog.text
    assert "LoRA factors stay in the file: no memory" in caplog.text
    for strengths in STRENGTHS:
        merging.switch_to(LoraSetting(strengths))
        assert_same(model, expected(files, strengths))


def test_a_file_that_could_not_be_read_once_fails_no_call(files, monkeypatch, caplog):
    """Switches read it again. One that cannot either raises what it meets."""

    def fails(*_):
        raise OSError(5, "Input/output error")

    model, merging = merger(files)
    with monkeypatch.context() as patched:
        patched.setattr(WeightCache, "_read_all", fails)
        merging.cache_sources(0, FreeMemory(0, 0), "host", "host")
        assert merging.take_over(wait=True) is None
    assert "clean weights stay in the file: OSError: [Errno 5] Input/output error" in caplog.text
    assert (merging.clean_weights, merging.lora_factors) == ("file", "file")
    for strengths in STRENGTHS:
        assert merging.take_over() is None
        merging.switch_to(LoraSetting(strengths))
        assert_same(model, expected(files, strengths))
    monkeypatch.setattr(WeightCache, "_read_files", fails)
    with pytest.raises(OSError, match="Input/output error"):
        merging.switch_to(LoraSetting(STRENGTHS[1]))
