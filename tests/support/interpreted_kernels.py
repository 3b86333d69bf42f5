"""Runs Triton's kernels in its interpreter on a CPU, each beside the plain PyTorch function that it stands for.

Run as a program with the names of checks, because Triton reads TRITON_INTERPRET when a kernel is defined. Every launch
fails that touches memory outside of its tensors, or in which programs depend on each other's order. The interpreter
rounds otherwise than a GPU, so PyTorch converts between dtypes.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from ltx_ray.checkpoints.checkpoint import open_checkpoint
from ltx_ray.engine import decode_kernels, decode_steps
from ltx_ray.engine.decode_steps import ConvSum, SumOutputs
from ltx_ray.model import kernels, steps
from ltx_ray.model.fused import FusedTransformer
from ltx_ray.model.packing import pack_linears
from ltx_ray.model.rope import RopeTable, audio_positions, video_positions
from ltx_ray.model.steps import QuantizedRows
from ltx_ray.model.transformer import Modality, Perturbation, Prefix, Transformer
from ltx_ray.parallel import merge_kernel, merging
from ltx_ray.parallel.collectives import SINGLE_RANK, Alone, RankGroup
from ltx_ray.parallel.factors import FactorProduct
from ltx_ray.parallel.head_exchange import HeadPlaces
from ltx_ray.parallel.loading import load_shard
from ltx_ray.records import AV
from ltx_ray.toy import ToyShape, make_toy_model
from tests.support.transformers import SHAPE, Inputs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
INTEGERS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}
#: Relative and absolute error of a value. Both sides compute in float32 and round once, so it is one step of the dtype.
STEPS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2**-7, 1e-5), torch.float8_e4m3fn: (2**-3, 2**-9)}
generator = torch.Generator().manual_seed(0)


def normal(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=generator)


def converted(data: np.ndarray, source: tl.dtype, target: tl.dtype, _rounding: object) -> np.ndarray:
    """Replaces the interpreter's conversion, which truncates to bfloat16 and does not carry when it rounds to fp8."""
    bits = torch.from_numpy(data.reshape(-1).view(f"uint{source.primitive_bitwidth}").copy())
    values = bits.view(DTYPES[source.name]).to(DTYPES[target.name])
    found = values.view(INTEGERS[target.primitive_bitwidth]).numpy()
    return found.view(f"uint{target.primitive_bitwidth}").reshape(data.shape)


class Accesses:
    """The addresses that the programs of a launch read and write, each beside the program's number."""

    def __init__(self) -> None:
        self.begin([])

    def begin(self, tensors: list[torch.Tensor]) -> None:
        self.legal = np.unique(np.concatenate([np.array([], dtype=np.int64), *map(_addresses, tensors)]))
        self.reads: list[np.ndarray] = []
        self.writes: list[np.ndarray] = []

    def add(self, to: list[np.ndarray], program: tuple[int, int, int], pointers: np.ndarray, mask: np.ndarray) -> None:
        touched = pointers.astype(np.int64)[np.broadcast_to(mask, pointers.shape)]
        at = np.searchsorted(self.legal, touched).clip(max=len(self.legal) - 1)
        assert (self.legal[at] == touched).all(), f"out of bounds: {program}"
        number = program[0] + (program[1] << 20) + (program[2] << 40)
        to.append(np.stack((touched, np.full_like(touched, number))))

    def check_order(self) -> None:
        written, programs = np.unique(np.concatenate(self.writes, axis=1), axis=1)
        assert (np.diff(written) > 0).all(), "two programs write to one address"
        read, readers = np.concatenate(self.reads, axis=1)
        at = np.searchsorted(written, read).clip(max=len(written) - 1)
        assert ((written[at] != read) | (programs[at] == readers)).all(), "a program reads what another one writes"


def _addresses(tensor: torch.Tensor) -> np.ndarray:
    found = np.array([tensor.data_ptr()], dtype=np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = (found[:, None] + np.arange(size, dtype=np.int64) * stride * tensor.element_size()).reshape(-1)
    return found


def instrument(accesses: Accesses) -> None:
    """Make the interpreter convert like PyTorch and report every access."""
    builder, executor, patch_tensor = (
        interpreter.InterpreterBuilder, interpreter.GridExecutor, interpreter._patch_lang_tensor,
    )  # fmt: skip
    load, store, dot, launch = (
        builder.create_masked_load, builder.create_masked_store, builder.create_dot, executor.__call__,
    )  # fmt: skip

    def watched_load(self, pointers, mask, *rest):
        accesses.add(accesses.reads, self.grid_idx, pointers.data, mask.data)
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        accesses.add(accesses.writes, self.grid_idx, pointers.data, mask.data)
        return store(self, pointers, value, mask, *rest)

    def dot_in_float32(self, a, b, *rest):
        return dot(
            self, *(self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest
        )

    def watched_launch(self, *arguments, **options):
        accesses.begin([argument for argument in arguments if isinstance(argument, torch.Tensor)])
        launch(self, *arguments, **options)
        accesses.check_order()

    def patched_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        # NumPy 2.5 makes an integer of an array without axes only.
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    builder.create_masked_load, builder.create_masked_store, builder.create_dot = (
        watched_load, watched_store, dot_in_float32,
    )  # fmt: skip
    executor.__call__, interpreter._patch_lang_tensor, interpreter._convert_float = (
        watched_launch, patched_tensor, converted,
    )  # fmt: skip


def check(found, right) -> None:
    """Values of a tensor, of rows in fp8, or of several of either."""
    if isinstance(right, QuantizedRows):
        torch.testing.assert_close(found.scale, right.scale, rtol=1e-5, atol=0)
        found, right = found.values, right.values
    if right is None or isinstance(right, list | tuple):
        assert (found is None) if right is None else len(found) == len(right)
        for ours, expected in zip(found or (), right or (), strict=True):
            check(ours, expected)
        return
    relative, absolute = STEPS[right.dtype]
    assert found.dtype == right.dtype and found.shape == right.shape
    torch.testing.assert_close(found.float(), right.float(), rtol=relative, atol=absolute)
    assert right.dtype == torch.float32 or (found.float() != right.float()).sum() <= 1 + 0.01 * right.numel()


def twins(name: str):
    """A fused step that runs as a kernel and in plain PyTorch, and compares results and what was written in place."""

    def run(x, *rest):
        rows = [part[0] if isinstance(part, tuple) else part for part in x] if isinstance(x, list) else [x]
        before = [tensor.clone() for tensor in rows]
        right = getattr(steps, name)(x, *rest)
        expected = [tensor.clone() for tensor in rows]
        for tensor, values in zip(rows, before, strict=True):
            tensor.copy_(values)
        found = getattr(kernels, name)(x, *rest)
        check([found, *rows], [right, *expected])
        return found

    return run


def passes() -> None:
    """Whole passes of models of odd widths, of one in fp8, and of one of two ranks without the other."""
    # On a CPU, the product's own GELU is another.
    both = SimpleNamespace(linear_gelu=steps.linear_gelu)
    for name in ("add_norm_modulate", "head_means", "norm_heads_", "apply_gates", "gelu"):
        setattr(both, name, twins(name))
    two = RankGroup(1, 2, Alone(2))
    for (heads, head_dim, audio_head_dim), precision, tp in (
        ((1, 62, 10), "bf16", SINGLE_RANK),
        ((3, 20, 14), "bf16", SINGLE_RANK),
        ((2, 32, 16), "fp8", SINGLE_RANK),
        ((2, 30, 10), "bf16", two),
        ((2, 32, 16), "fp8", two),
    ):
        shape = ToyShape(layers=2, heads=heads, head_dim=head_dim, audio_head_dim=audio_head_dim)
        with TemporaryDirectory() as folder:
            checkpoint = open_checkpoint(make_toy_model(Path(folder), seed=1, shape=shape)["checkpoint_path"])
            with torch.device("meta"):
                model = Transformer(checkpoint.transformer, tp)
            cpu = torch.device("cpu")
            pack_linears(model, cpu, torch.bfloat16, precision)
            load_shard(model, checkpoint.tensors, tp, dtype=torch.bfloat16, device=cpu)
        dit = FusedTransformer(model)
        dit._blocks._steps = both
        inputs, sigma = Inputs.random(model, seed=1), torch.full((1,), 0.7)
        ropes = dit.ropes(AV(video_positions(SHAPE), audio_positions(SHAPE.audio_latents)), torch.bfloat16)
        levels = torch.arange(SHAPE.video_tokens, dtype=torch.int32) % 3
        for index, times in ((None, torch.tensor([[0.7]])), (levels, torch.tensor([[0.7, 0.3, 0.0]]))):
            given = AV(index, None), AV(times, sigma[:, None])
            modalities = inputs.latents.map(
                lambda x, c, tables, of, at: Modality(
                    x.bfloat16(), sigma, at, c.bfloat16(), *tables, level_index=of  # noqa: B023
                ),
                inputs.contexts, ropes, *given,
            )  # fmt: skip
            blocks = AV(frozenset(() if index is None else (0,)), frozenset())
            # The other pass takes over what the first leaves before the second block.
            prefix = Prefix(1)
            dit(modalities, Perturbation(values_only=blocks), prefix=prefix)
            dit(modalities, Perturbation(values_only=blocks), prefix=prefix)


def head_places() -> None:
    """Rows that are written by the rank that is to have their heads, and those that came back by rank and group."""
    batch, tokens, head_dim = 2, 3, 6
    for dtype, (ranks, groups), in_group, gaps in itertools.product(
        (torch.bfloat16, torch.float32), ((2, 1), (2, 2), (3, 4)), (1, 2), (False, True)
    ):
        width, heads = in_group * head_dim, ranks * groups * in_group
        q, k = (normal(batch * tokens, 2 * heads * head_dim).to(dtype).chunk(2, dim=1)[n] for n in range(2))
        weight, logits = normal(heads * head_dim).to(dtype), normal(batch * tokens, heads).to(dtype)
        table = RopeTable(*(normal(tokens, heads * head_dim // 2).to(dtype) for _ in range(2)))
        for rank in range(ranks):
            written = []
            for module in (steps, kernels):
                shape = (groups, 3, batch, tokens, width)
                # One axis more, of which every other entry is somebody else's.
                whole, own = (torch.full((2, *size), torch.nan, dtype=dtype) for size in ((ranks, *shape), shape))
                if gaps:
                    own = own.movedim(0, 3).flatten(2, 3).unflatten(2, (batch, 2)).contiguous()[:, :, :, 0]
                else:
                    own = own[0]
                others = whole[0] if gaps else whole[0, 1:]
                after = others[rank + 1 :] if gaps else others[rank:]
                places = HeadPlaces(others[:rank], own, after)
                module.norm_heads_([(q, weight), (k, weight)], heads, 1e-6, table, None, places)
                module.place_heads(k, 2, places)
                written.append([whole, own])
            for right, found in zip(*written, strict=True):
                assert torch.equal(right.isnan(), found.isnan())
                check(found.nan_to_num(), right.nan_to_num())
        back = normal(groups, ranks, batch * tokens, in_group, head_dim).to(dtype).permute(2, 1, 0, 3, 4)
        for quantize in (False, True):
            right = steps.apply_gates(back.flatten(1, 3), logits, quantize)
            check(kernels.apply_gates(back, logits, quantize), right)
            check(steps.apply_gates(back, logits, quantize), right)


def decoding() -> None:
    for dtype, layout, (factors, channels), size in itertools.product(
        (torch.bfloat16, torch.float32),
        (torch.channels_last_3d, torch.contiguous_format),
        (((1, 1, 1), 3), ((1, 1, 1), 40), ((2, 1, 1), 6), ((1, 2, 2), 5), ((2, 2, 2), 3), ((1, 4, 4), 3)),
        ((1, 1, 1, 1), (2, 3, 3, 5)),
    ):
        expansion = factors[0] * factors[1] * factors[2]
        bias = normal(channels * expansion).to(dtype)
        for outputs, with_bias, with_x, width_first in (
            (SumOutputs(layout, layout, (1, 1), 1e-8), True, True, False),
            (SumOutputs(layout, None, (2, 0), 1e-8), True, False, True),
            (SumOutputs(layout, None, (1, 1)), False, False, False),
            (SumOutputs(layout, torch.contiguous_format), True, False, True),
        ):
            y, x = (
                normal(size[0], width, *size[1:]).to(dtype).contiguous(memory_format=layout)
                for width in (channels * expansion, channels)
            )
            added = x if with_x and expansion == 1 else None
            total = ConvSum(y, bias if with_bias else None, added, factors, width_first)
            right = decode_steps.finish_sum(total, outputs)
            check(decode_kernels.finish_sum(total, outputs), right)


def merges() -> None:
    """Ranks and sides that fill no tile, shards of wider factors, and several LoRAs in chunks of rows."""
    for dtype, (rows, columns), ranks in itertools.product(
        (torch.bfloat16, torch.float32), ((1, 17), (33, 1), (130, 300)), ((1,), (65,), (7, 32))
    ):
        clean = normal(rows, columns).to(dtype)
        products = [
            FactorProduct(
                normal(rank, columns + 5).to(dtype)[:, 2:-3], normal(rows + 3, rank).to(dtype)[1:-2], strength
            )
            for rank, strength in zip(ranks, (0.37, -1.2), strict=False)
        ]
        right = torch.full_like(clean, torch.nan)
        merging.merge_(right, clean, products)
        found = torch.full_like(clean, torch.nan)
        merge_kernel.merge(found, clean, products, chunk_bytes=40_000)
        merge_kernel.merge(clean, clean, products, chunk_bytes=40_000)
        assert torch.equal(found, clean)
        # The order of a sum over the rank may change a last bit, of a product that cancels too.
        torch.testing.assert_close(found, right, rtol=STEPS[dtype][0], atol=0.1 if dtype == torch.bfloat16 else 1e-4)


if __name__ == "__main__":
    instrument(Accesses())
    with torch.inference_mode():
        for check_name in sys.argv[1:]:
            {"passes": passes, "head_places": head_places, "decoding": decoding, "merges": merges}[check_name]()
