"""Merging: the reference's rounding, shards, every place of the sources, and any sequence of switches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ltx_ray.checkpoints.lora import open_lora
from ltx_ray.checkpoints.safetensors import read_header
from ltx_ray.parallel.collectives import SINGLE_RANK, RankGroup
from ltx_ray.parallel.fp8 import FP8, read_values, row_scale_of, write_exactly, write_values
from ltx_ray.parallel.layers import shard_parameter
from ltx_ray.parallel.loading import load_shard
from ltx_ray.parallel.lora import LoraMerger, LoraSetting
from ltx_ray.parallel.merging import merge_
from ltx_ray.parallel.weight_cache import GIB, FreeMemory, choose_location
from ltx_ray.records import ModelError
from tests.support.lora_files import SHAPES, STRENGTHS, Model, assert_same, expected, merger
from tests.support.lora_files import files as files


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("strengths", STRENGTHS)
def test_merged_weights_are_the_references(files, strengths, dtype):
    model, merging = merger(files, dtype=dtype)
    assert merging.switch_to(LoraSetting(strengths)) == any(s for _, s in strengths)
    assert_same(model, expected(files, strengths, dtype))


@pytest.mark.parametrize("size", [2, 4])
def test_a_shard_merges_like_the_whole(files, size):
    for strengths in STRENGTHS:
        whole = expected(files, strengths)
        for rank in range(size):
            model, merging = merger(files, RankGroup(rank, size))
            merging.switch_to(LoraSetting(strengths))
            for name, parameter in model.named_parameters():
                dim, full = parameter.shard_dim, whole[name]
                part = full if dim is None else full.narrow(dim, rank * parameter.shape[dim], parameter.shape[dim])
                assert torch.equal(parameter, part), (name, strengths)


one_strength = st.sampled_from([0.0, 0.25, 0.5, 1.0, -0.7, 1e-4])
any_strengths = st.lists(st.tuples(st.integers(0, 2), one_strength), unique_by=lambda entry: entry[0]).map(
    lambda entries: tuple(sorted(entries))
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(any_strengths, min_size=1, max_size=6), st.sampled_from(["file", "host", "device"]),
       st.sampled_from(["file", "host", "device"]), st.integers(0, 6), st.integers(0, 6))  # fmt: skip
def test_any_sequence_of_switches_ends_in_the_bits_of_a_fresh_load(files, sequence, clean, factors, cached_at, done_at):
    model, merging = merger(files)
    for number, strengths in enumerate(sequence):
        if number == cached_at:  # Some replicas cache their sources only when they switch.
            merging.cache_sources(0, FreeMemory(0, 0), clean, factors)
        if number == done_at:  # Before that, what goes to host memory is read from the file.
            merging.take_over(wait=True)
        merging.switch_to(LoraSetting(strengths))
    assert_same(model, expected(files, sequence[-1]))
    assert not merging.switch_to(LoraSetting(sequence[-1]))


@pytest.mark.parametrize("by_row", [False, True])
def test_a_shard_scales_its_part_of_quantized_factors(files, tmp_path, by_row):
    tensors = {}
    for name, tensor in load_file(files / "lora0.safetensors").items():
        scale = tensor.float().abs().amax(1) / 127 if by_row else tensor.float().abs().max() / 127
        tensors[name] = (tensor.float() / (scale[:, None] if by_row else scale)).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, tmp_path / "small.safetensors")
    lora = open_lora(str(tmp_path / "small.safetensors")).fit(SHAPES, "model")
    infos = read_header(files / "model.safetensors").tensors

    def merged(tp):
        model, _ = merger(files, tp)
        LoraMerger(model, infos, [lora], tp).switch_to(LoraSetting(((0, 0.5),)))
        return dict(model.named_parameters())

    whole = merged(RankGroup())
    assert not torch.equal(whole["up.weight"], expected(files, ())["up.weight"])
    for rank in range(4):
        for name, part in merged(RankGroup(rank, 4)).items():
            dim, full = part.shard_dim, whole[name]
            full = full if dim is None else full.narrow(dim, rank * part.shape[dim], part.shape[dim])
            assert torch.equal(part, full), name


def test_a_merger_knows_whether_a_switch_would_change_anything(files):
    _, merging = merger(files)
    assert not merging.would_change(LoraSetting(((0, 0.0),)))
    merging.switch_to(LoraSetting(((0, 0.5), (1, 0.0))))
    assert not merging.would_change(LoraSetting(((0, 0.5), (1, 0.0))))
    assert merging.would_change(LoraSetting(((0, 0.25), (1, 0.0))))


def test_only_layers_that_change_are_touched(files, monkeypatch):
    _, merging = merger(files)
    merging.switch_to(LoraSetting(((0, 0.25),)))
    touched = []
    monkeypatch.setattr(merging, "_merge_one", lambda *arguments: touched.append(arguments[-1].key))
    merging.switch_to(LoraSetting(((0, 0.25), (2, 0.5))))
    assert sorted(touched) == ["down.weight", "gate.weight"]


def test_a_merge_that_fails_is_repaired_by_the_next(files, monkeypatch):
    model, merging = merger(files)
    merging.switch_to(LoraSetting(((0, 0.25),)))
    merge_one, calls = merging._merge_one, []

    def fails(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        merge_one(*arguments)

    monkeypatch.setattr(merging, "_merge_one", fails)
    with pytest.raises(torch.OutOfMemoryError, match=r"merging into \w+\.weight: no memory"):
        merging.switch_to(LoraSetting(((0, 0.5),)))
    merging.switch_to(LoraSetting(((0, 0.25),)))
    assert_same(model, expected(files, ((0, 0.25),)))


@pytest.mark.parametrize("chunk_bytes", [1, 200, 1000, 1 << 20])
def test_chunks_do_not_show(chunk_bytes):
    torch.manual_seed(1)
    clean, a, b = torch.randn(48, 40).bfloat16(), torch.randn(8, 40).bfloat16(), torch.randn(48, 8).bfloat16()
    whole = torch.matmul(b * 0.3, a).addmm_(b, a, alpha=0.7) + clean
    products = [(a, b, 0.3), (a, b, 0.7)]
    for first in range(0, 48, 16):  # A shard of rows, whose chunks have the borders of the whole weight's.
        rows = slice(first, first + 16)
        target = torch.empty(16, 40).bfloat16()
        parts = [(a, b[rows], s) for _, _, s in products]
        merge_(target, clean[rows], parts, first_row=first, full_columns=40, chunk_bytes=chunk_bytes)
        assert torch.equal(target, whole[rows])


@pytest.mark.parametrize(
    "nbytes, device, host, reserve, location",
    [
        (38, 100, 0, 16, "device"),
        (38, 50, 100, 16, "host"),
        (38, 50, 50, 16, "file"),
        (38, 54, 0, 16, "device"),
        (38, 53, 57, 16, "host"),
        (0, 0, 0, 0, "device"),
    ],
)
def test_what_every_switch_needs_is_cached_where_it_fits(nbytes, device, host, reserve, location):
    assert choose_location(nbytes * GIB, FreeMemory(device * GIB, host * GIB), reserve * GIB) == location


def fp8_merger(files, tensors=None):
    """The same model with its column-parallel and row-parallel weights in fp8, from `files` or from `tensors`."""
    tensors = tensors or read_header(files / "model.safetensors").tensors
    with torch.device("meta"):
        model = Model(RankGroup())
    for layer in (model.up, model.down):
        old = layer.weight
        layer.weight = shard_parameter(torch.empty(old.shape, dtype=FP8), old.shard_dim)
        layer.weight.row_scale = torch.empty(len(old))
    load_shard(model, tensors, RankGroup(), dtype=torch.bfloat16, device=torch.device("cpu"))
    loras = [open_lora(str(files / f"lora{i}.safetensors")).fit(SHAPES, "model") for i in range(3)]
    return model, LoraMerger(model, tensors, loras, RankGroup())


@pytest.mark.parametrize("location", [None, "file", "host", "device"])
def test_fp8_weights_are_those_of_the_merged_ones_whatever_was_merged_before(files, location):
    model, merging = fp8_merger(files)
    for number, strengths in enumerate((*STRENGTHS, STRENGTHS[1], (), STRENGTHS[3])):
        if number == 2 and location is not None:
            merging.cache_sources(0, FreeMemory(0, 0), location, location)
        merging.switch_to(LoraSetting(strengths))
        for name, values in expected(files, strengths).items():
            parameter = model.get_parameter(name)
            if row_scale_of(parameter) is None:
                assert torch.equal(parameter, values), (name, strengths)
                continue
            again = shard_parameter(torch.empty_like(parameter), None)
            again.row_scale = torch.empty_like(parameter.row_scale)
            write_values(again, values)
            assert torch.equal(read_values(parameter), read_values(again)), (name, strengths)
            exact = values.float()
            assert ((read_values(parameter) - exact).abs() <= exact.abs() / 16 + again.row_scale[:, None]).all()


def quantized_file(files, folder, dtype):
    """The checkpoint of `files` with two weights in fp8, each with a scale, and their values (float32)."""
    tensors, values = load_file(files / "model.safetensors"), {}
    for name, scale in (("up.weight", 0.0371), ("down.weight", 3.1e-5)):
        spread = torch.logspace(-4, 0, len(tensors[name]))[:, None]  # Rows of very different sizes, and one of zeros.
        spread[3] = 0
        tensors[name] = (tensors[name].float() * spread).clamp(-448, 448).to(dtype)
        tensors[f"{name}_scale"] = torch.tensor(scale)
        values[name] = tensors[name].float() * torch.tensor(scale)
    save_file(tensors, folder / "fp8.safetensors")
    infos = read_header(folder / "fp8.safetensors").tensors
    scales = {name: infos.pop(f"{name}_scale") for name in values}
    return {name: replace(info, scale=scales.get(name)) for name, info in infos.items()}, values


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("location", [None, "file", "host", "device"])
def test_prequantized_values_are_held_exactly_where_nothing_is_merged(files, tmp_path, location, dtype):
    """After loading, and after LoRAs were merged and taken out again."""
    tensors, values = quantized_file(files, tmp_path, dtype)
    model, merging = fp8_merger(files, tensors)

    def assert_exact():
        for name, exact in values.items():
            assert torch.equal(read_values(model.get_parameter(name)), exact), name

    assert_exact()
    if location is not None:
        merging.cache_sources(0, FreeMemory(0, 0), location, location)
        merging.take_over(wait=True)
        assert merging.clean_weights == location
    for strengths in (STRENGTHS[1], (), STRENGTHS[3]):
        merging.switch_to(LoraSetting(strengths))
    assert not torch.equal(read_values(model.up.weight), values["up.weight"])
    merging.switch_to(LoraSetting(()))
    assert_exact()


@pytest.mark.parametrize("location", ["file", "host", "device"])
def test_loras_are_merged_into_the_values_of_prequantized_weights(files, tmp_path, location):
    """The values in the weights' dtype, and the bits of a file that holds them so."""
    tensors, values = quantized_file(files, tmp_path, torch.float8_e4m3fn)
    whole = load_file(files / "model.safetensors") | {name: exact.bfloat16() for name, exact in values.items()}
    save_file(whole, tmp_path / "bf16.safetensors")
    found, expected = fp8_merger(files, tensors), fp8_merger(files, read_header(tmp_path / "bf16.safetensors").tensors)
    for _, merging in (found, expected):
        merging.cache_sources(0, FreeMemory(0, 0), location, location)
        merging.switch_to(LoraSetting(STRENGTHS[1]))
    for name, parameter in found[0].named_parameters():
        assert torch.equal(read_values(parameter), read_values(expected[0].get_parameter(name))), name


def test_prequantized_weights_without_a_scale_are_held_exactly_too(tmp_path):
    values = torch.randn(32, 16).to(torch.float8_e4m3fn)
    save_file({"w": values}, tmp_path / "fp8.safetensors")
    module = torch.nn.Module()
    module.w = shard_parameter(torch.empty(32, 16, dtype=FP8), 0)
    module.w.row_scale = torch.empty(32)
    infos = read_header(tmp_path / "fp8.safetensors").tensors
    load_shard(module, infos, RankGroup(), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert torch.equal(read_values(module.w), values.float())


def test_every_value_of_e4m3_is_held_exactly_beside_every_other():
    """The smallest and the largest in one row, and rows of only one of them."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    values = codes[codes.float().isfinite()]
    for rows in (values[None], values[:, None]):
        parameter = shard_parameter(torch.empty(rows.shape, dtype=FP8), None)
        parameter.row_scale = torch.empty(len(rows))
        write_exactly(parameter, rows, 0.7)
        assert torch.equal(read_values(parameter), rows.float() * 0.7)


# --- factors that are not finite -------------------------------------------------------------------


def spoilt(files, tmp_path, key: str, row: int, column: int):
    """A merger of a LoRA with one value that is not finite, for each rank."""
    tensors = load_file(files / "lora0.safetensors")
    tensors[key][row, column] = float("nan")
    save_file(tensors, tmp_path / "spoilt.safetensors")
    lora = open_lora(str(tmp_path / "spoilt.safetensors")).fit(SHAPES, "model")
    infos = read_header(files / "model.safetensors").tensors

    def make(tp) -> LoraMerger:
        return LoraMerger(merger(files, tp)[0], infos, [lora], tp)

    return make


def rank_of_two(rank: int, answer=lambda own: own) -> RankGroup:
    """A rank of two whose group answers with `answer` of its own tensor."""

    class Group(RankGroup):
        def min_(self, tensor):
            return answer(tensor)

    return Group(rank, 2)


def test_factors_that_are_not_finite_are_refused_by_name(files, tmp_path):
    make = spoilt(files, tmp_path, "down.lora_B.weight", 15, 0)
    merging = make(SINGLE_RANK)
    merging.switch_to(LoraSetting(((0, 0.5),)))
    message = f"{tmp_path}/spoilt.safetensors: down.lora_B.weight is not finite (it holds NaN or infinity)"
    with pytest.raises(ModelError) as caught:
        merging.check_finite()
    assert str(caught.value).startswith(message)


def test_every_rank_refuses_factors_that_are_not_finite_on_one(files, tmp_path):
    """The last row of B is the second rank's. The first learns it from the group."""
    make, answers = spoilt(files, tmp_path, "up.lora_B.weight", 31, 0), []

    def check(tp):
        merging = make(tp)
        merging.switch_to(LoraSetting(((0, 0.5),)))
        merging.check_finite()

    def heard(own):
        answers.append(own)
        return own

    check(rank_of_two(0, heard))
    for tp in (rank_of_two(1, heard), rank_of_two(0, lambda own: torch.minimum(own, answers[1]))):
        with pytest.raises(ModelError, match=r"up\.lora_B\.weight is not finite"):
            check(tp)
    assert answers[0].all() and int((answers[1] == 0).sum()) == 1


def test_factors_are_asked_about_once(files, monkeypatch):
    _, merging = merger(files)
    asked = []
    isfinite = torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda tensor: asked.append(tensor.shape) or isfinite(tensor))
    for strength in (0.5, 0.25, 0.0, 0.5):
        merging.switch_to(LoraSetting(((0, strength),)))
        merging.check_finite()
    assert len(asked) == 2 * len(SHAPES)
    merging.switch_to(LoraSetting(((0, 0.5), (1, 0.5))))
    merging.check_finite()
    assert len(asked) == 2 * len(SHAPES) + 4
